"""Adapters: adding them, and what is trainable: taking it out, putting it back, saving it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmkd import ranks
from llmkd.errors import ModelError
from llmkd.models.lora_linear import fuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEW = "_llmkd_new"  # where a model keeps the names of its backbone's modules that no checkpoint had


def head_modules(model: nn.Module) -> list[str]:
    """Names of what is trained in full whatever the rest: all that stands outside the backbone, by
    `base_model_prefix`, and those of the backbone's modules that began at random (a new pooler)."""
    outside = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    return [*outside, *model.__dict__.get(NEW, ())]


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    causal: bool = False,
) -> nn.Module:
    """Freeze a sequence classifier (or a causal LM) and add LoRA beside its linear layers.

    Hu et al. 2021, arXiv 2106.09685. A classifier's head modules are trained in full, and like the
    adapter in float32 whatever the base is held in. Raises ModelError where dropout leaves no input.
    """
    if not 0 <= dropout < 1:
        raise ModelError(f"dropout={dropout} before the adapters: take one from 0 to below 1")
    from peft import LoraConfig, TaskType, get_peft_model

    heads = [] if causal else head_modules(model)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=heads or None,
        exclude_modules=rf"({'|'.join(map(re.escape, heads))})(\..*)?" if heads else None,
        task_type=TaskType.CAUSAL_LM if causal else TaskType.SEQ_CLS,
    )
    with _without_gptqmodel():
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fuse(adapted)
    return adapted


@contextmanager
def _without_gptqmodel() -> Iterator[None]:
    """peft imports gptqmodel to ask whether a layer is its: half a second, and until someone has, none is."""
    from peft.tuners.lora import awq, gptq

    before = awq.is_gptqmodel_available, gptq.is_gptqmodel_available
    awq.is_gptqmodel_available = gptq.is_gptqmodel_available = lambda: "gptqmodel" in sys.modules
    try:
        yield
    finally:
        awq.is_gptqmodel_available, gptq.is_gptqmodel_available = before


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """CPU copies of what is trained; whole tensors also where ZeRO-3 has cut them up.

    Under ZeRO-3 every rank must call it; the copies are whole on every rank.
    """
    state = {}
    for name, parameter in trainable(model).items():
        with _whole([parameter]):
            state[name] = parameter.detach().to("cpu", copy=True)
    return state


def load_trainable(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `trainable_state` took. Raises KeyError on a name that is missing."""
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            with _whole([parameter], writer=0):
                if not _sharded(parameter) or ranks.is_main():
                    parameter.copy_(state[name])


def sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has cut up any of its weights: then it cannot run outside a training."""
    return any(map(_sharded, model.parameters()))


def _sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _whole(parameters: list[nn.Parameter], writer: int | None = None) -> Any:
    """A context in which ZeRO-3 parameters have their whole shape; without ZeRO-3, nothing."""
    from contextlib import nullcontext

    if not any(_sharded(parameter) for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer)


def save_trained(model: nn.Module, state: dict[str, Tensor], directory: Path) -> None:
    """A PEFT adapter directory, or for a model trained in full an ordinary model directory."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)  # type: ignore[operator]
        _tidy(directory)
    else:
        buffers = {name: tensor for name, tensor in model.named_buffers() if name in model.state_dict()}
        model.save_pretrained(directory, state_dict={**buffers, **state})  # type: ignore[operator]


def _tidy(directory: Path) -> None:
    """PEFT notes where the base lay and writes a card about it, though a run directory may be moved; and sets
    of names in the order of their hashes, which is another in each process."""
    import json

    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if Path(config.get("base_model_name_or_path") or "").is_dir():
        config["base_model_name_or_path"] = None
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")


def load_trained(model: nn.Module, directory: Path) -> None:
    """Put what `save_trained` left of a fold into a model of the same kind, sharded by ZeRO-3 or not."""
    from safetensors.torch import load_file

    from llmkd.models.artifact import open_tensors

    if hasattr(model, "peft_config"):
        saved = load_file(directory / "adapter_model.safetensors")
        return load_trainable(model, {name: saved[_saved_name(name)] for name in trainable(model)})
    with open_tensors(directory) as tensors:
        load_trainable(model, {name: tensors[name]() for name in trainable(model)})


def _saved_name(name: str) -> str:
    """The name under which peft saves a parameter of its adapter called `default`."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
