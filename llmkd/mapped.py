"""Rows and tokens that lie on disk and are mapped: what is resident is what is read, not what there is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 8192  # rows that are unpacked at once


def table(path: Path) -> pa.Table:
    """A Parquet file's rows, from an unpacked copy in a temporary file that goes with the process."""
    with pq.ParquetFile(path) as packed, tempfile.NamedTemporaryFile(suffix=".arrow") as copy:
        with pa.ipc.new_file(copy.name, packed.schema_arrow) as writer:
            for batch in packed.iter_batches(BATCH):
                writer.write_batch(batch)
        return pa.ipc.open_file(pa.memory_map(copy.name)).read_all()


class Column:
    """Values of one kind, appended to a temporary file that goes with the process."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  closed by `values`, or with the process

    def append(self, part: npt.ArrayLike) -> None:
        self.file.write(np.asarray(part, self.dtype).tobytes())

    def values(self) -> npt.NDArray[Any]:
        """The parts end to end, read-only; mapped, so nothing can be appended any more."""
        with self.file as file:
            file.flush()
            return np.memmap(file, self.dtype, "r") if file.tell() else np.empty(0, self.dtype)


def tokens(parts: Iterable[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    """The parts end to end, read-only, in a temporary file that goes with the process. (tokens,) int32"""
    column = Column(np.int32)
    for part in parts:
        column.append(part)
    return column.values()
