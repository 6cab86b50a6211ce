"""The logits cache: raw float32 logits beside ids, in Parquet; joined by id, never by position."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llmkd.errors import CacheError
from llmkd.ids import Ids

COLUMNS = ["id", "view", "logits"]
GROUP = 8192  # rows of a row group, which is in memory while it is packed


def write(
    path: Path,
    views: Mapping[str, tuple[Sequence[str], NDArray[np.float32]]],
    *,
    teacher: str,
    labels: Sequence[str],
) -> None:
    """One file with the logits of every view: {view: (ids (N,), logits (N, C))}. Atomic."""
    for view, (ids, logits) in views.items():
        _check(path, view, ids, logits, len(labels), "nothing was written")
    kinds = [pa.string(), pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.float32(), len(labels))]
    schema = pa.schema(dict(zip(COLUMNS, kinds, strict=True)))
    schema = schema.with_metadata({"teacher": teacher, "labels": json.dumps(list(labels))})
    beside = path.with_name(path.name + ".tmp")
    try:
        with pq.ParquetWriter(beside, schema, compression="zstd") as packed:
            for table in _groups(views, schema, len(labels)):
                packed.write_table(table)
    except BaseException:  # of a full disk, too, which it would keep full
        beside.unlink(missing_ok=True)
        raise
    os.replace(beside, path)


def _groups(
    views: Mapping[str, tuple[Sequence[str], NDArray[np.float32]]], schema: pa.Schema, classes: int
) -> Iterator[pa.Table]:
    """GROUP rows at a time, view by view."""
    for number, (ids, logits) in enumerate(views.values()):
        for start in range(0, len(ids), GROUP):
            some = slice(start, start + GROUP)
            flat = pa.array(np.ascontiguousarray(logits[some], dtype=np.float32).reshape(-1))
            values = pa.FixedSizeListArray.from_arrays(flat, classes)
            words = pa.DictionaryArray.from_arrays(np.full(len(values), number, np.int32), list(views))
            columns = [pa.array(ids[some], pa.string()), words, values]
            yield pa.Table.from_arrays(columns, schema=schema)


def _check(
    path: Path, view: str, ids: Sequence[str], logits: NDArray[np.float32], classes: int, remedy: str
) -> None:
    if logits.shape != (len(ids), classes):
        expected = (len(ids), classes)
        raise CacheError(f"{path}: {view} logits are {logits.shape}, expected {expected}; {remedy}")
    if Ids.over(ids).repeated:
        raise CacheError(f"{path}: {view} has an id twice; {remedy}")
    if not np.isfinite(logits).all():
        row = int(np.argmin(np.isfinite(logits).all(-1)))
        raise CacheError(f"{path}: {view} row {ids[row]!r} has a logit that is not finite; {remedy}")


def _check_types(schema: pa.Schema) -> None:
    """Raise TypeError where the columns are not those that `write` writes."""
    id, view, logits = (schema.field(name).type for name in ("id", "view", "logits"))
    words = view.value_type if pa.types.is_dictionary(view) else view
    numbers = logits.value_type if pa.types.is_fixed_size_list(logits) or pa.types.is_list(logits) else logits
    if (id, words, numbers) != (pa.string(), pa.string(), pa.float32()):
        raise TypeError(f"its columns id, view, logits are {id}, {view}, {logits}")


def read(
    path: Path,
    view: str,
    ids: Sequence[str],
    *,
    labels: Sequence[str],
    remedy: str = "run stage 02 anew",
) -> NDArray[np.float32]:
    """Logits (N, C) of `view` in the order of `ids`, float32.

    Raises CacheError unless the view's ids are exactly these, each once, its logits finite, and its
    label names these in this order.
    """
    if not path.is_file():
        raise CacheError(f"{path}: no logits here; {remedy}")
    ids = Ids.over(ids)
    try:
        alike = _alike(path, view, ids, labels, remedy)
        table = None if alike is not None else pa.Table.from_batches(_parts(path, view, labels, remedy))
    except (pa.ArrowException, KeyError, ValueError, TypeError, RecursionError, OSError) as error:
        raise CacheError(
            f"{path}: not a logits cache ({' '.join(str(error).split())[:120]}); {remedy}"
        ) from error
    logits = _joined(path, table, view, ids, len(labels), remedy) if table is not None else alike
    assert logits is not None
    _check(path, view, ids, logits, len(labels), remedy)
    return logits


def _alike(path: Path, view: str, ids: Ids, labels: Sequence[str], remedy: str) -> NDArray[np.float32] | None:
    """The logits where the file has the very ids asked for, in their order, as what `write` wrote for the
    same rows has: then nothing else is held. None where it has not."""
    found, at = np.empty((len(ids), len(labels)), np.float32), 0
    for part in _parts(path, view, labels, remedy):
        if at + len(part) > len(ids) or not part["id"].equals(ids.array(range(at, at + len(part)))):
            return None
        found[at : at + len(part)] = _values(part["logits"], len(labels))
        at += len(part)
    return found if at == len(ids) else None


def _joined(
    path: Path, table: pa.Table, view: str, ids: Ids, classes: int, remedy: str
) -> NDArray[np.float32]:
    """The logits of ids that stand in another order."""
    if pc.count_distinct(table["id"], mode="all").as_py() != len(table):
        raise CacheError(f"{path}: {view} has an id twice; {remedy}")
    asked = ids.array(range(len(ids)))
    at = pc.index_in(asked, value_set=table["id"])  # of each asked row, null where there is none
    if at.null_count:
        first = asked.filter(at.is_null())[0].as_py()
        raise CacheError(
            f"{path}: no {view} logits for {at.null_count} of {len(ids)} rows, first {first!r}; {remedy}"
        )
    if len(table) > len(ids):
        raise CacheError(f"{path}: {view} has {len(table) - len(ids)} rows that are not this run's; {remedy}")
    return _values(table["logits"].combine_chunks(), classes)[at.to_numpy()]


def _parts(path: Path, view: str, labels: Sequence[str], remedy: str) -> Iterator[pa.RecordBatch]:
    """The rows of a view, some at a time; an empty batch where there are none."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        _check_types(file.schema_arrow)
        names = json.loads((file.schema_arrow.metadata or {})[b"labels"])
        if names != list(labels):
            raise CacheError(f"{path}: labels {names}, but this run's are {list(labels)}; {remedy}")
        yield pa.RecordBatch.from_pylist([], pa.schema([file.schema_arrow.field(name) for name in COLUMNS]))
        groups = [at for at in range(file.num_row_groups) if _holds(file, at, view)]
        for part in file.iter_batches(GROUP, row_groups=groups, columns=COLUMNS):
            part.validate(full=True)  # words that are not UTF-8, offsets that lead outside
            some = part.filter(pc.equal(part["view"], view))
            if len(some):
                if len(some["logits"].flatten()) != len(some) * len(labels):
                    raise CacheError(f"{path}: {view} rows do not hold {len(labels)} logits each; {remedy}")
                yield some


def _holds(file: pq.ParquetFile, group: int, view: str) -> bool:
    """Whether a row group has rows of the view: `write` gives each view groups of its own. The column is
    read, which is small: asking a damaged file for its statistics can end the process."""
    return bool(pc.any(pc.equal(file.read_row_group(group, columns=["view"])["view"], view)).as_py())


def _values(logits: pa.Array, classes: int) -> NDArray[np.float32]:
    """(n, C)"""
    flat: NDArray[np.float32] = logits.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, classes)
