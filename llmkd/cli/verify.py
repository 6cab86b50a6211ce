"""Every finished unit of a run held against its manifest, byte by byte; exit code 1 on any problem."""

import argparse
import sys
from pathlib import Path

from llmkd.cli.options import Answer


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run directory, such as runs/demo")


def answer(arguments: argparse.Namespace) -> Answer:
    from llmkd.verify import units, verify_run

    directory = Path(arguments.run)
    problems, count = verify_run(directory), len(list(units(directory)))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    text = "" if problems else f"{directory}: {count} units, all whole"
    return Answer({"run": str(directory), "units": count, "problems": problems}, text, 1 if problems else 0)
