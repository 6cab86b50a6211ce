"""ce and kl of a few tokens over the whole vocabulary, and their gradient by its formula.

Autograd's own way takes several times as many passes over tokens × vocabulary, each over fresh memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkd.models.head import Head
from llmkd.objective import Objective
from llmkd.sparse import Sparse

WIDE = 2**20  # numbers of a CPU's passes over logits: a few tokens' words, which stay in its cache (GPU: 4 x)

Teacher = tuple[Tensor, Head] | Sparse  # hidden states (N, H_t) and what makes logits of them, or a cache's


@dataclass(frozen=True)
class Room:
    """Memory that all chunks share: fresh pages for every step would cost a CPU as much as the arithmetic."""

    raw: list[Tensor]  # (chunk, V) each, in the dtype to compute in: the student's logits, each teacher's
    passes: list[Tensor]  # four of (b, V), float32 at least


def room(
    hidden: Tensor, head: Head, objective: Objective, teachers: Sequence[Teacher], chunk: int
) -> Room | None:
    """Where the closed form serves; else None. A cache serves nothing else."""
    if not set(objective.terms) <= {"ce", "kl"} or objective.weighting != "fixed":
        assert not any(isinstance(teacher, Sparse) for teacher in teachers)
        return None
    rows, words = min(chunk, len(hidden)), head.size
    heard = [one[0] for one in teachers if not isinstance(one, Sparse)] if "kl" in objective.terms else []
    raw = [states.new_empty(rows, words) for states in (hidden, *heard)]
    few = min(rows, max(1, (4 if hidden.is_cuda else 1) * WIDE // words))  # a GPU waits to be told
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return Room(raw, [hidden.new_empty(few, words, dtype=wide) for _ in range(4)])


def closed_form(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    objective: Objective,
    teachers: Sequence[Teacher],
    room: Room,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Losses (n,) and parts of n tokens, and the gradient (n, V) of the student's raw logits, which stands
    where they were."""
    models = [(hidden, head), *(one for one in teachers if not isinstance(one, Sparse))]
    raw = [_product(*one, out) for one, out in zip(models, room.raw, strict=False)]
    caps = [one.softcap for _, one in models]
    found = []
    for begin in range(0, len(hidden), len(room.passes[0])):
        rows = slice(begin, begin + len(room.passes[0]))
        cached = [one.rows(rows) for one in teachers if isinstance(one, Sparse)]
        found.append(_pass([one[rows] for one in raw], caps, cached, targets[rows], objective, room.passes))
    parts = {name: torch.cat([one[1][name] for one in found]) for name in found[0][1]}
    return torch.cat([losses for losses, _ in found]), parts, raw[0]


def _pass(
    raw: list[Tensor],
    caps: Sequence[float | None],
    cached: list[Sparse],
    targets: Tensor,
    objective: Objective,
    room: list[Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses (b,) and parts of a few tokens. raw (b, V): the student's logits, which become the gradient,
    w_ce (softmax(z) - 1[target]) + Σ_i w_i T_i (m_i softmax(z / T_i) - p_i), and the online teachers'.
    m_i is the mass of p_i: 1, but where a cache has drawn its words."""
    z, grad, a, p = (buffer[: len(targets)] for buffer in room)
    _capped(raw[0], caps[0], z)
    hard, soft = objective.terms.get("ce", 0.0), objective.terms.get("kl", 0.0)
    teachers: list[Sparse | Tensor] = [*cached, *raw[1:]] if "kl" in objective.terms else []
    named = zip(objective.teachers, objective.teacher_weights, objective.temperatures, strict=True)
    heard = [(*one, teacher) for one, teacher in zip(named, teachers, strict=False)]
    masses: dict[float, float | Tensor] = {1.0: hard} if "ce" in objective.terms else {}
    for _, weight, t, teacher in heard:
        masses[t] = masses.get(t, 0.0) + soft * weight * t * _mass(teacher, z)
    log_sums = _softmaxes(z, masses, grad, a, p)

    parts: dict[str, Tensor] = {}
    loss = z.new_zeros(len(z))
    if "ce" in objective.terms:
        parts["ce"] = log_sums[1.0] - z.gather(-1, targets[:, None])[:, 0]
        loss += hard * parts["ce"]
        grad.scatter_add_(-1, targets[:, None], grad.new_full((len(z), 1), -hard))
    for i, (name, weight, t, teacher) in enumerate(heard, 1):
        scale, log_sum = soft * weight * t, log_sums[t]
        if isinstance(teacher, Sparse):
            part = _from_cache(z, t, log_sum, teacher, scale, grad, a, p)
        else:
            part = _from_logits(z, t, log_sum, _capped(teacher, caps[i], a), scale, grad, p)
        parts[f"kl/{name}"] = t**2 * part
        loss += soft * weight * parts[f"kl/{name}"]
    if caps[0] is not None:
        grad.mul_(z.div_(caps[0]).square_().neg_().add_(1))
    raw[0].copy_(grad.div_(objective.total))
    return loss / objective.total, parts


def _softmaxes(
    z: Tensor, masses: dict[float, float | Tensor], grad: Tensor, a: Tensor, p: Tensor
) -> dict[float, Tensor]:
    """grad = Σ_T masses[T] softmax(z / T), one softmax a temperature. {T: log Σ exp(z / T)  # (b,)}"""
    if not masses:
        grad.zero_()
    log_sums = {}
    for i, (t, mass) in enumerate(masses.items()):
        told, out = z if t == 1 else torch.div(z, t, out=a), p if i else grad
        torch.softmax(told, -1, out=out)
        log_sums[t] = _log_sum(told, out)
        if isinstance(mass, Tensor) or mass != 1:
            out.mul_(mass)
        if i:
            grad.add_(out)
    return log_sums


def _from_logits(
    z: Tensor, t: float, log_sum: Tensor, a: Tensor, scale: float, grad: Tensor, p: Tensor
) -> Tensor:
    """KL(p || q) (b,) of a teacher's logits a (b, V), which are lost; grad -= scale p."""
    if t != 1:
        a.div_(t)
    torch.softmax(a, -1, out=p)
    log_sum_p = _log_sum(a, p)  # (b,)
    a.sub_(z, alpha=1 / t)
    gap = (p[:, None] @ a[..., None]).flatten()  # Σ p (a - z / T), row by row
    grad.sub_(p, alpha=scale)
    return gap - log_sum_p + log_sum


def _from_cache(
    z: Tensor, t: float, log_sum: Tensor, sparse: Sparse, scale: float, grad: Tensor, a: Tensor, p: Tensor
) -> Tensor:
    """`llmkd.sparse.sparse_kl` / T² (b,); grad -= scale (kept weights, and the tail over the other words)."""
    weights = sparse.weights.to(z.dtype)  # (b, K)
    log_q = z.gather(-1, sparse.ids) / t - log_sum[:, None]
    found = -(weights * log_q).sum(-1)
    grad.scatter_add_(-1, sparse.ids, -scale * weights)
    if sparse.tail is not None:
        found += torch.xlogy(weights, weights).sum(-1)
    tail = _tail(sparse, z.shape[-1])
    if tail is not None:
        torch.softmax(torch.div(z, t, out=a).scatter_(-1, sparse.ids, -math.inf), -1, out=p)  # of sum 1
        found += torch.xlogy(tail, tail) - tail * (_log_sum(a, p) - log_sum)
        grad.sub_(p.mul_(scale * tail[:, None]))
    return found


def _mass(teacher: Sparse | Tensor, z: Tensor) -> float | Tensor:
    """What a teacher's words weigh together; (b, 1) of a cache's."""
    if not isinstance(teacher, Sparse):
        return 1.0
    kept, tail = teacher.weights.to(z.dtype).sum(-1, keepdim=True), _tail(teacher, z.shape[-1])
    return kept if tail is None else kept + tail[:, None]


def _tail(sparse: Sparse, words: int) -> Tensor | None:
    """The mass of the words that were not kept, where there are any."""
    return sparse.tail if sparse.ids.shape[-1] < words else None


def _product(hidden: Tensor, head: Head, out: Tensor) -> Tensor:
    """`head.raw(hidden)`, (n, V), into `out`."""
    return torch.mm(hidden, head.weight[: head.size].T, out=out[: len(hidden)])


def _capped(raw: Tensor, softcap: float | None, out: Tensor) -> Tensor:
    """`Head.cap` of raw logits (b, V) into `out`."""
    out.copy_(raw)
    return out if softcap is None else out.div_(softcap).tanh_().mul_(softcap)


def _log_sum(logits: Tensor, p: Tensor) -> Tensor:
    """log Σ exp(logits), (n,), of logits whose softmax is p."""
    return logits.amax(-1) - p.amax(-1).log()
