"""Rows' ids as they lie in a column: read when asked for, since as Python's strings they are large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np
import pyarrow as pa

from llmkd.mapped import BATCH

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Ids(Sequence[str]):
    """A column's strings, or those of some of its rows, by their row numbers. Equal to nothing but itself."""

    def __init__(self, column: pa.ChunkedArray, rows: NDArray[np.int64] | None = None) -> None:
        self.column, self.rows = column, rows

    def __len__(self) -> int:
        return len(self.column if self.rows is None else self.rows)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            found: list[str] = self.array(range(len(self))[at]).to_pylist()
            return found
        one: str = self.column[int(at if self.rows is None else self.rows[at])].as_py()
        return one

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BATCH):
            yield from self[start : start + BATCH]

    @classmethod
    def over(cls, ids: Sequence[str]) -> Ids:
        return ids if isinstance(ids, Ids) else cls(pa.chunked_array([pa.array(ids, pa.string())]))

    def of(self, rows: NDArray[np.int64]) -> Ids:
        """Those of some of these rows."""
        return Ids(self.column, rows if self.rows is None else self.rows[rows])

    def array(self, at: range) -> pa.Array:
        """Those at some places, as Arrow packs them."""
        if not at:
            return pa.array([], self.column.type)
        rows = np.arange(at.start, at.stop, at.step)
        rows = rows if self.rows is None else self.rows[rows]
        first = int(rows.min())  # `take` of a whole column would unpack all of it
        near = self.column.slice(first, int(rows.max()) - first + 1).combine_chunks()
        return near.take(pa.array(rows - first))

    @cached_property
    def repeated(self) -> list[str]:
        """Those that stand more than once; all are held only where two have one hash."""
        hashes = np.fromiter(map(hash, self), np.int64, len(self))
        hashes.sort()
        if not (hashes[1:] == hashes[:-1]).any():
            return []
        return [id for id, times in Counter(self).items() if times > 1]
