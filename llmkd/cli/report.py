"""A run's figures, curves and tables as one HTML page."""

import argparse
from pathlib import Path

from llmkd.cli.options import Answer


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run directory, such as runs/demo")
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help="by default RUN/report.html")


def answer(arguments: argparse.Namespace) -> Answer:
    from llmkd import reporting

    path = reporting.write_report(Path(arguments.run), arguments.output)
    return Answer({"report": str(path)}, str(path))
