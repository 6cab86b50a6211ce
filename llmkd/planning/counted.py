"""Models that no formula describes, built on the meta device, where tensors have shapes and no bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkd.errors import ModelError
from llmkd.planning.shapes import Shape, from_config

ROWS, TOKENS = 4, 64  # what a net is tried with


def filled(architecture: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config's settings over transformers' defaults. Raises ModelError for what it does not take."""
    from transformers import AutoConfig

    from llmkd.models.hub import register_nets

    register_nets()
    try:
        return dict(AutoConfig.for_model(architecture, **settings).to_dict())
    except Exception as error:  # strict configs raise classes of their own
        line = " ".join(str(error).split())[:200]
        raise ModelError(f"init: {architecture} {dict(settings)}: {line}") from error


def from_meta(architecture: str, config: Mapping[str, Any], source: str) -> Shape:
    """The shape of any transformers architecture, or of one of the package's nets.

    Raises ModelError where the config has not the sizes of a transformer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from llmkd.models.hub import register_nets

    register_nets()
    told = ("model_type", "id2label", "label2id", "num_labels", "quantization_config", "auto_map")
    settings = {name: value for name, value in config.items() if name not in told}
    try:
        with torch.device("meta"):
            made = AutoConfig.for_model(architecture, **settings, num_labels=2)
            model = AutoModelForSequenceClassification.from_config(made, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        line = " ".join(str(error).split())[:200]
        raise ModelError(f"{source}: {architecture} cannot be counted: {line}; mend its config") from error
    if architecture.startswith("llmkd-"):
        return _net(architecture, model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        text = model.config.get_text_config()
        shape = from_config({**text.to_dict(), "model_type": architecture})
    except (KeyError, TypeError) as error:
        raise ModelError(f"{source}: {architecture} has no {error}: only transformers are planned") from error
    return replace(shape, counted=parameters - shape.head(2))


def _net(architecture: str, model: Any) -> Shape:
    """What one forward saves for backward and computes, a token (of a net that reads no text: a row)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    inputs, tokens = _inputs(architecture, model.config)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, FlopCounterMode(display=False) as flops:
        model.train()(**inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Shape(
        family=architecture,
        layers=1,
        hidden=0,
        encoder=True,
        counted=parameters,
        saved_bytes=sum(storage.nbytes() for storage in saved.values()) / tokens,
        net_flops=flops.get_total_flops() / tokens,
    )


def _inputs(architecture: str, config: Any) -> tuple[dict[str, Any], int]:
    """Inputs on the meta device, and how many tokens (or rows) they count as."""
    import torch

    def zeros(*size: int, dtype: Any = torch.float32) -> Any:
        return torch.zeros(*size, dtype=dtype, device="meta")

    if architecture == "llmkd-hashed":
        ids = zeros(ROWS, TOKENS, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids}, ROWS * TOKENS
    if architecture == "llmkd-mlp":
        return {"pixels": zeros(ROWS, 1, config.pixels)}, ROWS
    found = {}
    if config.numbers:
        found["numbers"] = zeros(ROWS, config.numbers)
    if config.categories:
        found["categories"] = zeros(ROWS, len(config.categories), dtype=torch.int64)
    if config.steps:
        found["steps"] = zeros(ROWS, config.steps, config.series)
    return found, ROWS
