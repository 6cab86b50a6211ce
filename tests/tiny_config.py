"""The smallest config that several test files build on, and how its faults are told."""

import pytest

from llmkd.config import parse
from llmkd.errors import ConfigError

MINIMAL = """
run: runs/x
task: {kind: preference, train: train.parquet}
teachers: [{name: llama, model: meta/llama}]
student: {name: gemma, model: google/gemma}
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse(text, overrides, source="run.yaml")
    return str(error.value).split("\n")
