"""A teacher that is a file: logits, probabilities or verdicts that somebody else put beside ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from llmkd.canonical import SWAPPED, numbered
from llmkd.errors import CacheError, ConfigError, DataError
from llmkd.sources import read as read_source
from llmkd.tasks.image import BYTES

EPSILON = 1e-6  # a probability below counts as this one: log 0 is no logit
SUM = 0.02  # how far a row's probabilities may sum from 1: files round to two digits

Floats = NDArray[np.float64]


def read(
    source: str,
    *,
    id_column: str | None,
    labels: Sequence[str],
    logits: Sequence[str] | None = None,
    probabilities: Sequence[str] | None = None,
    verdict: str | None = None,
    verdict_values: Mapping[str, int] | None = None,
    smoothing: float = 0.1,
    part: str = "train",
) -> tuple[list[str], NDArray[np.float32]]:
    """Ids (N,) and raw logits (N, C), float32, of a source that `llmkd.sources.read` reads.

    Without an `id_column` its rows have the ids that stage 00 gave to the rows of `part`, in their order.
    Exactly one of: `logits` or `probabilities`, a column a class in the order of `labels`, or one column
    of lists; `verdict`, a column of class names or numbers (`verdict_values` maps the file's values to
    class numbers). Probabilities become log max(p, 1e-6). A verdict becomes the log of 1 - smoothing on
    its class and smoothing / (C - 1) on each other one (Szegedy et al. 2016, arXiv 1512.00567, section 7).
    Raises ConfigError for a contradictory call, DataError naming what is wrong in the file.
    """
    given = [name for name in (logits, probabilities, verdict) if name is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{source}: give exactly one of logits, probabilities and verdict, not {len(given)}"
        )
    if not 0 <= smoothing < 1 - 1 / len(labels):
        raise ConfigError(
            f"{source}: smoothing = {smoothing:g}: must be 0 or more, below {1 - 1 / len(labels):g}, "
            "or the verdict is not the likeliest class"
        )
    table = read_source(source)
    asked = [verdict] if verdict else list(logits or probabilities or ())
    _check_columns(table, source, [*([id_column] if id_column else []), *asked])
    ids = _ids(table[id_column], source, id_column) if id_column else numbered(part, table.num_rows)
    if verdict is not None:
        places = _verdicts(table[verdict], source, ids, verdict, _known(labels, verdict_values, source))
        others = smoothing / (len(labels) - 1)
        likely = np.where(np.eye(len(labels), dtype=bool)[places], 1 - smoothing, others)  # (N, C)
        return ids, _log(likely)
    values = _numbers(table, source, ids, list(logits or probabilities or ()), labels)  # (N, C)
    if probabilities is not None:
        _check_probabilities(values, source, ids)
        return ids, _log(values)
    return ids, values.astype(np.float32)


def align(
    ids: Sequence[str],
    logits: NDArray[np.float32],
    wanted: Sequence[str],
    *,
    source: str,
    mirror: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """The logits of the rows `wanted`, in their order, (n, C); the file may hold more.

    With `mirror` (the task's permutation of classes) a swapped copy that the file does not hold has its
    original's logits, mirrored. Raises CacheError where a row is missing.
    """
    where = {id: at for at, id in enumerate(ids)}
    found = np.empty((len(wanted), logits.shape[1]), dtype=np.float32)
    missing = []
    for row, id in enumerate(wanted):
        stem = id.removesuffix(SWAPPED)
        if id in where:
            found[row] = logits[where[id]]
        elif mirror is not None and stem in where:
            found[row] = logits[where[stem]][list(mirror)]
        else:
            missing.append(id)
    if missing:
        raise CacheError(
            f"{source}: no logits for {len(missing)} of {len(wanted)} rows, first {missing[0]!r}; "
            "add them to the file, or check its id column against the task's"
        )
    return found


def _check_columns(table: pa.Table, source: str, wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        has = ", ".join(table.column_names)
        raise DataError(f"{source}: no column {', '.join(map(repr, missing))}: there are {has}")


def _strings(column: pa.ChunkedArray, source: str, name: str) -> pa.ChunkedArray:
    if pa.types.is_nested(column.type) or any(is_bytes(column.type) for is_bytes in BYTES):
        raise DataError(f"{source}: {name!r} is {column.type}, not text or numbers: name another column")
    return column.cast(pa.string())


def _ids(column: pa.ChunkedArray, source: str, name: str) -> list[str]:
    if column.null_count:
        row = int(column.is_null().to_numpy().argmax())
        raise DataError(f"{source}: row {row} has no id in {name!r}: fill it")
    ids: list[str] = _strings(column, source, name).to_pylist()
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        first = next(id for id in ids if id in seen or seen.add(id))  # type: ignore[func-returns-value]
        raise DataError(
            f"{source}: {len(ids) - len(set(ids))} ids in {name!r} repeat, first {first!r}: keep one each"
        )
    return ids


def _numbers(
    table: pa.Table, source: str, ids: Sequence[str], columns: Sequence[str], labels: Sequence[str]
) -> Floats:
    """The finite numbers of a column a class, or of one column of lists, (N, C)."""
    listed = len(columns) == 1 and _is_list(table[columns[0]].type)
    if not listed and len(columns) != len(labels):
        raise DataError(
            f"{source}: {len(columns)} columns for the {len(labels)} classes {', '.join(labels)}: "
            "name one for each, in this order, or one column of lists"
        )
    if listed:
        lengths = pc.fill_null(pc.list_value_length(table[columns[0]]), 0).to_numpy()
        _refuse(lengths != len(labels), source, ids, f"{columns[0]!r} does not hold {len(labels)} numbers")
        flat = table[columns[0]].combine_chunks().flatten()
        return _finite([flat], source, ids, columns, each=len(labels)).reshape(-1, len(labels))
    return _finite([table[name] for name in columns], source, ids, columns)


def _finite(
    columns: Sequence[Any], source: str, ids: Sequence[str], names: Sequence[str], each: int = 1
) -> Floats:
    """Columns of numbers, or of strings that hold them, side by side; `each` of an id. (N each, columns)"""
    found = np.empty((len(columns[0]), len(columns)))
    for at, (column, name) in enumerate(zip(columns, names, strict=True)):
        numbers, fault = column, f"{name!r} holds no finite number"
        if not pa.types.is_floating(column.type):
            texts = _strings(column, source, name)
            number = pc.match_substring_regex(texts, r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$")
            wrong = ~pc.fill_null(number, False).to_numpy(zero_copy_only=False)
            _refuse(wrong, source, ids, fault, each)
            numbers = pc.utf8_trim_whitespace(texts)
        found[:, at] = numbers.cast(pa.float64()).to_numpy(zero_copy_only=False)  # nan where there is none
        _refuse(~(np.abs(found[:, at]) <= np.finfo(np.float32).max), source, ids, fault, each)
    return found


def _check_probabilities(values: Floats, source: str, ids: Sequence[str]) -> None:
    _refuse(values.min(-1) < 0, source, ids, "a probability is below 0")
    _refuse(np.abs(values.sum(-1) - 1) > SUM, source, ids, "probabilities do not sum to 1")


def _log(probabilities: Floats) -> NDArray[np.float32]:
    return np.log(np.maximum(probabilities, EPSILON)).astype(np.float32)


def _known(labels: Sequence[str], values: Mapping[str, int] | None, source: str) -> dict[str, int]:
    """What may stand in the file -> class number. Names that look like numbers are names."""
    by_name = {name: number for number, name in enumerate(labels)}
    numbers = {str(number): number for number in range(len(labels))}
    if values is None:
        return by_name if set(by_name) & set(numbers) else by_name | numbers
    outside = [value for value, number in values.items() if not 0 <= number < len(labels)]
    if outside:
        raise ConfigError(
            f"{source}: verdict {outside[0]!r} maps to {values[outside[0]]}, "
            f"outside the {len(labels)} classes"
        )
    return {str(value): number for value, number in values.items()}


def _verdicts(
    column: pa.ChunkedArray, source: str, ids: Sequence[str], name: str, known: Mapping[str, int]
) -> NDArray[np.int64]:
    """Class numbers, (N,)"""
    texts = _strings(column, source, name)
    places = pc.index_in(texts, value_set=pa.array(list(known), pa.string()))
    unknown = pc.is_null(places).to_numpy()
    if unknown.any():
        value = texts[int(unknown.argmax())].as_py()
        shown = "missing" if value is None else repr(value[:40])
        _refuse(unknown, source, ids, f"verdict {shown} in {name!r} is none of {', '.join(list(known)[:12])}")
    return np.array(list(known.values()), dtype=np.int64)[places.to_numpy()]


def _refuse(wrong: NDArray[np.bool_], source: str, ids: Sequence[str], fault: str, each: int = 1) -> None:
    """wrong (N each,)"""
    if wrong.any():
        first = ids[int(wrong.argmax()) // each]
        raise DataError(f"{source}: {fault}: {wrong.sum()} times, first in row {first!r}: mend the file")


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
