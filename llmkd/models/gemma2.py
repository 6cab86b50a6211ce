"""Gemma 2 as it runs here on a CPU: attention by blocks, norms and MLP in fewer passes over memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkd.models.blocks import attend, is_traced
from llmkd.models.passes import GatedGelu, Norm

TUNED = "_llmkd_tuned"


def tune(model: Any) -> None:
    """Let a Gemma 2 in transformers' eager way run faster on a CPU; any other model is left alone.

    Its numbers are the same, to rounding. What is saved of it does not change.
    """
    config = model.config
    if getattr(config, "model_type", "") != "gemma2" or TUNED in model.__dict__ or is_traced():
        return
    from transformers.models.gemma2 import modeling_gemma2 as gemma2

    # accelerate's hooks, of a model spread over devices, want each module's own forward
    if config._attn_implementation != "eager" or any(hasattr(one, "_hf_hook") for one in model.modules()):
        return
    if model.dtype == torch.float64:  # its passes keep float32
        return
    model.__dict__[TUNED] = True
    ways: dict[type, Any] = {
        gemma2.Gemma2Attention: attend,
        gemma2.Gemma2MLP: _mlp,
        gemma2.Gemma2RMSNorm: _norm,
    }
    for module in model.modules():
        if type(module) in ways:
            module.forward = partial(ways[type(module)], module)


def _norm(module: Any, x: Tensor) -> Tensor:
    learns = torch.is_grad_enabled() and module.weight.requires_grad
    if learns or x.device.type != "cpu" or is_traced():
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return Norm.apply(x, 1 + module.weight.float(), module.eps)  # type: ignore[no-any-return]


def _mlp(module: Any, x: Tensor) -> Tensor:
    if module.config.hidden_activation != "gelu_pytorch_tanh" or x.device.type != "cpu" or is_traced():
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return module.down_proj(GatedGelu.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-any-return]
