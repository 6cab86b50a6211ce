"""Rows by 64-bit digests of what they say: which are equal, in either order, and which stay together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llmkd import mapped
from llmkd.canonical import OWN_COLUMNS
from llmkd.errors import DataError
from llmkd.progress import bar
from llmkd.tasks import KINDS, preference

Keys = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


class Keyed(NamedTuple):
    """A part's rows and their digests, made once."""

    table: pa.Table
    content: Keys  # (N,), the same in both orders where the kind has a mirror
    turned: Bools  # (N,), the rows whose digest is that of the other order
    group: Keys  # (N,), of the field that groups; of the content where there is no such field, or it is empty

    def less(self, gone: Bools) -> Keyed:
        """Without the rows marked (N,)."""
        left = ~gone
        table = mapped.filtered(self.table, left)
        return Keyed(table, self.content[left], self.turned[left], self.group[left])

    @property
    def part(self) -> str:
        return str(self.table["part"][0].as_py())

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return np.asarray(self.table["label"].to_numpy())


def keyed(table: pa.Table, kind: str, fields: Sequence[str], group: str | None) -> Keyed:
    """The rows with digests of the values of `fields`, and of `group`'s. Raises DataError."""
    turned = np.zeros(table.num_rows, dtype=bool)
    if KINDS[kind].mirror(2) is None:
        (content,) = _keys(table, fields)
    else:
        given, other = _keys(table, fields, list(preference.swap({name: name for name in fields}).values()))
        content, turned = np.minimum(given, other), other < given
    groups = _keys(table, [group])[0] if group else content
    return Keyed(table, content, turned, np.where(groups == _digest(b""), content, groups))


def together(rows: Keyed) -> Keys:
    """What must not be torn: groups, and those that hold rows of equal content as one. (N,)"""
    if np.array_equal(rows.group, rows.content):
        return rows.group
    _, groups = np.unique(rows.group, return_inverse=True)
    _, contents = np.unique(rows.content, return_inverse=True)
    first, size = int(groups.max()) + 1, int(contents.max()) + 1
    pairs = np.unique(groups * size + contents)
    if len(pairs) == size:  # each content in one group
        return rows.group
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = pairs // size, first + pairs % size  # the nodes are the groups, then the contents
    graph = coo_array((np.ones(len(pairs)), edges), shape=(first + size, first + size))
    found = connected_components(graph, directed=False)[1][groups]  # (N,)
    lowest = np.full(found.max() + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(lowest, found, rows.group)
    return np.asarray(lowest[found])


def _keys(table: pa.Table, *orders: Sequence[str]) -> Keys:
    """For each of several orders of the same fields, a 64-bit digest of each row's values: texts casefolded,
    in one Unicode normal form and with whitespace collapsed; bytes as they are. (orders, rows)"""
    fields = orders[0]
    for field in fields:
        if field not in table.column_names:
            raise DataError(f"group {field!r} is no field: the rows have {', '.join(text_columns(table))}")
    places = [[list(fields).index(field) for field in order] for order in orders]
    keys = np.empty((len(orders), table.num_rows), dtype=np.uint64)
    for row, values in enumerate(_walk(table.select(list(dict.fromkeys(fields))), fields)):
        for order, at in enumerate(places):
            keys[order, row] = _digest(b"\0".join([values[place] for place in at]))
    return keys


def _digest(normal: bytes) -> int:
    return int.from_bytes(blake2b(normal, digest_size=8).digest(), "big")


def _walk(table: pa.Table, fields: Sequence[str]) -> Iterator[list[bytes]]:
    """Each row's values in their normal form, a slice of the table in memory at a time."""
    for start in bar(range(0, table.num_rows, mapped.BATCH), "rows"):
        part = table.slice(start, mapped.BATCH)
        for values in zip(*(_plain(part[field]).to_pylist() for field in fields), strict=True):
            yield [_normal(value) for value in values]


def _normal(value: str | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    return " ".join(normalize("NFC", value).casefold().split()).encode()


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers as strings, "" where there is none; strings and bytes as they are."""
    return pc.fill_null(column.cast(pa.string()), "") if pa.types.is_floating(column.type) else column


def text_columns(table: pa.Table) -> list[str]:
    return [
        field.name
        for field in table.schema
        if pa.types.is_string(field.type) and field.name not in OWN_COLUMNS
    ]
