"""A step's micro-batches dealt to ranks, so that none waits long for another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Piece = tuple[NDArray[np.int64], int]  # a micro-batch: row numbers, and how many of them are real
CALL = 256  # tokens whose computing takes about as long as what a micro-batch costs besides its tokens


def deal(step: Sequence[NDArray[np.int64]], lengths: NDArray[np.int64], ranks: int) -> list[list[Piece]]:
    """A step's micro-batches dealt to ranks: equally many each, as collectives must match.

    Returns for each rank its (rows, real rows) pairs, the costliest first. Micro-batches are halved until
    their count divides, and on while that leaves the slowest rank less to do; where there are fewer rows
    than ranks, a filler of no weight stands in.
    """

    def cost(piece: Piece) -> int:
        return len(piece[0]) * int(lengths[piece[0]].max()) + CALL

    def slowest(dealt: list[list[Piece]]) -> int:
        return max(sum(map(cost, mine)) for mine in dealt)

    pieces = [(rows, len(rows)) for rows in step]
    if ranks == 1:
        return [pieces]
    rounds = -(-len(pieces) // ranks)
    pieces = _halved(pieces, rounds * ranks, cost)
    dealt = _dealt(pieces, ranks, cost)
    while True:  # ends, as each further micro-batch costs CALL
        rounds += 1
        pieces = _halved(pieces, rounds * ranks, cost)
        finer = _dealt(pieces, ranks, cost)
        if slowest(finer) >= slowest(dealt):
            return dealt
        dealt = finer


def _halved(pieces: list[Piece], count: int, cost: Callable[[Piece], int]) -> list[Piece]:
    """The costliest halved until there are `count`; single rows cannot be, so fillers follow."""
    pieces = sorted(pieces, key=cost, reverse=True)
    while pieces and len(pieces) < count:
        widest = next((piece for piece in pieces if len(piece[0]) > 1), None)
        if widest is None:
            pieces.append((pieces[-1][0][:1], 0))
            continue
        rows, half = widest[0], len(widest[0]) // 2
        pieces = [piece for piece in pieces if piece is not widest]
        pieces = sorted(
            [*pieces, (rows[:half], half), (rows[half:], len(rows) - half)], key=cost, reverse=True
        )
    return pieces


def _dealt(pieces: list[Piece], ranks: int, cost: Callable[[Piece], int]) -> list[list[Piece]]:
    """Like cards, the costliest first; in each round the rank with the least so far takes first."""
    hands: list[list[Piece]] = [[] for _ in range(ranks)]
    for begin in range(0, len(pieces), ranks):
        order = sorted(hands, key=lambda hand: sum(map(cost, hand)))
        for hand, piece in zip(order, pieces[begin : begin + ranks], strict=True):
            hand.append(piece)
    return hands
