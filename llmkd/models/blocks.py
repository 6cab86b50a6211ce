"""Attention whose scores are bounded by tanh (Gemma 2, arXiv 2408.00118, section 2), block by block on a CPU.

transformers has nothing but its eager way for a model in training: every step of softmax(c tanh(s QKᵀ/c)) V
goes over the whole L × L matrix in memory, above the diagonal too. Here a block of queries stays in the
cache, and keys that come later, or lie beyond the window, are left out. Same numbers, to rounding, of every
token that sees one that is no padding. Any other shares alike among all L in the eager way, here among those
not left out: hidden states at padded positions differ, and a row of nothing but padding.

tanh y = 2σ(2y) - 1, and a softmax does not see what is added to a whole row. So scores may be 2cσ(2sQKᵀ/c),
and σ costs a processor a fifth of tanh or less; but near 0 it loses digits, which only bf16 does not have
anyway. Else tanh y = e / (e + 2) with e = exp(2y) - 1: the same digits in a third of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

QUERIES = 128  # of a block
SCORES = 2**19  # of a block at most, over all its rows and heads, a thread, so that they stay in the cache
MOST = 80.0  # 2y is cut here, where tanh y has long been 1 and exp(2y) is not yet infinite
Block = tuple[slice, slice, slice]  # rows, queries, keys


def is_traced() -> bool:
    """Whether a model is being exported or compiled: then it is transformers' own operations that count."""
    compiled = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    return compiled or torch.jit.is_tracing()  # type: ignore[attr-defined]


def attend(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gemma2Attention's forward: hidden states (B, L, H), cos and sin (1, L, D), mask (B, 1, L, L), added.

    Returns (B, L, H), and the weights where the eager way had to be taken.
    """
    if not _able(module, hidden_states, attention_mask, past_key_values):
        places = {"position_embeddings": position_embeddings, "past_key_values": past_key_values}
        return type(module).forward(  # type: ignore[no-any-return]
            module, hidden_states, attention_mask=attention_mask, **places, **more
        )
    mask: Any = attention_mask
    layers = module.q_proj, module.k_proj, module.v_proj
    parts = [layer(hidden_states).unflatten(-1, (-1, module.head_dim)) for layer in layers]  # (B, L, ., D)
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else parts[0].dtype
    cos, sin = (angle[..., None, : module.head_dim // 2] for angle in position_embeddings)  # (1, L, 1, D/2)
    with torch.autocast("cpu", enabled=False):  # it would widen the softmax
        found = _Blocks.apply(
            *(part.to(kind) for part in parts),
            cos,
            sin,
            mask.expand(len(hidden_states), -1, -1, -1),
            module.scaling,
            module.attn_logit_softcapping,
            module.sliding_window,
        )
    return module.o_proj(found.flatten(2)), None


def _able(module: Any, hidden_states: Tensor, mask: Tensor | None, cache: Any) -> bool:
    """Whether all queries and keys are here, bounded, without dropout, and on a CPU."""
    length = hidden_states.shape[1]
    if mask is None or mask.shape[-2:] != (length, length) or cache is not None or not module.is_causal:
        return False
    chosen = module.config._attn_implementation == "eager" and module.attn_logit_softcapping is not None
    dropout = module.training and module.attention_dropout
    return chosen and not dropout and hidden_states.device.type == "cpu" and not is_traced()


class _Blocks(torch.autograd.Function):
    """query (B, L, H, D), key and value (B, L, G, D) as they are projected, G dividing H -> (B, L, H, D)

    Heads that share a key are rows of one product: H = G h, and a block's scores are (b G, h q, k).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        scaling: float,
        softcap: float,
        window: int | None,
    ) -> Tensor:
        groups, kept, learns = key.shape[2], [], any(ctx.needs_input_grad)
        kind = torch.promote_types(query.dtype, torch.float32)
        queries = _by_group(turned(query, cos, sin), groups).contiguous()  # (B, G, h, L, D)
        keys = turned(key, cos, sin).transpose(1, 2).contiguous()  # (B, G, L, D)
        values = value.transpose(1, 2).contiguous()
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        outs, (bound, _, n) = _by_group(out, groups), _bound(query)
        batch, length, heads, _ = query.shape
        for rows, asked, seen in _blocks(batch, length, heads, window):
            asking = queries[rows, :, :, asked]  # (b, G, h, q, D)
            scores = _rows(asking) @ _rows(keys[rows, :, seen]).transpose(1, 2)  # (b G, h q, k)
            wide = bound(scores.to(kind).mul_(2 * scaling / softcap))
            hidden = mask[rows, :, asked, seen].to(kind)  # (b, 1, q, k)
            by_head = wide.view(len(hidden), -1, *hidden.shape[2:])  # (b, H, q, k)
            place = None if learns else by_head
            masked = torch.add(hidden, by_head, alpha=n * softcap, out=place).view(wide.shape)
            shares = torch.softmax(masked, -1, out=masked).to(value.dtype)
            if learns:
                kept.append(wide.to(value.dtype))
            outs[rows, :, :, asked] = (shares @ _rows(values[rows, :, seen])).view(asking.shape)
            if learns:
                kept.append(shares)
        ctx.save_for_backward(queries, keys, values, cos, sin, *kept)
        ctx.scaling, ctx.window = n**2 * scaling, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        queries, keys, values, cos, sin, *kept = ctx.saved_tensors
        batch, groups, many, length, _ = queries.shape
        slope = _bound(queries)[1]
        given, grad_query = _by_group(grads[0], groups), torch.empty_like(queries)
        # sums over blocks, in float32
        kind = torch.promote_types(keys.dtype, torch.float32)
        grad_key, grad_value = (torch.zeros_like(one, dtype=kind) for one in (keys, values))
        for i, (rows, asked, seen) in enumerate(_blocks(batch, length, groups * many, ctx.window)):
            bounded, shares = kept[2 * i : 2 * i + 2]  # (b G, h q, k)
            asking, grad = queries[rows, :, :, asked], _rows(given[rows, :, :, asked])  # (b G, h q, D)
            sums = grad_value[rows, :, seen], grad_key[rows, :, seen]
            sums[0].add_((shares.transpose(1, 2) @ grad).to(kind).view(sums[0].shape))
            grad_shares = grad @ _rows(values[rows, :, seen]).transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            grad_scores = slope(grad_scores, bounded)
            found = (grad_scores @ _rows(keys[rows, :, seen])).mul_(ctx.scaling)
            grad_query[rows, :, :, asked] = found.view(asking.shape)
            sums[1].add_((grad_scores.transpose(1, 2) @ _rows(asking)).to(kind).view(sums[1].shape))
        grad_key = grad_key.mul_(ctx.scaling).to(keys.dtype)
        return (
            turned(grad_query.flatten(1, 2).transpose(1, 2), cos, -sin),
            turned(grad_key.transpose(1, 2), cos, -sin),
            grad_value.to(values.dtype).transpose(1, 2),
            *[None] * 6,
        )


def _bound(x: Tensor) -> Any:
    """The bound, its slope, and n.

    The bound takes 2y and puts σ(2y) or tanh y in its place; n times that, and a constant, is tanh y. The
    slope, of what the bound gave, is by 2y for σ and by y for tanh: by y, n times the bound has n² times it.
    """
    if x.dtype == torch.bfloat16:
        return torch.sigmoid_, torch.ops.aten.sigmoid_backward, 2
    return tanh_of_half_, torch.ops.aten.tanh_backward, 1


def tanh_of_half_(twice: Tensor) -> Tensor:
    """2y becomes tanh y, in place."""
    e = twice.clamp_(max=MOST).expm1_()
    return e.div_(e + 2)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (xᵢ, xᵢ₊D/₂) turned by their position's angle (Su et al. 2021, arXiv 2104.09864).

    (B, L, heads, D); the result lies in memory head by head, as the products want it.
    """
    out = torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    (one, two), (first, second) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(one, cos, out=first).addcmul_(two, sin, value=-1)
    torch.mul(two, cos, out=second).addcmul_(one, sin)
    return out


def _by_group(x: Tensor, groups: int) -> Tensor:
    """A view: (B, L, H, D) -> (B, G, h, L, D)"""
    return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def _rows(x: Tensor) -> Tensor:
    """(b, G, ..., D) -> (b G, ..., D), packed: products read that fastest."""
    return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1]).contiguous()


def _blocks(batch: int, length: int, heads: int, window: int | None) -> Iterator[Block]:
    """Every block of queries with the keys that it may look at: none later, none beyond the window."""
    for begin in range(0, length, QUERIES):
        end = min(begin + QUERIES, length)
        first = max(0, begin - window + 1) if window else 0
        many = max(1, SCORES * torch.get_num_threads() // (heads * (end - begin) * (end - first)))
        for row in range(0, batch, many):
            yield slice(row, row + many), slice(begin, end), slice(first, end)
