"""From a config to the shapes of its models and the ways they are trained."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from llmkd import tasks
from llmkd.errors import ModelError
from llmkd.inputs import PRETRAIN
from llmkd.planning import lookup
from llmkd.planning.shapes import Shape
from llmkd.planning.way import Way, read_zero
from llmkd.schema import Config
from llmkd.schema_models import Model, TrainTokenizer
from llmkd.schema_training import Training
from llmkd.settings import pretrain_settings

VALUES = 32  # of a category, where the rows are not at hand to be counted


def shape_of(config: Config, model: Model) -> Shape:
    """Of what stage 01 made from this config, else of the checkpoint or tiny config. Raises ModelError."""
    from llmkd.planning.data import stands

    made = Path(config.run) / PRETRAIN / model.name
    if stands(made, pretrain_settings(config, model)):
        return lookup.on_disk(made / "model", model.attention)
    if model.init is None:
        assert model.model
        shape = lookup.named(model.model, model.attention)
        return _kept(shape, len(model.layers)) if model.layers else shape
    if model.is_net:
        sizes = _sizes(config)
        return lookup.from_init(model.init.architecture, {**model.init.config, **sizes}, 0)
    return lookup.from_init(model.init.architecture, model.init.config, _vocabulary(config, model))


def _kept(shape: Shape, layers: int) -> Shape:
    """A checkpoint cut to some of its layers; their biases and norms go with them."""
    lost = shape.layers - layers
    counted = None if shape.counted is None else shape.counted - lost * (shape.block + shape.small)
    return replace(shape, layers=layers, around=shape.around - lost * shape.small, counted=counted)


def _vocabulary(config: Config, model: Model) -> int:
    assert model.init
    asked = model.init.tokenizer
    if isinstance(asked, TrainTokenizer):
        return asked.vocab_size
    if "vocab_size" in model.init.config:
        return int(model.init.config["vocab_size"])
    try:
        return lookup.named(asked).vocab
    except ModelError:
        if not any(Path(asked).glob("tokenizer*")):
            raise
    from llmkd.planning.data import tokenizer_in

    return len(tokenizer_in(asked, model.trust_remote_code))


def _sizes(config: Config) -> dict[str, Any]:
    """Of a net's inputs. Numbers may each bring an indicator; categories are taken to have VALUES values."""
    task = config.task
    if task.image:
        return {"pixels": prod(task.image.shape)}
    features = task.features
    if features is None:
        raise ModelError("task.features: none, so a net's inputs cannot be counted; name the columns")
    steps = max((len(names) for names in features.steps.values()), default=0)
    return {
        "numbers": 2 * len(features.numeric),
        "categories": [VALUES] * len(features.categorical),
        "steps": steps,
        "series": 2 * len(features.steps),
    }


def classes(config: Config) -> int | None:
    """The number of labels; None for next tokens."""
    if config.task.kind == "causal_lm":
        return None
    return len(config.task.labels or tasks.KINDS[config.task.kind].LABELS or (0, 1))


def precision(config: Config) -> str:
    """ "auto" is bf16: what accelerators compute, whatever this machine's processor does."""
    return "bf16" if config.precision == "auto" else config.precision


def way_of(
    config: Config,
    model: Model,
    section: Training,
    ranks: int,
    *,
    classes: int | None,
    lora: Any = ...,
    load_in: str | None = None,
) -> Way:
    """How a section trains a model; a phase of pretraining has a `lora` and `load_in` of its own."""
    arithmetic = precision(config)
    adapter = model.lora if lora is ... else lora
    asked = load_in or model.load_in
    return Way(
        load_in=asked if asked != "auto" else arithmetic if adapter else "fp32",
        lora=adapter.model_dump() if adapter else None,
        precision=arithmetic,
        classes=classes,
        checkpointing=section.gradient_checkpointing,
        zero=read_zero(section.deepspeed),
        ranks=ranks,
    )
