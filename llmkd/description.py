"""llmkd.json: what a model directory says about itself, so that it reads raw rows without a run's config.

Names and numbers alone: no texts, no paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from llmkd import run, tasks
from llmkd.errors import ConfigError, ModelError
from llmkd.models.artifact import is_causal, read_json
from llmkd.schema import Config
from llmkd.settings import text_settings

FILE = "llmkd.json"
TOKENS = 512  # of a classifier that tells of no budget
NOTHING: dict[str, Any] = {
    "columns": {},  # task field -> column in a file
    "extra": [],
    "turns": "text",
    "id": None,
    "label": "label",
    "label_values": None,
    "template": None,
    "computed": [],  # fields of the template that are reckoned from the texts
    "max_tokens": TOKENS,
    "max_words": None,
    "tta": "none",
    "temperature": None,
}


def of_config(config: Config) -> dict[str, Any]:
    """What a run's config says of its student's rows; labels and temperature are known later.

    Averaging both orders is the default of a student that learnt from both.
    """
    task, text = config.task, text_settings(config, config.student)
    kind = tasks.KINDS[task.kind]
    if task.kind == "causal_lm":
        return {"kind": task.kind, "columns": task.columns, "max_tokens": text["max_tokens"]}
    said: dict[str, Any] = {"kind": task.kind, "turns": task.turns, "id": task.id, "label": task.label}
    said |= {"label_values": task.label_values, "tta": "swap" if task.swap else "none"}
    if config.student.is_net:  # its columns stand in features.json
        return said
    template = task.template or kind.TEMPLATE
    named = [name for _, name, _, _ in Formatter().parse(template) if name]
    return said | {
        "columns": {field: task.columns.get(field, field) for field in (*kind.FIELDS, *task.extra)},
        "extra": task.extra,
        "template": template,
        "computed": [name for name in kind.COMPUTED if name in named],
        "max_tokens": text["max_tokens"],
        "max_words": task.max_words,
    }


def write(directory: Path, said: dict[str, Any], labels: Sequence[str], temperature: float | None) -> None:
    """Write llmkd.json into a model directory."""
    run.write_json(directory / FILE, {**NOTHING, **said, "labels": list(labels), "temperature": temperature})


def read(directory: Path) -> dict[str, Any]:
    """What a classifier's directory says; of one without llmkd.json, what its config and tokenizer tell:
    a text in the column `text`, its own labels and its budget.

    Raises ModelError for a language model, for one that does not choose among labels, and for labels that
    are not those of its head.
    """
    config = read_json(directory / "config.json")
    said = read_json(directory / FILE) if (directory / FILE).is_file() else {}
    if said.get("kind") == "causal_lm" or is_causal(directory):
        raise ModelError(
            f'{directory} is a language model, no classifier: use transformers.pipeline("text-generation"), '
            "or stage 06 --artifact for its perplexity"
        )
    own = [name for _, name in sorted((int(i), name) for i, name in config.get("id2label", {}).items())]
    own = own or ["LABEL_0", "LABEL_1"]  # which transformers leaves out of a config
    if len(own) < 2 or config.get("problem_type") not in (None, "single_label_classification"):
        raise ModelError(f"{directory} does not choose one label of several; name a classifier that does")
    if said and said.get("labels") != own:
        raise ModelError(
            f"{directory / FILE} has the labels {said.get('labels')}, its config {own}; export it again"
        )
    return {**NOTHING, **(said or _guessed(directory, config)), "labels": own}


def _guessed(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    from llmkd import features

    if (directory / features.FILE).is_file():
        return {"kind": features.load(directory)["kind"]}
    file = directory / "tokenizer_config.json"
    told = [config.get("max_position_embeddings")]
    told += [read_json(file).get("model_max_length")] if file.is_file() else []
    return {
        "kind": "classification",
        "columns": {"text": "text"},
        "max_tokens": int(min([budget for budget in told if budget], default=TOKENS)),
    }


def asked(
    artifact: Path,
    tta: str | None,
    calibrated: bool,
    columns: Mapping[str, str] | None,
    max_tokens: int | None,
    batch_tokens: int,
) -> dict[str, Any]:
    """What an artifact says of itself, less what is said otherwise. Raises ConfigError, ModelError."""
    for name, value in (("max_tokens", max_tokens), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}: give a number of at least 1")
    said = read(artifact)
    for field in set(columns or {}) - {*said["columns"], "id"}:
        known = ", ".join([*said["columns"], "id"])
        raise ConfigError(f"columns: the artifact has no field {field!r}: it has {known}")
    if tta not in (None, "swap", "none"):
        raise ConfigError(f"tta={tta!r} is unknown: use swap or none")
    if tta == "swap" and tasks.KINDS[said["kind"]].mirror(2) is None:
        raise ConfigError(f"tta='swap': a {said['kind']} row has no two orders; use none")
    said |= {"columns": {**said["columns"], **(columns or {})}, "tta": tta or said["tta"]}
    said |= {"max_tokens": max_tokens or said["max_tokens"]}
    return said | {"temperature": said["temperature"] if calibrated else None}
