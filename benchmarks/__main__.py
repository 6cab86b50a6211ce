"""All side-by-side measurements, one after the other, and one table of them: make bench.

    python benchmarks [--quick | --short] [--threads 4] [--prefs prefs.parquet] [--imdb imdb.parquet]
        [--environments DIRECTORY]

Without files, rows of made-up lengths stand for real ones. Nothing else should run on the machine. With N
threads a training of ours is N ranks of one thread, against peers of N threads and of N ranks; one thread
of both sides is measured too. --short: fewer rounds, rows and peers, models and lengths as ever; some 45
minutes on 4 quiet cores.
"""

from __future__ import annotations

import argparse
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
FEW_EPOCHS = ["pretrain.0.epochs=0.05", "pretrain.1.epochs=0.1", "pretrain.2.epochs=0.2"]
FEW_EPOCHS += ["teachers.llama.epochs=0.2", "teachers.qwen.epochs=0.2", "distill.epochs=0.2"]
ONCE = ["--rounds", "1"]
SHORT = {
    "training.py": ["--steps", "3"],
    "teacher_logits.py": ["--count", "60"],
    "inference.py": ["--count", "60"],
    "quantization.py": ["--calibration", "32"],
    "overhead.py": [*ONCE, "--set", *FEW_EPOCHS],
    "sparse_cache.py": ONCE,
    "sequence_step.py": ONCE,
    "txtai_peer.py": ["--count", "64"],
}  # and two rounds of each other


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--prefs", type=Path)
    found.add_argument("--imdb", type=Path)
    found.add_argument("--short", action="store_true", help="two rounds or one, fewer rows")
    add_flag(found)
    asked = found.parse_args()
    if asked.clock == "cpu" and asked.threads > 1:
        sys.exit("--clock cpu is of one thread a side: take --threads 1, or the wall's on a quiet machine")
    data = [["--data", str(path.resolve())] for path in (asked.prefs, asked.imdb) if path] or [[]]
    jobs = trainings(asked, data)
    jobs += [(name, data[0]) for name in ("teacher_logits.py", "inference.py")]
    jobs += [(name, []) for name in ("quantization.py", "growth.py", "growth_ranks.py", "overhead.py")]
    jobs += [("sequence_loss.py", one) for one in ([[]] if asked.quick else VOCABULARIES)]
    peers = ["--environments", str(asked.environments.resolve())] if asked.environments else []
    jobs += [("sparse_cache.py", []), ("sequence_step.py", peers), ("txtai_peer.py", [*data[-1], *peers])]
    shared = ["--rounds", str(asked.rounds), "--threads", str(asked.threads), "--clock", asked.clock]
    shared += ["--quick"] * asked.quick
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads)}
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        rows = asked.rows.resolve() if asked.rows else Path(directory) / "rows.jsonl"
        rows.touch()
        before = len(rows.read_text().splitlines())
        for name, more in jobs:
            print(f"\n{name} {' '.join(more)}", flush=True)
            fewer = ["--rounds", "2", *SHORT.get(name, [])] if asked.short else []
            command = [sys.executable, str(HERE / name), *shared, "--rows", str(rows), *fewer, *more]
            if subprocess.run(command, env=environment).returncode:
                failed.append(name)
        measured = [json.loads(line) for line in rows.read_text().splitlines()[before:]]
    print(f"\n{machine(asked.threads)}\n{HEAD}")
    for one in measured:
        busy, _, _ = one.pop("busy"), one.pop("clock"), one.pop("machine")
        print(Row(**one).line() + (" busy machine |" if busy else ""))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def trainings(asked: argparse.Namespace, data: list[list[str]]) -> list[tuple[str, list[str]]]:
    """By ranks over each file, and on one thread a side; --short: without the slowest peers."""
    many, one_thread = ["--ranks", str(asked.threads)], ["--threads", "1"]
    if asked.threads == 1:
        return [*(("training.py", one) for one in data), ("roof.py", data[0])]
    by_ranks = ["--peers", "plain2", "plain2-ranks"] if asked.short else []
    alone = ["--steps", "1", "--peers", "plain2", "trainer"] if asked.short else []
    jobs = [("training.py", [*one, *many, *by_ranks]) for one in data]
    jobs += [("roof.py", [*data[0], *many]), ("training.py", [*data[0], *one_thread, *alone])]
    return [*jobs, ("roof.py", [*data[0], *one_thread])]


if __name__ == "__main__":
    main()
