"""Gemma 2 as it runs here: attention by blocks, and its norms as one operation each."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkd.models.blocks import NAME, attention, is_traced


def tune(model: Any) -> None:
    """Let a Gemma 2 in transformers' eager way run faster on a CPU; any other model is left alone.

    Its numbers are the same, to rounding. What is saved of it does not change.
    """
    config = model.config
    if getattr(config, "model_type", "") != "gemma2" or config._attn_implementation != "eager" or is_traced():
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    config._attn_implementation = NAME
    for module in model.modules():
        if type(module) is Gemma2RMSNorm:
            module.forward = partial(_norm, module)  # type: ignore[method-assign]


def _norm(module: Any, x: Tensor) -> Tensor:
    learns = torch.is_grad_enabled() and module.weight.requires_grad
    if learns or x.device.type != "cpu" or is_traced():
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return _Norm.apply(x, 1 + module.weight.float(), module.eps)  # type: ignore[no-any-return]


class _Norm(torch.autograd.Function):
    """w x / √(mean x² + ε), computed in float32; w frozen (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.float32, copy=True)  # (..., H)
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return wide.mul_(inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        grad, wide = grads[0] * weight, x.float()  # (..., H), float32
        along = torch.linalg.vecdot(grad, wide)[..., None] * inverse.pow(3) / -x.shape[-1]  # (..., 1)
        return grad.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None
