"""What a prediction has found so far, kept in arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmkd.batches import Rows


class Kept:
    """Logits by row number, two arrays a batch: as objects of their own rows would take ten times as much."""

    def __init__(self) -> None:
        self.parts: list[tuple[Rows, NDArray[np.float32]]] = []
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def add(self, rows: Rows, logits: NDArray[np.float32]) -> None:
        """(n,) and (n, C)"""
        if len(rows):
            self.parts.append((rows, logits))
            self.count += len(rows)

    def known(self, count: int) -> NDArray[np.bool_]:
        """Which of `count` rows are here. (count,)"""
        there = np.zeros(count, dtype=bool)
        for rows, _ in self.parts:
            there[rows[rows < count]] = True
        return there

    def joined(self) -> tuple[Rows, NDArray[np.float32]]:
        """Row numbers (N,) and their logits (N, C), as they came."""
        if not self.parts:
            return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
        rows, logits = zip(*self.parts, strict=True)
        return np.concatenate(rows), np.concatenate(logits)

    def once(self) -> Kept:
        """Each row once: ranks that went on from one another's had them all."""
        rows, logits = self.joined()
        rows, first = np.unique(rows, return_index=True)
        found = Kept()
        found.add(rows, logits[first])
        return found


def in_order(rows: Rows, parts: list[tuple[Rows, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """The logits (len(rows), C) of `rows`, each asked for once, of several ranks' parts.

    A row that two parts have counts once. Raises KeyError where one has none.
    """
    if not len(rows):
        return np.zeros((0, 0), np.float32)
    place = np.full(int(rows.max()) + 1, -1)
    place[rows] = np.arange(len(rows))
    parts = [(found, logits) for found, logits in parts if len(found)]
    classes = parts[0][1].shape[1] if parts else 0
    result, there = np.empty((len(rows), classes), np.float32), np.zeros(len(rows), dtype=bool)
    for found, logits in parts:
        ours = found < len(place)
        at = place[found[ours]]
        result[at[at >= 0]] = logits[ours][at >= 0]
        there[at[at >= 0]] = True
    if not there.all():
        raise KeyError(int(rows[~there][0]))
    return result
