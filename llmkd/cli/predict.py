"""Probabilities of an artifact for the rows of a file, one row each in the file's order."""

import argparse
from pathlib import Path

from llmkd.cli.options import Answer, artifact_flags, artifact_settings, lines


def add_flags(parser: argparse.ArgumentParser) -> None:
    artifact_flags(parser)
    parser.add_argument("rows", help="a CSV, JSONL or Parquet file")
    parser.add_argument("--output", "-o", required=True, metavar="FILE", help="where the predictions go")


def answer(arguments: argparse.Namespace) -> Answer:
    from llmkd import predicting

    found = predicting.predict_file(
        Path(arguments.artifact), arguments.rows, Path(arguments.output), **artifact_settings(arguments)
    )
    return Answer(found, lines(found))
