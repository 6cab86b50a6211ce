"""A next-token distribution in few words: which, what they weigh, and what a student learns of them.

Two ways to choose k of V words. `topk`: the k largest, and their missing mass as one tail bucket.
`sampled`: words above a threshold as they are, and of the others a sample drawn in proportion to their
probability, each of which then counts as the threshold: every word's expected weight is its probability,
so the student's gradient is unbiased (Sparse Logit Sampling, arXiv 2503.16870, there with independent
draws; with a threshold and systematic draws the weights vary least, Duffield et al. 2007, VarOpt).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmkd.layout import Layout

if TYPE_CHECKING:
    from torch import Generator

BLOCK = 256  # words: a draw finds its block by the blocks' sums, then its word in there


class Sparse(NamedTuple):
    """n tokens' distributions: ids (n, K) int64, weights (n, K), tail (n,): the mass of all other words.

    Where they were sampled there is no tail: the weights stand for all words. Then the first `kept` (n,) of
    a token weigh their own probability; after the drawn ones, words of weight 0 fill the row.
    """

    ids: Tensor
    weights: Tensor
    tail: Tensor | None = None
    kept: Tensor | None = None

    def rows(self, rows: slice) -> Sparse:
        return Sparse(*(None if field is None else field[rows] for field in self))  # type: ignore[arg-type]


def choose(logits: Tensor, layout: Layout, random: Generator | None = None) -> Sparse:
    """The k words of each token that the layout keeps. Teacher's logits (n, vocab) -> Sparse."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = (wide / layout.temperature).softmax(-1)  # (n, vocab)
    top, ids = p.topk(layout.k, dim=-1)  # (n, K), descending
    if layout.how == "topk":
        tail = p.scatter(-1, ids, 0).sum(-1)  # 1 - top.sum(-1) would lose a small tail to rounding
        return Sparse(ids, top, tail)
    return _sample(p, top, ids, layout.words, random)


def _sample(p: Tensor, top: Tensor, ids: Tensor, words: list[int], random: Generator | None) -> Sparse:
    """The m largest as they are and words[m] - m of the rest, by systematic draws at equal distances.

    m is the smallest with p_(m+1) <= tau = (mass of the rest) / (number of draws): each word of the rest is
    drawn with probability p / tau, at most 1, and then weighs tau.
    """
    n, k = top.shape
    counts = torch.tensor(words, device=p.device)  # (k,)
    wide = top.double()
    whole = p.sum(-1, keepdim=True, dtype=torch.float64)
    mass = (whole - wide.cumsum(-1) + wide).clamp(min=0)  # (n, k): rest at m
    tau = mass / (counts - torch.arange(k, device=p.device))
    fits = wide <= tau * (1 + 1e-9)
    fits[:, -1] = True
    m = fits.int().argmax(-1, keepdim=True)  # (n, 1)
    tau, count = tau.gather(-1, m), counts[m]  # (n, 1)
    slots = torch.arange(max(words), device=p.device)  # (K,)
    kept = slots < m  # (n, K)
    rest = pad(p, (0, -p.shape[-1] % BLOCK)).scatter_(-1, ids, top.masked_fill(kept[:, :k], 0))
    start = torch.rand(n, 1, generator=random, device=p.device, dtype=torch.float64)
    drawn = _reached(rest, (start + slots - m).clamp(min=0) / (count - m)).clamp(max=p.shape[-1] - 1)
    room = (0, len(slots) - k)
    own, places_of = pad(wide, room), pad(ids, room)  # (n, K)
    weights = torch.where(kept, own, tau * (slots < count)).to(p.dtype)
    return Sparse(torch.where(kept, places_of, drawn), weights, kept=m[:, 0])


def _reached(mass: Tensor, shares: Tensor) -> Tensor:
    """At which word each share of a row's whole mass is passed, summed up in float64.

    mass (n, a multiple of BLOCK), shares (n, K) -> (n, K) int64
    """
    blocks = mass.unflatten(-1, (-1, BLOCK))  # (n, B, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (n, B)
    places = shares * ends[:, -1:]
    block = torch.searchsorted(ends, places, right=True).clamp(max=blocks.shape[1] - 1)  # (n, K)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).cumsum(-1, dtype=torch.float64)
    left = (places - pad(ends, (1, 0)).gather(-1, block))[..., None]
    word = torch.searchsorted(inside, left, right=True)[..., 0].clamp(max=BLOCK - 1)
    return block * BLOCK + word


def joined(parts: Sequence[Sparse]) -> Sparse:
    """Several tokens' distributions one after the other."""
    columns = [[part[i] for part in parts] for i in range(len(Sparse._fields))]
    return Sparse(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def sparse_kl(logits: Tensor, sparse: Sparse, temperature: float = 1.0) -> Tensor:
    """T² times: over the kept words and the tail bucket, KL(p || q); of a sample, -Σ w log q.

    The latter's expectation is the cross-entropy: KL but for the teacher's entropy, which no student
    moves. With k = vocab the former is `losses.kl`. Student's logits (n, vocab) -> (n,)
    A training computes it without whole logits (`llmkd.closed_form`).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # (n, V)
    weights = sparse.weights.to(wide.dtype)  # (n, K)
    found = -(weights * wide.log_softmax(-1).gather(-1, sparse.ids)).sum(-1)
    if sparse.tail is not None:
        found = found + torch.xlogy(weights, weights).sum(-1)
        if sparse.ids.shape[-1] < wide.shape[-1]:
            others = wide.scatter(-1, sparse.ids, -math.inf).logsumexp(-1)
            log_tail = others - wide.logsumexp(-1)  # 1 - what the kept have would lose a small tail
            found = found + torch.xlogy(sparse.tail, sparse.tail) - sparse.tail * log_tail
    return temperature**2 * found
