"""The JSON Schema of a config and its reference: complete, current, and at one with what is read."""

from pathlib import Path

import pytest
import tiny
import yaml
from jsonschema import Draft202012Validator
from tiny_config import MINIMAL

from llmkd.config import json_schema, parse
from llmkd.errors import ConfigError
from llmkd.reference import pages
from llmkd.schema import Config


def test_json_schema_is_closed_and_knows_the_machine_fields() -> None:
    schema = Config.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"run", "task", "students"}
    assert schema["$defs"]["Distill"]["properties"]["batch_tokens"]["machine"] is True


SHIPPED = sorted((tiny.ROOT / "configs").glob("*.yaml"))


def refused(text: str) -> list[str]:
    """Where a config file breaks the JSON Schema."""
    errors = Draft202012Validator(json_schema()).iter_errors(yaml.safe_load(text))
    return [".".join(map(str, error.path)) + ": " + error.message for error in errors]


def test_the_json_schema_is_one() -> None:
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", [*SHIPPED, tiny.CONFIG], ids=lambda path: path.stem)
def test_the_json_schema_takes_every_shipped_config(path: Path) -> None:
    assert refused(path.read_text()) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_an_editor_finds_the_json_schema_from_a_shipped_config(path: Path) -> None:
    first = path.read_text().split("\n")[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.split("=", 1)[1]).resolve() == tiny.ROOT / "docs" / "config.schema.json"


@pytest.mark.parametrize(
    "extra",
    [
        "tracking: wandb",
        "quantize: null",
        "distill: {terms: {kl: 2}, temperature: {llama: 4}, phases: [{epochs: 1}]}",
        "peers: [{name: p, init: {architecture: bert, tokenizer: {vocab_size: 400}}}]",
        "pretrain: [{data: d, lora: {r: 4}}]",
    ],
)
def test_the_json_schema_takes_what_is_read(extra: str) -> None:
    assert refused(f"{MINIMAL}\n{extra}") == []


def test_the_json_schema_takes_short_forms_and_a_chain() -> None:
    text = MINIMAL.replace("train.parquet", "train.parquet, transfer: more.parquet, label: [a, b]")
    chain = "students: [{name: g, model: m}, {name: s, model: m, distill: {epochs: 3}}]"
    assert refused(text.replace("student: {name: gemma, model: google/gemma}", chain)) == []


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ("epocs: 3", "'epocs' was unexpected"),
        ("distill: {epocs: 3}", "distill: "),
        ("distill: {epochs: 0}", "distill.epochs: "),
        ("folds: {count: 2.5}", "folds.count: "),
        ("quantize: {bits: 3}", "quantize: "),
        ("tracking: paper", "tracking: "),
        ("students: [{name: x, model: y}]", "each of"),
        ("merge: {how: sum}", "merge.how: "),
    ],
)
def test_the_json_schema_refuses_what_is_refused(extra: str, where: str) -> None:
    found = refused(f"{MINIMAL}\n{extra}")
    assert len(found) == 1
    assert where in found[0]
    with pytest.raises(ConfigError):
        parse(f"{MINIMAL}\n{extra}")


def test_the_json_schema_asks_for_a_student() -> None:
    assert len(refused("run: r\ntask: {kind: preference, train: t}")) == 1


def test_every_key_says_what_it_is_for() -> None:
    sections = {"": json_schema(), **json_schema()["$defs"]}
    bare = [
        f"{section}.{key}"
        for section, told in sections.items()
        for key, field in told.get("properties", {}).items()
        if not field.get("description")
    ]
    assert not bare


@pytest.mark.parametrize("name", list(pages()))
def test_the_reference_is_current(name: str) -> None:
    assert (tiny.ROOT / "docs" / name).read_text(encoding="utf-8") == pages()[name], (
        "run: python -m llmkd.reference"
    )
