"""All side-by-side measurements, one after the other, and one table of them: make bench.

    python benchmarks [--quick] [--prefs prefs.parquet] [--imdb imdb.parquet]
        [--environments DIRECTORY]

Without files, rows of made-up lengths stand for real ones. Nothing else should run on the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import add_flag
from side import HEAD, Row, machine, parser

HERE = Path(__file__).parent
VOCABULARIES = [["--vocab", "32000"], ["--vocab", "128000"], ["--vocab", "256000"]]


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--prefs", type=Path)
    found.add_argument("--imdb", type=Path)
    add_flag(found)
    asked = found.parse_args()
    data = [["--data", str(path.resolve())] for path in (asked.prefs, asked.imdb) if path] or [[]]
    jobs = [("training.py", one) for one in data]
    jobs += [(name, data[0]) for name in ("roof.py", "teacher_logits.py", "inference.py")]
    jobs += [(name, []) for name in ("quantization.py", "growth.py", "growth_ranks.py", "overhead.py")]
    jobs += [("sequence_loss.py", one) for one in ([[]] if asked.quick else VOCABULARIES)]
    peers = ["--environments", str(asked.environments.resolve())] if asked.environments else []
    jobs += [("sparse_cache.py", []), ("sequence_step.py", peers), ("txtai_peer.py", [*data[-1], *peers])]
    shared = ["--rounds", str(asked.rounds), "--threads", str(asked.threads), "--clock", asked.clock]
    shared += ["--quick"] * asked.quick
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads)}
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.jsonl"
        rows.touch()
        for name, more in jobs:
            print(f"\n{name} {' '.join(more)}", flush=True)
            command = [sys.executable, str(HERE / name), *more, *shared, "--rows", str(rows)]
            if subprocess.run(command, env=environment).returncode:
                failed.append(name)
        measured = [json.loads(line) for line in rows.read_text().splitlines()]
    print(f"\n{machine(asked.threads)}\n{HEAD}")
    for one in measured:
        busy, _, _ = one.pop("busy"), one.pop("clock"), one.pop("machine")
        print(Row(**one).line() + (" busy machine |" if busy else ""))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
