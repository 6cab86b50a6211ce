"""Scores of an artifact on the labelled rows of a file."""

import argparse
from pathlib import Path

from llmkd.cli.options import Answer, artifact_flags, artifact_settings, lines


def add_flags(parser: argparse.ArgumentParser) -> None:
    artifact_flags(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="a CSV, JSONL or Parquet file")
    parser.add_argument("--label", metavar="COLUMN", help="the column of labels")


def answer(arguments: argparse.Namespace) -> Answer:
    from llmkd import predicting

    found = predicting.evaluate_file(
        Path(arguments.artifact), arguments.data, label=arguments.label, **artifact_settings(arguments)
    )
    return Answer(found, lines(found))
