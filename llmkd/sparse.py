"""A teacher's next-token distribution in few bytes: chosen, packed, and what a student learns from it.

Two ways to choose k of V words. `topk`: the k largest, and their missing mass as one tail bucket.
`sampled`: words above a threshold as they are, and of the others a sample drawn in proportion to their
probability, each of which then counts as the threshold: every word's expected weight is its probability,
so the student's gradient is unbiased (Sparse Logit Sampling, arXiv 2503.16870, there with independent
draws; with a threshold and systematic draws the weights vary least, Duffield et al. 2007, VarOpt).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkd.errors import ConfigError
from llmkd.losses import LOSSES

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from llmkd.objective import Objective

SPAN = 16.0  # nats that a coded probability spans: from 1 down to 1.1e-7, and 0
BITS = (8, 16, 32)  # of a probability: a code of its logarithm, or float32 as it is


class Sparse(NamedTuple):
    """n tokens' distributions: ids (n, K) int64, weights (n, K), tail (n,): the mass of all other words.

    Where they were sampled there is no tail: the weights stand for all words.
    """

    ids: Tensor
    weights: Tensor
    tail: Tensor | None

    def rows(self, rows: slice) -> Sparse:
        return Sparse(self.ids[rows], self.weights[rows], None if self.tail is None else self.tail[rows])


@dataclass(frozen=True)
class Layout:
    """How a token's distribution lies in bytes. how: "topk" or "sampled"; k words of a vocabulary of
    `vocab`; bits of a probability: 8, 16 or 32; taken at `temperature`.

    Raises ConfigError where k is beyond the vocabulary, or a value is none of these.
    """

    how: str
    k: int
    vocab: int
    bits: int = 8
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.how not in ("topk", "sampled"):
            raise ConfigError(f"cache: how = {self.how!r}; known are topk and sampled")
        if not 1 <= self.k <= self.vocab:
            raise ConfigError(f"cache: k = {self.k} of a vocabulary of {self.vocab}; take k from 1 to that")
        if self.bits not in BITS:
            raise ConfigError(f"cache: bits = {self.bits}; known are 8, 16 and 32")

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocab - 1).bit_length())

    @property
    def tail_bits(self) -> int:
        return max(16, self.bits) if self.how == "topk" else 0

    @property
    def token_bytes(self) -> int:
        """62 for topk with k = 19, 63 for sampled with k = 20, at 128,256 words and 8 bits."""
        return -(-(self.tail_bits + self.k * (self.id_bits + self.bits)) // 8)


def choose(logits: Tensor, layout: Layout, random: Generator | None = None) -> Sparse:
    """The k words of each token that the layout keeps. Teacher's logits (n, vocab) -> Sparse."""
    import torch

    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = (wide / layout.temperature).softmax(-1)  # (n, vocab)
    top, ids = p.topk(layout.k, dim=-1)  # (n, K), descending
    if layout.how == "topk":
        tail = p.scatter(-1, ids, 0).sum(-1)  # 1 - top.sum(-1) would lose a small tail to rounding
        return Sparse(ids, top, tail)
    return _sample(p, top, ids, random)


def _sample(p: Tensor, top: Tensor, ids: Tensor, random: Generator | None) -> Sparse:
    """The m largest as they are and k - m of the rest, by systematic draws at equal distances.

    m is the smallest with p_(m+1) <= tau = (mass of the rest) / (k - m): each word of the rest is drawn
    with probability p / tau, at most 1, and then weighs tau.
    """
    import torch

    n, k = top.shape
    slots = torch.arange(k, device=p.device)
    wide = top.double()
    mass = (p.double().sum(-1, keepdim=True) - wide.cumsum(-1) + wide).clamp(min=0)  # (n, K): rest at m
    tau = mass / (k - slots)
    fits = wide <= tau * (1 + 1e-9)
    fits[:, -1] = True
    m = fits.int().argmax(-1, keepdim=True)  # (n, 1)
    tau = tau.gather(-1, m)  # (n, 1)
    kept = slots < m  # (n, K)
    rest = p.double().scatter(-1, ids, wide.masked_fill(kept, 0))  # (n, V)
    total = rest.cumsum(-1)
    start = torch.rand(n, 1, generator=random, device=p.device, dtype=torch.float64)
    places = (start + slots - m).clamp(min=0) / (k - m) * total[:, -1:]  # (n, K)
    drawn = torch.searchsorted(total, places, right=True).clamp(max=p.shape[-1] - 1)
    weights = torch.where(kept, wide, tau.expand(-1, k)).to(p.dtype)
    return Sparse(torch.where(kept, ids, drawn), weights, None)


def sparse_kl(logits: Tensor, sparse: Sparse, temperature: float = 1.0) -> Tensor:
    """T² times: over the kept words and the tail bucket, KL(p || q); of a sample, -Σ w log q.

    The latter's expectation is the cross-entropy: KL but for the teacher's entropy, which no student
    moves. With k = vocab the former is `losses.kl`. Student's logits (n, vocab) -> (n,)
    """
    import torch

    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    weights = sparse.weights.to(wide.dtype)
    whole = wide.logsumexp(-1, keepdim=True)  # (n, 1)
    log_q = wide.gather(-1, sparse.ids) - whole  # (n, K)
    if sparse.tail is None:
        return -(temperature**2) * (weights * log_q).sum(-1)
    divergence = (torch.xlogy(weights, weights) - weights * log_q).sum(-1)
    if sparse.ids.shape[-1] < wide.shape[-1]:
        tail = sparse.tail.to(wide.dtype)
        others = wide.scatter(-1, sparse.ids, -math.inf).logsumexp(-1) - whole[:, 0]  # log q of the tail
        divergence = divergence + torch.xlogy(tail, tail) - tail * others
    return temperature**2 * divergence


def sparse_objective(
    objective: Objective, logits: Tensor, targets: Tensor, teachers: list[Sparse]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`Objective` where all teachers come from a cache: terms ce and kl, the teachers' own weights."""
    parts = {}
    loss = logits.new_zeros(())
    if "ce" in objective.terms:
        parts["ce"] = LOSSES["ce"](logits, targets)
        loss = loss + objective.terms["ce"] * parts["ce"]
    named = zip(objective.teachers, objective.teacher_weights, objective.temperatures, teachers, strict=True)
    for name, weight, temperature, teacher in named:
        parts[f"kl/{name}"] = sparse_kl(logits, teacher, temperature)
        loss = loss + objective.terms["kl"] * weight * parts[f"kl/{name}"]
    return loss / objective.total, parts


def pack(sparse: Sparse, layout: Layout, random: np.random.Generator) -> NDArray[np.uint8]:
    """n distributions as (n, token_bytes) bytes: the tail, k ids, k probabilities, lowest bits first.

    Sampled probabilities are rounded up or down at random so that their mean stays; others to the nearest.
    """
    weights = sparse.weights.double().cpu().numpy()
    fair = random.random(weights.shape) if layout.how == "sampled" else np.full(weights.shape, 0.5)
    fields = [
        _to_bits(sparse.ids.cpu().numpy(), layout.id_bits),
        _to_bits(encode(weights, layout.bits, fair), layout.bits),
    ]
    if sparse.tail is not None:
        tail = sparse.tail.double().cpu().numpy()[:, None]
        code = encode(tail, layout.tail_bits, np.full(tail.shape, 0.5))
        fields.insert(0, _to_bits(code, layout.tail_bits))
    return np.packbits(np.concatenate(fields, axis=1), axis=1, bitorder="little")


def unpack(packed: NDArray[np.uint8], layout: Layout) -> Sparse:
    """What `pack` packed; weights of a tail bucket's kept words are brought to 1 - tail in sum."""
    import torch

    bits = np.unpackbits(packed, axis=1, bitorder="little")
    tail_end, ids_end = layout.tail_bits, layout.tail_bits + layout.k * layout.id_bits
    ids = _from_bits(bits[:, tail_end:ids_end], layout.id_bits)  # (n, K)
    codes = _from_bits(bits[:, ids_end : ids_end + layout.k * layout.bits], layout.bits)
    weights = decode(codes, layout.bits)  # (n, K)
    tail = None
    if layout.how == "topk":
        mass = decode(_from_bits(bits[:, :tail_end], layout.tail_bits), layout.tail_bits)  # (n, 1)
        weights *= (1 - mass) / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
        tail = torch.from_numpy(mass[:, 0].astype(np.float32))
    return Sparse(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(weights.astype(np.float32)), tail)


def encode(p: NDArray[np.float64], bits: int, fair: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Codes of probabilities: 0 is 0, 1 to 2^bits - 1 are equally spaced in log p over SPAN nats.

    Of its two neighbours a probability takes the upper one with its share of the gap between them, if
    `fair` is uniform on [0, 1); with 0.5 it takes the nearer one.
    """
    if bits == 32:
        return np.ascontiguousarray(p, dtype=np.float32).view(np.uint32)
    top = 2**bits - 1
    with np.errstate(divide="ignore"):
        place = top + np.log(p) * ((top - 1) / SPAN)
    below = np.clip(np.floor(place), 0, top - 1).astype(np.uint32)
    low, high = decode(below, bits), decode(below + 1, bits)
    share = (p - low) / (high - low)
    return below + (share > fair).astype(np.uint32)


def decode(codes: NDArray[np.uint32], bits: int) -> NDArray[np.float64]:
    if bits == 32:
        return codes.view(np.float32).astype(np.float64)
    top = 2**bits - 1
    return np.where(codes == 0, 0.0, np.exp((codes.astype(np.float64) - top) * (SPAN / (top - 1))))


def _to_bits(values: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """(n, k) -> (n, k · bits), lowest bit first."""
    places = np.arange(bits, dtype=np.uint32)
    found = (values.astype(np.uint32)[..., None] >> places) & np.uint32(1)
    return found.astype(np.uint8).reshape(len(values), -1)


def _from_bits(bits: NDArray[np.uint8], width: int) -> NDArray[np.uint32]:
    """(n, k · width) -> (n, k)"""
    powers = np.uint32(1) << np.arange(width, dtype=np.uint32)
    grouped = bits.reshape(len(bits), bits.shape[1] // width, width)
    return (grouped * powers).sum(-1, dtype=np.uint32)
