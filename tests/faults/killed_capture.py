"""A capture in shards of TOKENS that dies by kill -9 in its shard N, whose bytes are on the disk by then and
its entry is not: `killed_capture.py TOKENS N stage.py ...`."""

import os
import runpy
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from llmkd import capture, shards

write = shards._write_json
(tokens, when), sys.argv = map(int, sys.argv[1:3]), sys.argv[3:]


def killed(path: Path, content: Any) -> None:
    if path.name == f"shard-{when:05d}.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)


setattr(shards, "_write_json", killed)  # noqa: B010
setattr(capture, "cache_teacher", partial(capture.cache_teacher, shard_tokens=tokens))  # noqa: B010
runpy.run_path(sys.argv[0], run_name="__main__")
