"""The logits cache: raw float32 logits beside ids, in Parquet; joined by id, never by position."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llmkd.errors import CacheError

Ids = Sequence[str] | NDArray[np.object_]


def write(
    path: Path,
    views: Mapping[str, tuple[Sequence[str], NDArray[np.float32]]],
    *,
    teacher: str,
    labels: Sequence[str],
) -> None:
    """One file with the logits of every view: {view: (ids (N,), logits (N, C))}. Atomic."""
    tables = []
    for view, (ids, logits) in views.items():
        _check(path, view, ids, logits, len(labels), "nothing was written")
        values = pa.array(np.ascontiguousarray(logits, dtype=np.float32).reshape(-1))
        tables.append(
            pa.table(
                {
                    "id": pa.array(ids, pa.string()),
                    "view": pa.array([view] * len(ids), pa.string()).dictionary_encode(),
                    "logits": pa.FixedSizeListArray.from_arrays(values, len(labels)),
                }
            )
        )
    table = pa.concat_tables(tables).unify_dictionaries()
    meta = {"teacher": teacher, "labels": json.dumps(list(labels))}
    beside = path.with_name(path.name + ".tmp")
    pq.write_table(table.replace_schema_metadata(meta), beside, compression="zstd")
    os.replace(beside, path)


def _check(path: Path, view: str, ids: Ids, logits: NDArray[np.float32], classes: int, remedy: str) -> None:
    if logits.shape != (len(ids), classes):
        expected = (len(ids), classes)
        raise CacheError(f"{path}: {view} logits are {logits.shape}, expected {expected}; {remedy}")
    if len(set(ids)) != len(ids):
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
    ids: Ids,
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
    try:
        table = pq.read_table(path, columns=["id", "view", "logits"])
        table.validate(full=True)  # words that are not UTF-8, offsets that lead outside
        names = json.loads((table.schema.metadata or {})[b"labels"])
        _check_types(table.schema)
    except (pa.ArrowException, KeyError, ValueError, TypeError, RecursionError, OSError) as error:
        raise CacheError(
            f"{path}: not a logits cache ({' '.join(str(error).split())[:120]}); {remedy}"
        ) from error
    if names != list(labels):
        raise CacheError(f"{path}: labels {names}, but this run's are {list(labels)}; {remedy}")
    table = table.filter(pc.equal(table["view"], view))
    if pc.count_distinct(table["id"], mode="all").as_py() != len(table):
        raise CacheError(f"{path}: {view} has an id twice; {remedy}")
    asked = pa.array(ids, pa.string())
    at = pc.index_in(asked, value_set=table["id"])  # of each asked row, null where there is none
    if at.null_count:
        first = asked.filter(at.is_null())[0].as_py()
        raise CacheError(
            f"{path}: no {view} logits for {at.null_count} of {len(ids)} rows, first {first!r}; {remedy}"
        )
    if len(table) > len(ids):
        raise CacheError(f"{path}: {view} has {len(table) - len(ids)} rows that are not this run's; {remedy}")
    flat = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if len(flat) != len(table) * len(labels):
        raise CacheError(f"{path}: {view} rows do not hold {len(labels)} logits each; {remedy}")
    logits = flat.reshape(len(table), len(labels))[at.to_numpy()]
    _check(path, view, ids, logits, len(labels), remedy)
    return np.ascontiguousarray(logits, dtype=np.float32)
