"""Rows that are grey images of one shape, as raw bytes."""

import math
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
BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
WHOLE = "image"  # what a row without content lacks


def computed(row: Mapping[str, str]) -> dict[str, str]:
    """No computed template fields: pixels are no text."""
    return {}


def mirror(count: int) -> tuple[int, ...] | None:
    """None: an image has no order to swap."""
    return None


def columns(image: Mapping[str, Any]) -> tuple[str, ...]:
    """The one column that holds the image."""
    return (str(image.get("column", "image")),)


def read(table: pa.Table, image: Mapping[str, Any], problems: list[str]) -> dict[str, pa.ChunkedArray]:
    """The image column as binary: H·W bytes a row, row-major uint8, null where there is none.

    Another type or length is added to `problems`.
    """
    (name,), shape = columns(image), [int(side) for side in image["shape"]]
    column = table[name]
    if not any(of(column.type) for of in BYTES):
        problems.append(f"column {name!r} is {column.type}, not bytes: store each image as raw uint8")
        return {name: pa.chunked_array([pa.array([b"?"] * len(column))])}
    column = column.cast(pa.binary())
    lengths = pc.fill_null(pc.binary_length(column), math.prod(shape)).to_numpy()
    wrong = lengths != math.prod(shape)
    if wrong.any():
        first = int(wrong.argmax())
        problems.append(
            f"{wrong.sum()} images in {name!r} are not {shape}, first row {first} with "
            f"{lengths[first]} bytes for {math.prod(shape)}: mend them or task.image.shape"
        )
    return {name: column}


def blank(data: Mapping[str, pa.ChunkedArray]) -> npt.NDArray[np.bool_]:
    """Rows without an image."""
    return np.asarray(pc.is_null(next(iter(data.values()))).to_numpy())
