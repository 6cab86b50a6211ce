"""An artifact for others: as ONNX, held against torch; or a run's, with its scores, as a folder to upload."""

import argparse
from pathlib import Path

from llmkd.cli.options import Answer, lines


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", help="a model directory; for the hub, a run directory")
    parser.add_argument("--output", "-o", required=True, metavar="DIR", help="a directory for the result")
    parser.add_argument("--format", choices=["onnx", "hub"], default="onnx")


def answer(arguments: argparse.Namespace) -> Answer:
    from llmkd import export

    write = {"onnx": export.export_onnx, "hub": export.export_hub}[arguments.format]
    found = write(Path(arguments.artifact), Path(arguments.output))
    return Answer(found, lines(found))
