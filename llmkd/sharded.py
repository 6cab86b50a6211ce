"""AdamW's state where DeepSpeed has cut it up: whole tensors by parameter, out and in.

By names and whole shapes, so that a training may go on with another number of ranks or another ZeRO stage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkd import ranks
from llmkd.models.lora import trainable

MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_state(method: nn.Module, engine: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """{"<parameter>/<moment>": tensor}, and the steps taken and learning rates. Every rank must call it.

    The tensors are on the first rank alone, and on the CPU: whole moments of all parameters at once are what
    ZeRO is there to avoid.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    tensors = {}
    for name, parameter in trainable(method).items():
        for moment in MOMENTS:
            whole = safe_get_full_optimizer_state(parameter, moment)
            if ranks.is_main():
                tensors[f"{name}/{moment}"] = whole.reshape(_shape(parameter)).cpu()
    steps = [float(state["step"]) for state in engine.optimizer.optimizer.state.values()]
    rates = [group["lr"] for group in engine.optimizer.optimizer.param_groups]
    return tensors, {"step": max(steps), "rates": rates}


def load_optimizer(method: nn.Module, engine: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Into an engine that has not taken a step: its optimizer has no state yet."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    zero = engine.optimizer
    for group, rate in zip(zero.optimizer.param_groups, facts["rates"], strict=True):
        group["lr"] = rate  # a schedule sets it after a step, for the next one
    flats = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3 keeps its groups empty
    for flat in flats or [flat for group in zero.optimizer.param_groups for flat in group["params"]]:
        moments = {moment: torch.zeros_like(flat.data) for moment in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.tensor(facts["step"]), **moments}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-1 and 2 note where each parameter lies
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in trainable(method).items():
        for moment in MOMENTS:
            value = tensors[f"{name}/{moment}"].to(engine.device)
            if hasattr(parameter, "ds_id"):
                safe_set_local_optimizer_state(parameter, _part(value, parameter), moment)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _part(value: Tensor, parameter: Any) -> Tensor:
    """This rank's part under ZeRO-3, padded as the parameter's own is."""
    size = parameter.ds_tensor.numel()
    flat = nn.functional.pad(value.flatten(), (0, size * ranks.world() - value.numel()))
    return flat[size * ranks.rank() : size * (ranks.rank() + 1)]
