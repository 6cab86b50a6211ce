"""Chosen words and their weights in bits, and back.

Drawn words share one weight, so that the flatter a distribution, the more of its words fit into a token's
bytes. Sampled ids lie sorted in Elias and Fano's code (Elias 1974, J. ACM 21), which takes about
2 + log2(V / k) bits each instead of log2(V).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmkd.layout import Layout
from llmkd.sparse import Sparse

SPAN = 16.0  # nats that a coded probability spans: from 1 down to 1.1e-7, and 0


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
