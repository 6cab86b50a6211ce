"""Rows of numbers, categories and short time series."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

FIELDS: tuple[str, ...] = ()  # no texts of its own; a template may name extra columns
NEEDED: tuple[tuple[str, ...], ...] = ()
LABELS: tuple[str, ...] | None = None
TEMPLATE = ""
TRIM: tuple[tuple[str, ...], ...] = ()
COMPUTED: tuple[str, ...] = ()
WHOLE = "value in any feature"  # what a row without content lacks
MISSING = ("", "?")
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


def computed(row: Mapping[str, str]) -> dict[str, str]:
    """No computed template fields: numbers are no text."""
    return {}


def mirror(count: int) -> tuple[int, ...] | None:
    """None: a row of features has no order to swap."""
    return None


def columns(features: Mapping[str, Any]) -> tuple[str, ...]:
    """Every column that `features` names, each once: numeric, categorical, then the steps."""
    return tuple(dict.fromkeys([*_numeric(features), *features.get("categorical", ())]))


def _numeric(features: Mapping[str, Any]) -> list[str]:
    series = [name for names in features.get("steps", {}).values() for name in names]
    return [*features.get("numeric", ()), *series]


def read(table: pa.Table, features: Mapping[str, Any], problems: list[str]) -> dict[str, pa.ChunkedArray]:
    """The feature columns: numbers as float64, null where missing; categories as strings, "" where missing.

    "", "?", null and NaN are missing. What is no number, and features that contradict each other, are added
    to `problems`.
    """
    _check(features, problems)
    categorical = features.get("categorical", ())
    return {
        name: _category(table[name], name, problems)
        if name in categorical
        else _number(table[name], name, problems)
        for name in columns(features)
    }


def _check(features: Mapping[str, Any], problems: list[str]) -> None:
    lengths = {name: len(names) for name, names in features.get("steps", {}).items()}
    if len(set(lengths.values())) > 1:
        problems.append(f"task.features.steps differ in length ({lengths}): give every series the same steps")
    both = sorted(set(_numeric(features)) & set(features.get("categorical", ())))
    if both:
        problems.append(f"column {both[0]!r} is numeric and categorical: name it once in task.features")


def blank(data: Mapping[str, pa.ChunkedArray]) -> npt.NDArray[np.bool_]:
    """Rows without a single value."""
    empty = [
        pc.is_null(column) if pa.types.is_floating(column.type) else pc.equal(column, "")
        for column in data.values()
    ]
    return np.all([column.to_numpy() for column in empty], axis=0)


def _category(column: pa.ChunkedArray, name: str, problems: list[str]) -> pa.ChunkedArray:
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        problems.append(f"column {name!r} is {column.type}, no category: take it out of task.features")
        return pa.chunked_array([pa.array(["?"] * len(column))])
    return pc.fill_null(_present(column.cast(pa.string())), "")


def _number(column: pa.ChunkedArray, name: str, problems: list[str]) -> pa.ChunkedArray:
    numbers = column
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        texts = _present(column.cast(pa.string()))
        wrong = pc.invert(pc.fill_null(pc.match_substring_regex(texts, NUMBER), True)).to_numpy()
        if wrong.any():
            first = int(wrong.argmax())
            problems.append(
                f"{wrong.sum()} rows of {name!r} are no numbers, first {texts[first].as_py()[:40]!r} in row "
                f"{first}: mend them, or name the column in task.features.categorical"
            )
        numbers = pc.if_else(pa.array(~wrong), texts, None)
    elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        if not (pa.types.is_boolean(column.type) or pa.types.is_decimal(column.type)):
            problems.append(f"column {name!r} is {column.type}, no number: take it out of task.features")
            return pa.chunked_array([pa.nulls(len(column), pa.float64())])
        numbers = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
    return _finite(numbers.cast(pa.float64(), safe=False), name, problems)


def _finite(numbers: pa.ChunkedArray, name: str, problems: list[str]) -> pa.ChunkedArray:
    endless = pc.fill_null(pc.is_inf(numbers), False).to_numpy()
    if endless.any():
        problems.append(
            f"{endless.sum()} rows of {name!r} are infinite, first row {endless.argmax()}: mend them"
        )
    return pc.if_else(pc.is_nan(numbers), None, numbers)


def _present(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Trimmed texts, null where they say that there is no value."""
    trimmed = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.is_in(trimmed, value_set=pa.array(MISSING)), None, trimmed)
