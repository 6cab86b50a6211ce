"""A decoder's work between its products, in blocks of tokens that stay in the processor's cache.

Each is one autograd function on a CPU. Numbers are those of transformers' lines, to rounding: between
reading a block and writing it all is float32; GatedGelu leaves float64 as it is, Norm does not, as theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NUMBERS = 2**18  # of a block, a thread: 1 MB in float32
ROOT, CUBE = math.sqrt(8 / math.pi), 0.044715


class Norm(torch.autograd.Function):
    """w x / √(mean x² + ε), w (H,) frozen, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1]  # (N, H)
        out, inverse = torch.empty_like(rows), torch.empty(len(rows), 1)
        for block in _blocks(rows):
            wide, place = rows[block].float(), out[block]  # float32 is read and written where it lies
            scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=inverse[block])  # (n, 1)
            scale.square_().div_(width).add_(eps).rsqrt_()
            wide = torch.mul(wide, scale, out=place if place.dtype == wide.dtype else wide)
            torch.mul(wide, weight, out=place)
        ctx.save_for_backward(x, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        rows, given = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])  # (N, H)
        out = torch.empty_like(rows)
        for block in _blocks(rows):
            wide, grad = rows[block].float(), given[block].float() * weight.float()
            scale = inverse[block]  # (n, 1)
            along = torch.linalg.vecdot(grad, wide)[:, None].mul_(scale * scale * scale).div_(-x.shape[-1])
            torch.addcmul(grad.mul_(scale), wide, along, out=out[block])
        return out.view(x.shape), None, None


class GatedGelu(torch.autograd.Function):
    """gelu(g) u with gelu's tanh approximation (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2).

    (1 + tanh y) / 2 is the sigmoid σ(2y), which a processor computes at a quarter of the cost; so with
    v = √(8/π) (g + 0.044715 g³) it is gelu(g) = g σ(v) and its slope is σ(v) + g v' σ(v) (1 - σ(v)).
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gates, ups = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])  # (N, I)
        out, learns = torch.empty_like(ups), any(ctx.needs_input_grad)
        acted, slopes = (torch.empty_like(gates) if learns else out for _ in range(2))
        for block in _blocks(gates):
            wide = gates[block].to(torch.promote_types(gates.dtype, torch.float32))
            square, scaled = wide.square(), wide * ROOT
            share = torch.addcmul(scaled, scaled, square, value=CUBE).sigmoid_()
            torch.mul(wide, share, out=acted[block])
            torch.mul(acted[block], ups[block], out=out[block])
            if learns:
                slope = torch.addcmul(scaled, scaled, square, value=3 * CUBE, out=square)  # g v'
                slope = torch.ops.aten.sigmoid_backward(slope, share).add_(share)
                torch.mul(slope, ups[block], out=slopes[block])
        if learns:
            ctx.save_for_backward(acted, slopes)
        return out.view(up.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        acted, slopes = ctx.saved_tensors  # gelu(g) and its slope times u, (N, I)
        grad, shape = grads[0].reshape(acted.shape), grads[0].shape
        gates, ups = torch.empty_like(slopes), torch.empty_like(acted)
        for block in _blocks(grad):  # read once for both
            torch.mul(grad[block], slopes[block], out=gates[block])
            torch.mul(grad[block], acted[block], out=ups[block])
        return gates.view(shape), ups.view(shape)


def _blocks(rows: Tensor) -> Iterator[slice]:
    """(N, width) cut along N."""
    many = max(1, NUMBERS * torch.get_num_threads() // rows.shape[-1])
    for begin in range(0, len(rows), many):
        yield slice(begin, begin + many)
