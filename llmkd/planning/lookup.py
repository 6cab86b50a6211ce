"""A model's shape by what a config names: a well-known name, a directory, or an init of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from llmkd.errors import ModelError
from llmkd.planning.counted import filled, from_meta
from llmkd.planning.shapes import DECODERS, ENCODERS, Shape, from_config

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@cache
def known() -> dict[str, dict[str, Any]]:
    """Configs of well-known models, by their names in lower case."""
    listed = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
    return {name.lower(): entry for entry in listed for name in entry["names"]}


def named(model: str, attention: str | None = None) -> Shape:
    """The shape of a checkpoint on this disk, or of a well-known name. Raises ModelError for others."""
    directory = Path(model)
    if (directory / "config.json").is_file():
        return on_disk(directory, attention)
    entry = known().get(model.lower())
    if entry is None:
        raise ModelError(
            f"{model}: its shape is not known; download its config.json into a directory and name that, "
            "or add it to llmkd/planning/shapes.json"
        )
    return _asked(from_config(entry["config"]), attention)


def _asked(shape: Shape, attention: str | None) -> Shape:
    return replace(shape, eager=attention == "eager") if attention else shape


def on_disk(directory: Path, attention: str | None = None) -> Shape:
    """By the config.json of a model's directory; unfamiliar architectures are counted on the meta device."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{directory}/config.json is not JSON ({error}); save the model again") from error
    kind = str(config.get("model_type", ""))
    if kind in (*DECODERS, *ENCODERS):
        try:
            return _asked(from_config(config), attention)
        except KeyError as error:
            raise ModelError(f"{directory}/config.json has no {error}; save the model again") from None
    return _asked(from_meta(kind, config, str(directory)), attention)


def from_init(architecture: str, settings: Mapping[str, Any], vocab: int) -> Shape:
    """Of a model that stage 01 makes of a tiny config: transformers' defaults fill what it leaves out."""
    config = {"model_type": architecture, "vocab_size": vocab, **settings}
    decoder = ("num_key_value_heads", *(("head_dim",) if architecture == "gemma2" else ()))
    needed = (*NEEDED, *(decoder if architecture in DECODERS else ()))
    familiar = architecture in (*DECODERS, *ENCODERS)
    if familiar and all(name in settings for name in needed):
        return from_config(config)
    config = filled(architecture, {"vocab_size": vocab, **settings})
    return from_config(config) if familiar else from_meta(architecture, config, f"init: {architecture}")
