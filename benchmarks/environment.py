"""Peers in an environment of their own: made by pip once, at this project's versions where both name one."""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH = f"torch=={version('torch').partition('+')[0]}"


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--environments", type=Path, help="keep peers' environments here, and use them again")


@contextmanager
def peer(asked: argparse.Namespace, package: str) -> Iterator[str | None]:
    """The Python that has `package`; or None, and a line that says why not."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(asked.environments or scratch) / package
        python = home / "bin" / "python"
        made = [] if (home / "made").exists() else commands(python, package)
        if made:
            venv.create(home, with_pip=True, clear=True)
        for command in made:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
                print(f"{package}: cannot be installed here: {reason}", flush=True)
                yield None
                return
        (home / "made").touch()
        yield str(python)


def commands(python: Path, package: str) -> list[list[str]]:
    """torch by itself first: asked for with others, pip may take another build of it. transformers'
    Trainer needs accelerate, and txtai does not ask for it."""
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), TORCH]
    return [install, [*install, package, "accelerate"]]


def variables(more: Mapping[str, str]) -> dict[str, str]:
    """What a peer's process finds around it: no hub, no banner."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **quiet, **more}


def versions(python: str, *packages: str) -> str:
    """Such as "trl 1.16.0, torch 2.13.0"."""
    code = "import sys; from importlib.metadata import version as v; "
    code += "print(', '.join(f'{p} {v(p)}' for p in sys.argv[1:]))"
    return subprocess.run(
        [python, "-c", code, *packages], capture_output=True, text=True, check=True
    ).stdout.strip()
