"""A frozen linear layer and its adapter as one operation: what peft computes, with fewer passes over memory.

peft casts a layer's input to the adapter's float32, autocast casts it back, and base, adapter, scaling and
sum are operations of their own, forward and backward. For narrow layers that costs as much as the products.

In float32 the adapter may be added to the weight first, W + s B A, which loses nothing there: of its six
small products two go. In bf16 it would, as an update smaller than W's last digit is rounded away.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from llmkd.models.dropout import drawn, without, zero_

ADAPTER = "default"  # peft's name of the only adapter


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + c + s (d Aᵀ) Bᵀ, W and c frozen, d = x less what is dropped (Hu et al. 2021, arXiv 2106.09685).

    Dropout's factor 1 / (1 - p) is the caller's, in s. d is made anew for the gradient: kept, it would be a
    second x for each layer that reads x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, I)
        narrow_a, narrow_b = a.to(x.dtype), b.to(x.dtype)  # (r, I), (O, r)
        low = (rows if dropped is None else without(rows, dropped)) @ narrow_a.T  # (N, r)
        out = linear(rows, weight, bias).addmm_(low, narrow_b.T, alpha=scaling)  # (N, O)
        ctx.save_for_backward(rows, dropped, weight, narrow_a, narrow_b, low)
        ctx.scaling, ctx.shape, ctx.wide = scaling, x.shape, a.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, dropped, weight, a, b, low = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])  # (N, O)
        grad_low = (grad @ b).mul_(ctx.scaling)  # (N, r)
        seen = rows if dropped is None else without(rows, dropped)  # (N, I)
        grad_a = (grad_low.T @ seen).to(ctx.wide)
        grad_b = (grad.T @ low).to(ctx.wide).mul_(ctx.scaling)
        del seen
        grad_x = None
        if ctx.needs_input_grad[0] and dropped is None:
            grad_x = (grad @ weight).addmm_(grad_low, a).view(ctx.shape)  # (N, I)
        elif ctx.needs_input_grad[0]:
            grad_x = zero_(grad_low @ a, dropped).addmm_(grad, weight).view(ctx.shape)
        return grad_x, None, None, None, grad_a, grad_b, None


class _MergedLinear(torch.autograd.Function):
    """x (W + s B A)ᵀ + c, W and c frozen. The sum is made anew for the gradient: kept, it is a second W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        return linear(x, torch.addmm(weight, b, a, alpha=scaling), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, a, b = ctx.saved_tensors
        seen, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, len(weight))  # (N, I), (N, O)
        inputs = weight.shape[1] if ctx.needs_input_grad[0] else 0
        # s B rides along as r columns more: a product of its own with so few of them is slower. So x's
        # gradient is a slice of wider rows.
        wide = weight.new_empty(len(weight), inputs + len(a))  # (O, I + r), or (O, r)
        if inputs:
            torch.addmm(weight, b, a, alpha=ctx.scaling, out=wide[:, :inputs])
        torch.mul(b, ctx.scaling, out=wide[:, inputs:])
        both = grad @ wide  # (N, I + r)
        grad_low = both[:, inputs:].contiguous()  # (N, r)
        grad_a = grad_low.T @ seen
        grad_b = ((seen @ a.T).T @ grad).mul_(ctx.scaling).T  # this way round it is faster
        return both[:, :inputs].view(x.shape) if inputs else None, None, None, grad_a, grad_b, None


def fuse(model: nn.Module) -> None:
    """Let every plain LoRA layer of a peft model compute as one operation where it can."""
    from peft.tuners.lora import Linear

    module: Any
    for module in model.modules():
        if type(module) is Linear and type(module.get_base_layer()) is nn.Linear and not module.lora_variant:
            module.forward = partial(_forward, module)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or not _is_plain(layer, x):
        return type(layer).forward(layer, x, *args, **kwargs)
    base, dropout = layer.base_layer, layer.lora_dropout[ADAPTER]
    x = x.to(base.weight.dtype)
    a, b, scaling = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
    share = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
    if not share and _merging_pays(x, base.weight, a):
        return _MergedLinear.apply(x, base.weight, base.bias, a, b, scaling)
    dropped = drawn(x, share) if share else None
    return _LoraLinear.apply(x, dropped, base.weight, base.bias, a, b, scaling / (1 - share))


def _merging_pays(x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """Whether all is in float32 at least, and the tokens are so many that making W + s B A twice, 4rIO
    operations, costs at most half of the 2rN(I + O) that are saved (less, where x needs no gradient)."""
    exact = x.dtype == weight.dtype == a.dtype and x.dtype in (torch.float32, torch.float64)
    outputs, inputs = weight.shape
    return exact and x.numel() // inputs * (inputs + outputs) >= 4 * inputs * outputs


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Whether the one adapter is on, and base and arithmetic are of one precision."""
    if (
        layer.active_adapters != [ADAPTER]
        or ADAPTER not in layer.lora_A
        or layer.disable_adapters
        or layer.merged
    ):
        return False
    dropout = layer.lora_dropout[ADAPTER]
    if type(dropout) not in (nn.Dropout, nn.Identity):  # as peft has it; another's draws are its own
        return False
    weight, device = layer.base_layer.weight, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    parts = layer.base_layer, dropout, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    # a hook wants its module called: ZeRO-3's, which gathers the weights by it, or one that looks on
    hooked = any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)
    sharded = hasattr(weight, "ds_id")
    return weight.dtype == dtype and not (weight.requires_grad or hooked or sharded)
