"""Rows and tokens that lie on disk and are mapped: what is resident is what is read, not what there is."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from llmkd.errors import RunError

BATCH = 1024  # rows that are in memory at once
GROUP = 8192  # rows of a row group, which is in memory while it is packed
SMALL = 1 << 20  # bytes that are not worth a file
Rows = TypeVar("Rows", pa.Table, pa.ChunkedArray)


def table(path: str | Path) -> pa.Table:
    """A Parquet file's rows, from an unpacked copy in a temporary file that goes with the process."""
    # else a row group's columns are read whole before the first batch
    with pq.ParquetFile(path, buffer_size=SMALL, pre_buffer=False) as packed:
        return copied(packed.schema_arrow, packed.iter_batches(BATCH))


def write(rows: pa.Table, path: Path) -> None:
    """The rows as a Parquet file, a row group in memory at a time."""
    with pq.ParquetWriter(path, rows.schema, compression="zstd") as packed:
        for start in range(0, len(rows), GROUP):
            packed.write_table(rows.slice(start, GROUP))
            pa.default_memory_pool().release_unused()  # it would keep some 40 MB


def copied(schema: pa.Schema, parts: Iterable[pa.RecordBatch | pa.Table]) -> pa.Table:
    """The parts end to end, in a temporary file that goes with the process; small ones stay in memory.

    Raises RunError, or OSError naming the place where its disk is full, and what `parts` raises as it is.
    """
    file = tempfile.SpooledTemporaryFile(SMALL)  # noqa: SIM115  its closing may fail as its writing may
    try:
        with _temporary():
            writer = pa.ipc.new_stream(file, schema)
        for part in parts:
            with _temporary():
                writer.write(part)
        with _temporary():
            writer.close()
            data = _bytes(file)
    finally:
        with _temporary():
            file.close()
    pa.default_memory_pool().release_unused()
    return pa.ipc.open_stream(pa.py_buffer(data)).read_all()


@contextmanager
def _temporary() -> Iterator[None]:
    """Faults of a temporary file, told as its place's: what is read meanwhile is not at fault."""
    try:
        yield
    except OSError as error:
        place = _place()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.filename = place
            raise
        why = error.strerror or error
        raise RunError(f"temporary directory {place!r}: {why}; name another with TMPDIR") from error


def _place() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # no directory can be written to; it was tried before all others
        return os.environ.get("TMPDIR", "/tmp")


def _bytes(file: tempfile.SpooledTemporaryFile[bytes]) -> bytes | mmap.mmap:
    """What was written, mapped where it lies on disk."""
    file.flush()
    if file.tell() > SMALL:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    file.seek(0)
    return file.read()


def column(kind: pa.DataType, parts: Iterable[pa.Array | pa.ChunkedArray]) -> pa.ChunkedArray:
    """As `copied`, of one column's parts."""
    return copied(pa.schema({"": kind}), (pa.table({"": part}) for part in parts))[""]


def filtered(table: pa.Table, keep: npt.NDArray[np.bool_]) -> pa.Table:
    """The rows of `table` where `keep`, (N,), is true; the table itself where it is everywhere."""
    if keep.all():
        return table
    parts = (part.filter(pa.array(keep[start : start + BATCH])) for start, part in slices(table))
    return copied(table.schema, parts)


def slices(rows: Rows) -> Iterator[tuple[int, Rows]]:
    """Slices of BATCH rows in order, and where each begins."""
    for start in range(0, len(rows), BATCH):
        yield start, rows.slice(start, BATCH)


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros to be written over; a large array lies in a temporary file that goes with the process.

    Raises as `copied` does. Its room is taken at once, where a disk's files are written in place.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size <= SMALL:
        return np.zeros(shape, dtype)
    with _temporary(), tempfile.TemporaryFile() as file:
        for start in range(0, size, SMALL):
            file.write(bytes(min(SMALL, size - start)))
        file.flush()
        return np.memmap(file, dtype, "r+", shape=shape)


class Column:
    """Values of one kind, appended to a temporary file that goes with the process.

    Its methods raise as `copied` does.
    """

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        with _temporary():
            self.file = tempfile.TemporaryFile()  # noqa: SIM115  closed by `values`, or with the process

    def append(self, part: npt.ArrayLike) -> None:
        data = np.asarray(part, self.dtype).tobytes()
        with _temporary():
            self.file.write(data)

    def values(self) -> npt.NDArray[Any]:
        """The parts end to end, read-only; mapped, so nothing can be appended any more."""
        with _temporary(), self.file as file:
            file.flush()
            return np.memmap(file, self.dtype, "r") if file.tell() else np.empty(0, self.dtype)


def tokens(parts: Iterable[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    """The parts end to end, read-only, in a temporary file that goes with the process. (tokens,) int32"""
    column = Column(np.int32)
    for part in parts:
        column.append(part)
    return column.values()
