"""A benchmark's own command as several ranks, one thread each, gloo between them: as torchrun starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Job = subprocess.Popen[bytes]


def together(
    way: str, many: int, variables: Mapping[str, str] | None = None, attempts: int = 2
) -> list[dict[str, Any]]:
    """What each of `many` ranks found: the last line it prints, as JSON. Ends the program where one fails;
    where one dies of a signal that is told, and all are begun once more."""
    around = {**os.environ, **(variables or {}), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(many)}
    around |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `finally`
    with tempfile.TemporaryDirectory() as directory:
        place, jobs = Path(directory), list[Job]()
        try:
            jobs.extend(started(way, around, number, place) for number in range(many))
            failed, code = first_failure(jobs)
        finally:
            for job in jobs:
                job.kill()
                job.wait()
            signal.signal(signal.SIGTERM, before)
        if failed is not None:
            error = (place / f"{failed}.err").read_text(errors="replace")
            told = f"{way}: rank {failed} of {many} ended with {code}"
            if code > 0 or attempts == 1:
                sys.exit(f"{told}:\n{error[-3000:]}")
            print(f"  {told}; once more", flush=True)
            return together(way, many, variables, attempts - 1)
        return [json.loads((place / f"{n}.out").read_text().splitlines()[-1]) for n in range(many)]


def started(way: str, around: Mapping[str, str], number: int, place: Path) -> Job:
    """It writes into files: a full pipe that nobody reads would stop it, and all others with it."""
    command = [sys.executable, *sys.argv, "--threads", "1", "--way", way]
    env = {**around, "RANK": str(number), "LOCAL_RANK": str(number)}
    with (place / f"{number}.out").open("wb") as out, (place / f"{number}.err").open("wb") as error:
        return subprocess.Popen(command, env=env, stdout=out, stderr=error)


def first_failure(jobs: Sequence[Job]) -> tuple[int | None, int]:
    """The number of the first that fails, while others may still wait for it, and its exit code; None and 0
    when all are done."""
    while True:
        codes = [job.poll() for job in jobs]
        for number, code in enumerate(codes):
            if code:
                return number, code
        if None not in codes:
            return None, 0
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
