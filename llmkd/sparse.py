"""A teacher's next-token distribution in few bytes: chosen, packed, and what a student learns from it.

Two ways to choose k of V words. `topk`: the k largest, and their missing mass as one tail bucket.
`sampled`: words above a threshold as they are, and of the others a sample drawn in proportion to their
probability, each of which then counts as the threshold: every word's expected weight is its probability,
so the student's gradient is unbiased (Sparse Logit Sampling, arXiv 2503.16870, there with independent
draws; with a threshold and systematic draws the weights vary least, Duffield et al. 2007, VarOpt).

Drawn words share one weight, so that the flatter a distribution, the more of its words fit into a token's
bytes. Sampled ids lie sorted in Elias and Fano's code (Elias 1974, J. ACM 21), which takes about
2 + log2(V / k) bits each instead of log2(V).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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

    Where they were sampled there is no tail: the weights stand for all words. Then the first `kept` (n,) of
    a token weigh their own probability; after the drawn ones, words of weight 0 fill the row.
    """

    ids: Tensor
    weights: Tensor
    tail: Tensor | None = None
    kept: Tensor | None = None

    def rows(self, rows: slice) -> Sparse:
        return Sparse(*(None if field is None else field[rows] for field in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Layout:
    """How a token's distribution lies in bytes. how: "topk", k words of a vocabulary of `vocab`, or
    "sampled", at least k; bits of a probability: 8, 16 or 32; taken at `temperature`.

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
        """62 for topk with k = 19, 63 for sampled with k = 21, at 128,256 words and 8 bits."""
        most = self._sampled_bits(self.k, self.k - 1)
        bits = self.tail_bits + self.k * (self.id_bits + self.bits) if self.how == "topk" else most
        return -(-bits // 8)

    @property
    def kept_bits(self) -> int:
        """Of the number of words that a sample keeps as they are, 0 to k - 1."""
        return (self.k - 1).bit_length()

    @cached_property
    def words(self) -> list[int]:
        """By the number that is kept: as many words of a sample as fit; 32 down to 21 at 128,256 words.

        Where all but one are kept that one stands for the whole rest, so that none is ever drawn twice.
        """
        found = []
        for kept in range(self.k - 1):
            count = self.k
            while count < self.vocab and self._sampled_bits(count + 1, kept) <= 8 * self.token_bytes:
                count += 1
            found.append(count)
        return [*found, self.k]

    def _sampled_bits(self, count: int, kept: int) -> int:
        """Number kept, the drawn words' weight, ids, whether each was kept, the kept ones' weights."""
        return self.kept_bits + self.bits + sum(self.id_parts(count)) + count + kept * self.bits

    def id_parts(self, count: int) -> tuple[int, int]:
        """Bits of `count` sorted ids: their lower parts', and the marks of their upper ones."""
        low = max(0, (self.vocab // count).bit_length() - 1)
        return count * low, count + ((self.vocab - 1) >> low) + 1


def choose(logits: Tensor, layout: Layout, random: Generator | None = None) -> Sparse:
    """The k words of each token that the layout keeps. Teacher's logits (n, vocab) -> Sparse."""
    import torch

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
    import torch
    from torch.nn.functional import pad

    n, k = top.shape
    counts = torch.tensor(words, device=p.device)  # (k,)
    wide = top.double()
    mass = (p.double().sum(-1, keepdim=True) - wide.cumsum(-1) + wide).clamp(min=0)  # (n, k): rest at m
    tau = mass / (counts - torch.arange(k, device=p.device))
    fits = wide <= tau * (1 + 1e-9)
    fits[:, -1] = True
    m = fits.int().argmax(-1, keepdim=True)  # (n, 1)
    tau, count = tau.gather(-1, m), counts[m]  # (n, 1)
    slots = torch.arange(max(words), device=p.device)  # (K,)
    kept = slots < m  # (n, K)
    rest = p.double().scatter(-1, ids, wide.masked_fill(kept[:, :k], 0))  # (n, V)
    total = rest.cumsum(-1)
    start = torch.rand(n, 1, generator=random, device=p.device, dtype=torch.float64)
    places = (start + slots - m).clamp(min=0) / (count - m) * total[:, -1:]  # (n, K)
    drawn = torch.searchsorted(total, places, right=True).clamp(max=p.shape[-1] - 1)
    room = (0, len(slots) - k)
    own, places_of = pad(wide, room), pad(ids, room)  # (n, K)
    weights = torch.where(kept, own, tau * (slots < count)).to(p.dtype)
    return Sparse(torch.where(kept, places_of, drawn), weights, kept=m[:, 0])


def joined(parts: Sequence[Sparse]) -> Sparse:
    """Several tokens' distributions one after the other."""
    import torch

    columns = [[part[i] for part in parts] for i in range(len(Sparse._fields))]
    return Sparse(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


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
    """n distributions as (n, token_bytes) bytes, lowest bits first.

    topk: the tail, k ids, k probabilities to the nearest code. sampled: how many are kept, the drawn words'
    weight, all ids in order, which of them are kept, and those ones' probabilities; codes are rounded up or
    down at random so that their mean stays.
    """
    ids, weights = sparse.ids.cpu().numpy(), sparse.weights.double().cpu().numpy()
    if sparse.tail is None:
        return _pack_sampled(ids, weights, sparse.kept.cpu().numpy(), layout, random)  # type: ignore[union-attr]
    tail = sparse.tail.double().cpu().numpy()[:, None]
    fields = [
        _to_bits(encode(tail, layout.tail_bits, np.full(tail.shape, 0.5)), layout.tail_bits),
        _to_bits(ids, layout.id_bits),
        _to_bits(encode(weights, layout.bits, np.full(weights.shape, 0.5)), layout.bits),
    ]
    return np.packbits(np.concatenate(fields, axis=1), axis=1, bitorder="little")


def _pack_sampled(
    ids: NDArray[np.int64],
    weights: NDArray[np.float64],
    kept: NDArray[np.int64],
    layout: Layout,
    random: np.random.Generator,
) -> NDArray[np.uint8]:
    codes = encode(weights, layout.bits, random.random(weights.shape))
    bits = np.zeros((len(ids), 8 * layout.token_bytes), dtype=np.uint8)
    for m in np.unique(kept).tolist():
        rows, count = np.flatnonzero(kept == m), layout.words[m]
        low_bits, mark_bits = layout.id_parts(count)
        low = low_bits // count
        order = np.argsort(ids[rows, :count], axis=1, kind="stable")  # (r, count)
        found = np.take_along_axis(ids[rows, :count], order, axis=1)
        marks = np.zeros((len(rows), mark_bits), dtype=np.uint8)
        np.put_along_axis(marks, (found >> low) + np.arange(count), 1, axis=1)
        own = order < m  # (r, count)
        fields = [
            _to_bits(np.full((len(rows), 1), m), layout.kept_bits),
            _to_bits(codes[rows, m : m + 1], layout.bits),
            _to_bits(found & ((1 << low) - 1), low),
            marks,
            own.astype(np.uint8),
            _to_bits(np.take_along_axis(codes[rows], order, axis=1)[own].reshape(len(rows), m), layout.bits),
        ]
        whole = np.concatenate(fields, axis=1)
        bits[rows, : whole.shape[1]] = whole
    return np.packbits(bits, axis=1, bitorder="little")


def unpack(packed: NDArray[np.uint8], layout: Layout) -> Sparse:
    """What `pack` packed; weights of a tail bucket's kept words are brought to 1 - tail in sum."""
    import torch

    bits = np.unpackbits(packed, axis=1, bitorder="little")
    if layout.how == "sampled":
        ids, weights = _unpack_sampled(bits, layout)  # (n, K)
        return Sparse(torch.from_numpy(ids), torch.from_numpy(weights.astype(np.float32)))
    tail_end, ids_end = layout.tail_bits, layout.tail_bits + layout.k * layout.id_bits
    ids = _from_bits(bits[:, tail_end:ids_end], layout.id_bits).astype(np.int64)  # (n, K)
    codes = _from_bits(bits[:, ids_end : ids_end + layout.k * layout.bits], layout.bits)
    mass = decode(_from_bits(bits[:, :tail_end], layout.tail_bits), layout.tail_bits)  # (n, 1)
    weights = decode(codes, layout.bits)  # (n, K)
    weights *= (1 - mass) / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    tail = torch.from_numpy(mass[:, 0].astype(np.float32))
    return Sparse(torch.from_numpy(ids), torch.from_numpy(weights.astype(np.float32)), tail)


def _unpack_sampled(bits: NDArray[np.uint8], layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    ids = np.zeros((len(bits), max(layout.words)), dtype=np.int64)
    weights = np.zeros(ids.shape)
    kept = _from_bits(bits[:, : layout.kept_bits], layout.kept_bits)[:, 0] if layout.k > 1 else ids[:, 0]
    for m in np.unique(kept).tolist():
        rows, count = np.flatnonzero(kept == m), layout.words[m]
        low_bits, mark_bits = layout.id_parts(count)
        sizes = [layout.kept_bits, layout.bits, low_bits, mark_bits, count, m * layout.bits]
        _, drawn, lower, marks, own, codes = np.split(bits[rows, : sum(sizes)], np.cumsum(sizes)[:-1], axis=1)
        upper = np.nonzero(marks)[1].reshape(len(rows), count) - np.arange(count)
        low = low_bits // count
        ids[rows, :count] = (upper << low) + (_from_bits(lower, low) if low else 0)
        weight = np.repeat(decode(_from_bits(drawn, layout.bits), layout.bits), count, axis=1)  # (r, count)
        weight[own.astype(bool)] = decode(_from_bits(codes, layout.bits), layout.bits).ravel()
        weights[rows, :count] = weight
    return ids, weights


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
