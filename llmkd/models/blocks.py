"""Attention whose scores are bounded by tanh (Gemma 2, arXiv 2408.00118, section 2), block by block on a CPU.

transformers has nothing but its eager way for a model in training: every step of softmax(c tanh(s QKᵀ/c)) V
goes over the whole L × L matrix in memory, above the diagonal too. Here a block of queries stays in the
cache, and keys that come later, or lie beyond the window, are left out. Same numbers, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NAME = "llmkd_blocks"
QUERIES = 128  # of a block
SCORES = 2**20  # of a block at most, over all its rows and heads, so that they stay in the cache
Block = tuple[slice, slice, slice]  # rows, queries, keys


def is_traced() -> bool:
    """Whether a model is being exported or compiled: then it is transformers' own operations that count."""
    compiled = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    return compiled or torch.jit.is_tracing()  # type: ignore[attr-defined]


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface: query (B, H, L, D), key and value (B, G, L, D), mask (B, 1, L, L), added.

    Returns (B, L, H, D), and the weights where the eager way had to be taken.
    """
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward, repeat_kv

    square = attention_mask is not None and query.shape[2] == key.shape[2] == attention_mask.shape[-1]
    able = softcap is not None and module.is_causal and query.device.type == "cpu" and not is_traced()
    if not square or not able or dropout:
        return eager_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap
        )
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    heads = module.num_key_value_groups
    with torch.autocast("cpu", enabled=False):  # it would widen the softmax
        found = _Blocks.apply(
            query.to(kind),
            repeat_kv(key, heads).to(kind),
            repeat_kv(value, heads).to(kind),
            attention_mask,
            scaling,
            softcap,
            sliding_window,
        )
    return found.transpose(1, 2).contiguous(), None


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        scaling: float,
        softcap: float,
        window: int | None,
    ) -> Tensor:
        out, kept = torch.empty_like(query), []
        for rows, asked, seen in _blocks(query, window):
            scores = query[rows, :, asked] @ key[rows, :, seen].transpose(2, 3)  # (b, H, q, k)
            bounded = scores.mul_(scaling / softcap).tanh_()
            masked = torch.add(mask[rows, :, asked, seen], bounded, alpha=softcap)
            shares = masked.softmax(-1).to(value.dtype)
            out[rows, :, asked] = shares @ value[rows, :, seen]
            if any(ctx.needs_input_grad):
                kept += [bounded, shares]
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scaling, ctx.window = scaling, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        # sums over blocks, in float32
        grad_key, grad_value = (torch.zeros_like(one, dtype=torch.float32) for one in (key, value))
        for i, (rows, asked, seen) in enumerate(_blocks(query, ctx.window)):
            bounded, shares = kept[2 * i : 2 * i + 2]  # (b, H, q, k)
            grad = grads[0][rows, :, asked]  # (b, H, q, D)
            grad_value[rows, :, seen] += shares.transpose(2, 3) @ grad
            grad_shares = grad @ value[rows, :, seen].transpose(2, 3)
            grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            grad_scores = torch.ops.aten.tanh_backward(grad_scores, bounded)
            grad_query[rows, :, asked] = (grad_scores @ key[rows, :, seen]).mul_(ctx.scaling)
            grad_key[rows, :, seen] += grad_scores.transpose(2, 3) @ query[rows, :, asked]
        grad_key.mul_(ctx.scaling)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


def _blocks(query: Tensor, window: int | None) -> Iterator[Block]:
    """Every block of queries with the keys that it may look at: none later, none beyond the window."""
    batch, heads, length, _ = query.shape
    for begin in range(0, length, QUERIES):
        end = min(begin + QUERIES, length)
        first = max(0, begin - window + 1) if window else 0
        many = max(1, SCORES // (heads * (end - begin) * (end - first)))
        for row in range(0, batch, many):
            yield slice(row, row + many), slice(begin, end), slice(first, end)
