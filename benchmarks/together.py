"""A benchmark's own command as several ranks, one thread each, gloo between them: as torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def together(way: str, many: int, variables: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """What each of `many` ranks found: the last line it prints, as JSON. Ends the program where one fails."""
    around = {**os.environ, **(variables or {}), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(many)}
    around |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, *sys.argv, "--threads", "1", "--way", way]
    jobs = [
        subprocess.Popen(
            command,
            env={**around, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(many)
    ]
    said = [job.communicate() for job in jobs]
    for job, (_, error) in zip(jobs, said, strict=True):
        if job.returncode:
            sys.exit(f"a rank of {many} failed:\n{error[-3000:]}")
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
