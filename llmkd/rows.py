"""Labelled rows of any source made into the one table that every later stage joins by id.

Three steps: `read` a source into a table, `canonical` checks and renames it, `prepare` groups, folds and
doubles it.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llmkd import folds as folding
from llmkd import mapped
from llmkd.canonical import OWN_COLUMNS, SWAPPED, canonical
from llmkd.errors import DataError
from llmkd.ids import Ids
from llmkd.progress import bar
from llmkd.sources import arena_numbers, read
from llmkd.tasks import KINDS, preference

__all__ = ["arena_numbers", "canonical", "held_out", "prepare", "read"]


def prepare(
    train: pa.Table,
    test: pa.Table | None,
    *,
    kind: str,
    swap: bool,
    group: str | None,
    folds: int,
    stratify: bool = True,
    seed: int,
    leaks: Literal["drop", "report", "error"] = "drop",
    transfer: pa.Table | None = None,
    fields: Sequence[str] | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of all parts with stems, groups, folds and swapped copies, and a JSON-able report.

    `fields` are the columns that make up a row's content, by default the kind's texts (`llmkd.tasks.content`
    knows them). `group` is the field whose equal texts (casefolded, whitespace collapsed) stay together; None
    keeps rows of equal content together, and the leak check looks for those. `transfer` rows are in no fold;
    those that leak into the test part, or stand in train, are left out. Swapped copies follow the rows in
    their order. Duplicates (same content, either order where the kind has a mirror) and duplicates with
    conflicting labels are counted, not removed. Raises DataError.
    """
    if swap and KINDS[kind].mirror(2) is None:
        raise DataError(f"swap is on, but a {kind} row has no order: set task.swap to false")
    fields = KINDS[kind].FIELDS if fields is None else fields
    _check_ids([table for table in (train, test, transfer) if table is not None])
    train, leaked = _without_leaks(train, test, kind, fields, group, leaks)
    report: dict[str, Any] = {"leaks": {"policy": leaks, **leaked}}
    if transfer is not None:
        transfer, leaked = _without_leaks(transfer, test, kind, fields, group, leaks)
        transfer, known = _without_known(transfer, train, kind, fields)
        report["leaks"]["transfer"] = {**leaked, "in_train": known}
    kept = [table for table in (train, test, transfer) if table is not None]
    report["duplicates"] = {table["part"][0].as_py(): _duplicates(table, kind, fields) for table in kept}
    groups = [_keys(table, [group])[0] if group else _content(table, kind, fields)[0] for table in kept]
    numbers = folding.assign(kept[0]["label"].to_numpy(), groups[0], folds, seed, stratify=stratify)
    folding.check(numbers, groups[0])
    by_part = [numbers, *(np.full(table.num_rows, -1, dtype=np.int16) for table in kept[1:])]
    given = [_grouped(*of) for of in zip(kept, groups, by_part, strict=True)]
    report |= _counts(given, groups, KINDS[kind].FIELDS)
    tables = [pa.concat_tables([table, _swapped(table, kind)]) if swap else table for table in given]
    rows = pa.concat_tables(tables, promote_options="default")
    share = round(1 - sum(map(len, given)) / rows.num_rows, 4)
    return rows, {**report, "rows": rows.num_rows, "share_swapped": share}


def held_out(
    table: pa.Table, kind: str, extra: Sequence[str] = (), fields: Sequence[str] | None = None
) -> pa.Table | None:
    """The test rows of a prepared table as `canonical` gave them, so that other rows can be held against
    them; None where there are none. `fields` as in `prepare`."""
    fields = KINDS[kind].FIELDS if fields is None else fields
    wanted = pc.and_(pc.equal(table["part"], "test"), pc.invert(table["swapped"])).to_numpy()
    if not wanted.any():
        return None
    return mapped.filtered(table.select(["id", "part", "label", *fields, *extra]), wanted)


def _check_ids(parts: Sequence[pa.Table]) -> None:
    """Ids are unique over all parts: logits are joined by them."""
    twice = Ids(pa.chunked_array([chunk for table in parts for chunk in table["id"].chunks])).repeated
    if twice:
        raise DataError(
            f"{len(twice)} ids stand in more than one part, first {twice[0]!r}: "
            "make them unique, or leave task.id out"
        )


def _without_leaks(
    table: pa.Table, test: pa.Table | None, kind: str, fields: Sequence[str], group: str | None, leaks: str
) -> tuple[pa.Table, dict[str, int]]:
    """The rows of `table` less those that are in the test part, and how many those were."""
    if test is None:
        return table, {"rows": 0, "dropped": 0}
    ours, theirs = (
        _keys(rows, [group])[0] if group else _content(rows, kind, fields)[0] for rows in (table, test)
    )
    leaked = np.isin(ours, theirs)
    count, part = int(leaked.sum()), table["part"][0].as_py()
    what = f"the {group} of a test row" if group else f"the {_named(kind)} of a test row"
    if leaks == "error" and count:
        first = table["id"][int(leaked.argmax())].as_py()
        raise DataError(
            f"{count} {part} rows have {what}, first {first!r}: remove them, or set leaks to drop"
        )
    if leaks != "drop":
        return table, {"rows": count, "dropped": 0}
    if leaked.all():
        raise DataError(f"every {part} row has {what}: give a test part of its own")
    return mapped.filtered(table, ~leaked), {"rows": count, "dropped": count}


def _named(kind: str) -> str:
    return "texts" if KINDS[kind].FIELDS else "content"


def _without_known(
    transfer: pa.Table, train: pa.Table, kind: str, fields: Sequence[str]
) -> tuple[pa.Table, int]:
    """The transfer rows less those of equal content in train, where they have a label too."""
    known = np.isin(_content(transfer, kind, fields)[0], _content(train, kind, fields)[0])
    if known.all():
        raise DataError("every transfer row stands in train: give others, or leave task.transfer out")
    return mapped.filtered(transfer, ~known), int(known.sum())


def _duplicates(table: pa.Table, kind: str, fields: Sequence[str]) -> dict[str, int]:
    """Rows beyond the first of their content, and how many contents carry more than one known label."""
    keys, turned = _content(table, kind, fields)
    labels = table["label"].to_numpy()
    mirror = KINDS[kind].mirror(max(int(labels.max(initial=1)) + 1, 2))
    if mirror is not None:
        labels = np.where(turned & (labels >= 0), np.array([*mirror, -1])[labels], labels)
    repeated, known = len(keys) - len(np.unique(keys)), labels >= 0
    keys, labels = keys[known], labels[known]
    order = np.lexsort((labels, keys))
    keys, labels = keys[order], labels[order]
    torn = keys[1:][(keys[1:] == keys[:-1]) & (labels[1:] != labels[:-1])]
    return {"rows": repeated, "conflicting": len(np.unique(torn))}


def _content(
    table: pa.Table, kind: str, fields: Sequence[str]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Key of each row's content, the same in both orders, and which rows were turned for it."""
    if KINDS[kind].mirror(2) is None:
        (keys,) = _keys(table, fields)
        return keys, np.zeros(len(keys), dtype=bool)
    keys, other = _keys(table, fields, list(preference.swap({name: name for name in fields}).values()))
    return np.minimum(keys, other), other < keys


def _keys(table: pa.Table, *orders: Sequence[str]) -> npt.NDArray[np.uint64]:
    """For each of several orders of the same fields, a 64-bit digest of each row's values: texts casefolded,
    in one Unicode normal form and with whitespace collapsed; bytes as they are. (orders, rows)"""
    fields = orders[0]
    for field in fields:
        if field not in table.column_names:
            raise DataError(f"group {field!r} is no field: the rows have {', '.join(_text_columns(table))}")
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


def _grouped(table: pa.Table, keys: npt.NDArray[np.uint64], folds: npt.NDArray[np.int16]) -> pa.Table:
    """The table with id, stem, swapped, group and, behind part, fold."""
    stems, starts = table["id"], range(0, len(keys), mapped.BATCH)
    groups = ([f"{key:016x}" for key in keys[start : start + mapped.BATCH].tolist()] for start in starts)
    columns = {
        "id": stems,
        "stem": stems,
        "swapped": pa.array(np.zeros(table.num_rows, dtype=bool)),
        "group": mapped.column(pa.string(), (pa.array(some, pa.string()) for some in groups)),
        **{name: table[name] for name in table.column_names if name != "id"},
    }
    return pa.table(columns).add_column(5, "fold", pa.array(folds, pa.int16()))


def _swapped(table: pa.Table, kind: str) -> pa.Table:
    """Copies in the other order: fields exchanged, label and bayes mirrored, same stem, group and fold."""
    columns = {name: table[name] for name in table.column_names}
    columns |= preference.swap({name: table[name] for name in _text_columns(table)})
    labels = table["label"].to_numpy()
    mirror = KINDS[kind].mirror(max(int(labels.max(initial=1)) + 1, 2))
    stems = (stems for _, stems in mapped.slices(table["stem"]))
    ids = (pc.binary_join_element_wise(some, SWAPPED, "") for some in stems)
    columns["id"] = mapped.column(pa.string(), ids)
    columns["swapped"] = pa.array(np.ones(table.num_rows, dtype=bool))
    # The last entry is read by the index -1: an unknown label stays unknown.
    columns["label"] = pa.array(np.array([*mirror, -1], dtype=np.int32)[labels])
    if "bayes" in columns:
        parts = (part.to_pylist() for _, part in mapped.slices(table["bayes"]))
        columns["bayes"] = mapped.column(
            pa.list_(pa.float32()),
            (pa.array([_mirrored(row, kind) for row in part], pa.list_(pa.float32())) for part in parts),
        )
    return pa.table(columns, schema=table.schema)


def _mirrored(shares: list[float] | None, kind: str) -> list[float] | None:
    return [shares[place] for place in KINDS[kind].mirror(len(shares))] if shares else None


def _counts(
    tables: Sequence[pa.Table], groups: Sequence[npt.NDArray[np.uint64]], fields: Sequence[str]
) -> dict[str, Any]:
    """What each part and each fold of train, the first table, holds before it is doubled."""
    parts = {
        table["part"][0].as_py(): {
            "rows": table.num_rows,
            "groups": len(np.unique(keys)),
            "labels": _tally(table["label"].to_numpy()),
            "words": {field: _word_quantiles(table[field]) for field in fields},
        }
        for table, keys in zip(tables, groups, strict=True)
    }
    numbers, labels = (tables[0][name].to_numpy() for name in ("fold", "label"))
    folds = {
        str(fold): {"rows": int((numbers == fold).sum()), "labels": _tally(labels[numbers == fold])}
        for fold in np.unique(numbers).tolist()
    }
    return {"parts": parts, "folds": folds}


def _tally(labels: npt.NDArray[np.int32]) -> dict[str, int]:
    values, counts = np.unique(labels, return_counts=True)
    return dict(zip(map(str, values.tolist()), counts.tolist(), strict=True))


def _word_quantiles(column: pa.ChunkedArray) -> dict[str, int]:
    words = pc.count_substring_regex(column, r"\S+").to_numpy()
    p50, p90, p99, most = np.quantile(words, (0.5, 0.9, 0.99, 1)).astype(int).tolist()
    return {"p50": p50, "p90": p90, "p99": p99, "max": most}


def _text_columns(table: pa.Table) -> list[str]:
    return [
        field.name
        for field in table.schema
        if pa.types.is_string(field.type) and field.name not in OWN_COLUMNS
    ]
