"""Rows into the micro-batches that training really cuts, and what they cost in operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmkd.batches import epoch_steps, sorted_batches
from llmkd.dealing import deal
from llmkd.planning.shapes import Shape
from llmkd.planning.way import Micro, Way, adapters

Lengths = NDArray[np.int64]
TRIED = 4096  # rows that are cut into batches; more rows are as many times these


@dataclass(frozen=True)
class Batches:
    """One pass over the rows: padded tokens, the sum over rows of their padded lengths squared, the
    micro-batches that may be the largest, and whether a step has several on a rank."""

    rows: int
    steps: int
    tokens: float
    squares: float
    largest: tuple[Micro, ...]
    accumulated: bool


NONE = Batches(0, 0, 0.0, 0.0, ((1, 1),), False)


def _drawn(lengths: Lengths, count: int) -> Lengths:
    """`count` lengths like these, at most TRIED, the longest among them."""
    drawn = np.random.default_rng(0).choice(lengths, min(count, TRIED))
    drawn[0] = lengths.max()
    return drawn


def _summed(micros: list[Micro], scale: float) -> tuple[float, float, tuple[Micro, ...]]:
    tokens = sum(rows * length for rows, length in micros)
    squares = sum(rows * length**2 for rows, length in micros)
    widest = sorted(set(micros), key=lambda micro: -micro[0] * micro[1])[:8]
    longest = max(micros, key=lambda micro: (micro[1], micro[0]))
    return tokens * scale, squares * scale, (*widest, longest)


def training_batches(
    lengths: Lengths, count: int, batch_rows: int, batch_tokens: int, ranks: int = 1
) -> Batches:
    """An epoch over `count` rows of lengths like `lengths`, cut and dealt as `llmkd.batches` does it."""
    if not count:
        return NONE
    drawn = _drawn(lengths, count)
    steps = epoch_steps(np.arange(len(drawn)), drawn, batch_rows, batch_tokens, 0, 0)
    dealt = [deal(step, drawn, ranks) for step in steps]
    micros = [(len(rows), int(drawn[rows].max())) for step in dealt for part in step for rows, _ in part]
    tokens, squares, largest = _summed(micros, count / len(drawn))
    several = any(len(part) > 1 for step in dealt for part in step)
    return Batches(count, math.ceil(count / batch_rows), tokens, squares, largest, several)


def running_batches(lengths: Lengths, count: int, batch_tokens: int) -> Batches:
    """A pass without gradients over `count` rows, as `llmkd.train.predict` cuts them."""
    if not count:
        return NONE
    drawn = _drawn(lengths, count)
    cut = sorted_batches(np.arange(len(drawn)), drawn, batch_tokens)
    micros = [(len(rows), int(drawn[rows].max())) for rows in cut]
    tokens, squares, largest = _summed(micros, count / len(drawn))
    return Batches(count, 0, tokens, squares, largest, False)


def running_flops(shape: Shape, classes: int | None, batches: Batches) -> float:
    """2 a weight and token, and of attention 4 L heads x head_dim a token and layer, as nothing of the
    L x L scores is left out (Kaplan et al. 2020, arXiv 2001.08361, table 1, without its causal half)."""
    if not shape.hidden:
        return shape.net_flops * batches.tokens
    head = shape.vocab * shape.hidden if classes is None else 0
    weights = shape.layers * shape.block + head
    return 2.0 * weights * batches.tokens + 4.0 * shape.layers * shape.attention * batches.squares


def training_flops(shape: Shape, way: Way, batches: Batches) -> float:
    """A forward pass, and twice as much backward: 6 a weight and token. A frozen weight has no gradient of
    its own: 4, and the adapters' 6. Checkpointing runs every block forward once more: 2.

    Attention, without weights, costs 3 forward passes either way. nf4 is unpacked at each use, which is
    memory traffic and no product: not counted.
    """
    forward = running_flops(shape, way.classes, batches)
    if not shape.hidden:
        return 3 * forward
    attention = 4.0 * shape.layers * shape.attention * batches.squares
    again = forward if way.checkpointing else 0.0
    if way.lora is None:
        return 3 * forward + again
    own = 6.0 * adapters(shape, way.lora) * batches.tokens
    return 2 * (forward - attention) + 3 * attention + own + again


def gptq_flops(shape: Shape, tokens: float) -> float:
    """GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1): each block forward twice; of each layer
    the Hessian 2 X Xᵀ, its inverse's Cholesky factor, and the updates column by column."""
    forward = 2.0 * shape.layers * shape.block * tokens
    layers = sum(2.0 * tokens * i**2 + 2.0 * i**3 + 2.0 * o * i**2 for _, i, o in shape.linears)
    return 2 * forward + shape.layers * layers


def gptq_memory(shape: Shape, tokens: float) -> float:
    """Bytes: one block in float32, its widest layer's Hessian and inverse, and the block's inputs and outputs
    of all calibration tokens."""
    widest = max((i for _, i, _ in shape.linears), default=0)
    return 4.0 * shape.block + 12.0 * widest**2 + 8.0 * shape.hidden * tokens
