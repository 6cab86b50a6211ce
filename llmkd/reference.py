"""docs/config.schema.json and docs/config.md, written from the schema: `python -m llmkd.reference [DOCS]`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llmkd.config import json_schema
from llmkd.losses import LOSSES
from llmkd.schema import Config, Evaluate, Folds, Merge, Quantize
from llmkd.schema_distill import Distill, FeaturePair, Phase, TokenCache
from llmkd.schema_models import External, Init, Lightgbm, Llm, Model, Student, TrainTokenizer
from llmkd.schema_task import Features, Image, Task, Transfer
from llmkd.schema_training import Lora, Pretrain, Training

SCHEMA, PAGE = "config.schema.json", "config.md"
SECTIONS: dict[str, list[type[BaseModel]]] = {
    "": [Config],
    "task": [Task, Transfer, Features, Image],
    "folds": [Folds],
    "teachers, student, students, peers": [Model, Init, TrainTokenizer, Lora, Student],
    "teachers, by kind": [Llm, Lightgbm, External],
    "how anything is trained": [Training],
    "pretrain": [Pretrain],
    "distill": [Distill, FeaturePair, Phase, TokenCache],
    "merge, quantize, evaluate": [Merge, Quantize, Evaluate],
}
PLACES = {  # where a section's keys stand in the YAML
    "Config": "",
    "Task": "task.",
    "Transfer": "task.transfer.",
    "Features": "task.features.",
    "Image": "task.image.",
    "Folds": "folds.",
    "Model": "student.",
    "Init": "student.init.",
    "TrainTokenizer": "student.init.tokenizer.",
    "Lora": "student.lora.",
    "Student": "student.",
    "Llm": "teachers.NAME.",
    "Lightgbm": "teachers.NAME.",
    "External": "teachers.NAME.",
    "Training": "teachers.NAME.",
    "Pretrain": "pretrain.N.",
    "Distill": "distill.",
    "FeaturePair": "distill.features.N.",
    "Phase": "distill.phases.N.",
    "TokenCache": "distill.cache.",
    "Merge": "merge.",
    "Quantize": "quantize.",
    "Evaluate": "evaluate.",
}
INTRO = """\
# Every key of a config

Written by `python -m llmkd.reference` from `llmkd/schema.py`; do not edit by hand.

A config names only what differs from these defaults. Any key can be set on the command line by its dotted
path: `distill.epochs=3`, `teachers.llama.lora.r=8` (an item of a list by its `name` or its number). Unknown
keys are refused, and all faults are told at once. An editor that reads
`# yaml-language-server: $schema=../docs/config.schema.json` checks and completes as you type; `llmkd schema`
prints that schema.

A fingerprint says what a finished unit was made from: when it changes, the unit is made anew. Keys marked
**machine** are in none, so a run may go on with other values, on another machine. Nor is `run`. Of all others
only those that a unit depends on are in its own: another `quantize.bits` makes stages 05 and 06 anew and
leaves the trainings as they are.

"required" stands where there is no default.
"""


def pages() -> dict[str, str]:
    """File name in docs/ -> its text."""
    return {SCHEMA: json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n", PAGE: page()}


def page() -> str:
    whole = json_schema()
    parts = [INTRO]
    for title, models in SECTIONS.items():
        parts.append(f"## {title or 'At the top'}\n")
        for model in models:
            parts.append(section(whole, model))
    parts.append(f"## The losses\n\n`distill.terms` takes {', '.join(f'`{name}`' for name in LOSSES)}.")
    return "\n".join(parts) + "\n"


def section(whole: dict[str, Any], model: type[BaseModel]) -> str:
    """A section's sentence and its table: key, type, default, what it is for; keys of its own alone."""
    told = whole if model is Config else whole["$defs"].get(model.__name__) or model.model_json_schema()
    about = (model.__doc__ or "").strip().replace("\n    ", " ")
    lines = ["| key | type | default | what it is for |", "|---|---|---|---|"]
    for key, field in told["properties"].items():
        if key != "student" and key not in model.__annotations__:  # a base's, whose table has it
            continue
        default = shown(field, required=key in told.get("required", []))
        marked = " **machine**" if field.get("machine") else ""
        name = f"`{PLACES[model.__name__]}{key}`"
        words = [name, typed(field), default, field.get("description", "") + marked]
        cells = " | ".join(word.replace("|", "\\|") for word in words)
        lines.append(f"| {cells} |")
    return "\n".join([*([f"{about}\n"] if about else []), *lines, ""])


def shown(field: dict[str, Any], *, required: bool) -> str:
    if required:
        return "required"
    if "$ref" in field or (field.get("default") and any("$ref" in kind for kind in field.get("anyOf", ()))):
        return "as below"
    value = field.get("default", [] if field.get("type") == "array" else {})
    if value == [] or value == {}:
        return ""
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def typed(field: dict[str, Any]) -> str:
    """A type in words: `number > 0`, `cosine` or `linear`, list of strings."""
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return f"section {field['$ref'].rsplit('/', 1)[1]}"
    kinds = field.get("anyOf") or field.get("oneOf")
    if kinds:
        return " or ".join(typed(kind) for kind in kinds)
    kind = str(field.get("type", "anything"))
    if kind == "array" and "prefixItems" in field:
        return " and ".join(typed(item) for item in field["prefixItems"])
    if kind == "array":
        return f"list of {typed(field['items'])}"
    if kind == "object":
        values = field.get("additionalProperties")
        return f"name → {typed(values)}" if isinstance(values, dict) and values else "name → anything"
    return " ".join([kind, *bounds(field)])


def bounds(field: dict[str, Any]) -> Iterator[str]:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    yield from (f"{sign} {field[word]:g}" for word, sign in words.items() if word in field)


def main(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")
        print(directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
