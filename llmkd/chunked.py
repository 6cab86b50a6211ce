"""The loss of a language model without its logits: nothing of size tokens × vocabulary ever exists.

A chunk of tokens goes from hidden states to logits, to losses and to the gradient of its logits, student
and teachers alike, and from there at once to the gradients of the hidden states and of the head's weight.
So backward has nothing to compute again, and a pass costs the same matrix products as the plain way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkd.closed_form import Room, Teacher, closed_form, room
from llmkd.errors import ModelError
from llmkd.models.head import Head
from llmkd.objective import Objective
from llmkd.sparse import Sparse

CHUNK = 128  # tokens: enough for a matrix product at full speed, 66 MB of bf16 logits at 256,000 words
FEW = 2**22  # logits of a chunk where words are few, so that it holds more tokens
TALL = 2**22  # numbers of a sum's part that a CPU makes at once where it is rounded first; a GPU: 16 x

Found = tuple[Tensor, dict[str, Tensor], Any]  # losses (n,), parts, d losses / d raw logits (n, V) or None


def chunked_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    objective: Objective,
    teachers: Sequence[Teacher] = (),
    *,
    weights: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (N,) of each token and its unweighted parts {name: (N,)}, as `objective` defines them.

    hidden (N, H): the student's, at the positions that predict a target; targets (N,) int64.
    teachers: in the objective's order; all online, or all from a cache (terms ce and kl, fixed weights).
    weights (N,): the tokens' shares of the final loss, up to one factor; all alike by default. They only
    save time: where the loss turns out to weigh them otherwise, the head's gradient is computed anew
    (under ZeRO-3, which by then has cut the heads up again, that is refused with a ModelError).
    chunk: tokens at a time, by default `tokens_at_once`.
    Gradients flow to `hidden` and to the head's weight where they require it, to teachers never.
    Raises ModelError where vocabularies differ.
    """
    _check_vocabularies(
        head, targets, [teacher[1] for teacher in teachers if not isinstance(teacher, Sparse)]
    )
    if not len(targets):
        return hidden.sum(-1), {}
    if weights is None:
        weights = torch.ones(len(targets), device=hidden.device)
    head = head.to(hidden.dtype)  # one copy a call, not one a chunk
    teachers = [t if isinstance(t, Sparse) else (t[0], t[1].to(t[0].dtype)) for t in teachers]
    names: list[str] = []
    grows = torch.is_grad_enabled()
    more = (head, targets, objective, teachers, weights, chunk or tokens_at_once(head.size), names, grows)
    found = _Chunked.apply(hidden, head.weight, *more)
    return found[0], dict(zip(names, found[1:], strict=True))


def tokens_at_once(words: int) -> int:
    """Enough for a matrix product at full speed, and no more than their logits' memory is worth."""
    return max(CHUNK, FEW // words)


def _check_vocabularies(head: Head, targets: Tensor, teachers: Sequence[Head]) -> None:
    for teacher in teachers:
        if teacher.size != head.size:
            raise ModelError(
                f"the student's head has {head.size} words, a teacher's {teacher.size}; name teachers that "
                "share its tokenizer, and the real vocabulary where the rest is padding"
            )
    if len(targets) and int(targets.max()) >= head.size:
        raise ModelError(f"target {int(targets.max())} is beyond the {head.size} words; check the tokenizer")


class _Chunked(torch.autograd.Function):
    """Losses and parts, (N,) each; gradients are made in forward, and scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *more: Any) -> tuple[Tensor, ...]:
        head, targets, objective, teachers, weights, chunk, names, grows = more
        of_hidden, of_weight = (grows and need for need in ctx.needs_input_grad[:2])
        ctx.by_hidden = torch.empty_like(hidden) if of_hidden else None  # (N, H)
        ctx.by_weight = _zeros(weight) if of_weight else None  # (V, H)
        kept, shared = [], room(hidden, head, objective, teachers, chunk)
        for rows in _chunks(len(hidden), chunk):
            found = _chunk(hidden[rows], head, targets[rows], objective, _cut(teachers, rows), grows, shared)
            losses, parts, grad = found
            names[:] = list(parts)
            kept.append((losses, *parts.values()))
            if of_hidden:
                ctx.by_hidden[rows] = grad @ weight[: head.size]
            if of_weight:
                _add(ctx.by_weight, grad.mul_(weights[rows, None]), hidden[rows])
            del found, grad
        joined = tuple(torch.cat(column) for column in zip(*kept, strict=True))
        ctx.mark_non_differentiable(*joined[1:])
        ctx.save_for_backward(hidden, weight, weights)
        ctx.more = (head, targets, objective, teachers, chunk)
        return joined

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        """A token's row of a gradient is its own loss's, so what comes from above only scales it."""
        above = upstream[0]  # (N,)
        by_hidden = None
        if ctx.by_hidden is not None:
            by_hidden = ctx.by_hidden * above[:, None].to(ctx.by_hidden.dtype)
        by_weight = _head_gradient(ctx, above) if ctx.needs_input_grad[1] else None
        return by_hidden, by_weight, *[None] * 8


def _head_gradient(ctx: Any, above: Tensor) -> Tensor:
    """The sum over tokens made in forward, once scaled; made anew where the weights were not as promised."""
    hidden, weight, promised = ctx.saved_tensors
    made, ctx.by_weight = ctx.by_weight, None  # scaled in place: a second backward is refused below
    if made is None:
        raise RuntimeError("a second backward through chunked_loss; call it again")
    promised = promised.to(above.dtype)
    wide = promised.double()  # a sum over thousands of tokens, held against one of them
    factor = ((above.double() @ wide) / (wide @ wide)).to(above.dtype)
    if torch.allclose(above, factor * promised, rtol=1e-6, atol=0):
        return made.mul_(factor).to(weight.dtype)  # type: ignore[no-any-return]
    head, targets, objective, teachers, chunk = ctx.more
    others = [teacher[1] for teacher in teachers if not isinstance(teacher, Sparse)]
    if any(len(one.weight) < one.size for one in (head, *others)):
        raise ModelError("tokens weigh otherwise than promised, and ZeRO-3 has cut the heads up by now")
    made.zero_()
    shared = room(hidden, head, objective, teachers, chunk)
    for rows in _chunks(len(hidden), chunk):
        found = _chunk(hidden[rows], head, targets[rows], objective, _cut(teachers, rows), True, shared)
        _add(made, found[2].mul_(above[rows, None]), hidden[rows])
    return made.to(weight.dtype)  # type: ignore[no-any-return]


def _chunk(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    objective: Objective,
    teachers: list[Teacher],
    grows: bool,
    shared: Room | None,
) -> Found:
    if shared:
        found = closed_form(hidden, head, targets, objective, teachers, shared)
        return found[0], found[1], found[2] if grows else None
    raw = head.raw(hidden)  # (n, V)
    with torch.set_grad_enabled(grows):
        raw.requires_grad_(grows)
        losses, parts = objective(head.cap(raw), targets, _stacked(teachers))
        grad = torch.autograd.grad(losses.sum(), raw)[0] if grows else None
    return losses.detach(), {name: part.detach() for name, part in parts.items()}, grad


def _stacked(teachers: list[Teacher]) -> Tensor | None:
    """Logits (n, T, V); one teacher's without a copy."""
    logits = [head.logits(hidden) for hidden, head in teachers]  # type: ignore[misc]
    if len(logits) < 2:
        return logits[0][:, None] if logits else None
    return torch.stack(logits, 1)


def _chunks(count: int, chunk: int) -> list[slice]:
    return [slice(begin, min(begin + chunk, count)) for begin in range(0, count, chunk)]


def _cut(teachers: Sequence[Teacher], rows: slice) -> list[Teacher]:
    return [
        teacher.rows(rows) if isinstance(teacher, Sparse) else (teacher[0][rows], teacher[1])
        for teacher in teachers
    ]


def _zeros(weight: Tensor) -> Tensor:
    """Sums over many chunks are kept in float32 at least."""
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _add(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total (V, H) += gradᵀ (size, n) · hidden (n, H), in place; rows that pad the vocabulary stay."""
    if grad.dtype == total.dtype:
        total[: grad.shape[1]].addmm_(grad.T, hidden)
        return
    numbers = TALL * (16 if total.is_cuda else 1)
    for words in _chunks(grad.shape[1], max(1, numbers // total.shape[1])):
        total[words] += grad.T[words] @ hidden
