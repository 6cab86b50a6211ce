"""The JSON Schema of a config, for editors that check and complete YAML."""

import argparse
import json

from llmkd.cli.options import Answer


def add_flags(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def answer(arguments: argparse.Namespace) -> Answer:
    from llmkd import config

    schema = config.json_schema()
    return Answer(schema, json.dumps(schema, indent=1))
