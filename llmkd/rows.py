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
from llmkd.canonical import OWN_COLUMNS, SWAPPED, canonical
from llmkd.errors import DataError
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
    grouped = [_grouped(table, group, kind, fields) for table in kept]
    numbers = folding.assign(
        grouped[0]["label"].to_numpy(), _strings(grouped[0]["group"]), folds, seed, stratify=stratify
    )
    folding.check(numbers, _strings(grouped[0]["group"]))
    by_part = [numbers, *(np.full(table.num_rows, -1, dtype=np.int16) for table in grouped[1:])]
    tables = [
        table.add_column(5, "fold", pa.array(number, pa.int16()))
        for table, number in zip(grouped, by_part, strict=True)
    ]
    if swap:
        tables = [pa.concat_tables([table, _swapped(table, kind)]) for table in tables]
    rows = pa.concat_tables(tables, promote_options="default")
    return rows, {**report, **_counts(rows, KINDS[kind].FIELDS)}


def held_out(
    table: pa.Table, kind: str, extra: Sequence[str] = (), fields: Sequence[str] | None = None
) -> pa.Table | None:
    """The test rows of a prepared table as `canonical` gave them, so that other rows can be held against
    them; None where there are none. `fields` as in `prepare`."""
    fields = KINDS[kind].FIELDS if fields is None else fields
    rows = table.filter(pc.and_(pc.equal(table["part"], "test"), pc.invert(table["swapped"])))
    return rows.select(["id", "part", "label", *fields, *extra]) if rows.num_rows else None


def _check_ids(parts: Sequence[pa.Table]) -> None:
    """Ids are unique over all parts: logits are joined by them."""
    counts = pc.value_counts(pa.chunked_array([chunk for table in parts for chunk in table["id"].chunks]))
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise DataError(
            f"{len(repeated)} ids stand in more than one part, first {repeated[0]['values'].as_py()!r}: "
            "make them unique, or leave task.id out"
        )


def _without_leaks(
    table: pa.Table, test: pa.Table | None, kind: str, fields: Sequence[str], group: str | None, leaks: str
) -> tuple[pa.Table, dict[str, int]]:
    """The rows of `table` less those that are in the test part, and how many those were."""
    if test is None:
        return table, {"rows": 0, "dropped": 0}
    ours, theirs = (
        _keys(rows, [group]) if group else _content(rows, kind, fields)[0] for rows in (table, test)
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
    return table.filter(pa.array(~leaked)), {"rows": count, "dropped": count}


def _named(kind: str) -> str:
    return "texts" if KINDS[kind].FIELDS else "content"


def _without_known(
    transfer: pa.Table, train: pa.Table, kind: str, fields: Sequence[str]
) -> tuple[pa.Table, int]:
    """The transfer rows less those of equal content in train, where they have a label too."""
    known = np.isin(_content(transfer, kind, fields)[0], _content(train, kind, fields)[0])
    if known.all():
        raise DataError("every transfer row stands in train: give others, or leave task.transfer out")
    return transfer.filter(pa.array(~known)), int(known.sum())


def _duplicates(table: pa.Table, kind: str, fields: Sequence[str]) -> dict[str, int]:
    """Rows beyond the first of their content, and how many contents carry more than one known label."""
    keys, turned = _content(table, kind, fields)
    labels = table["label"].to_numpy()
    mirror = KINDS[kind].mirror(max(int(labels.max(initial=1)) + 1, 2))
    if mirror is not None:
        labels = np.where(turned & (labels >= 0), np.array([*mirror, -1])[labels], labels)
    known = labels >= 0
    pairs = np.unique(np.stack([keys[known], labels[known].astype(np.uint64)], axis=1), axis=0)
    _, labels_of = np.unique(pairs[:, 0], return_counts=True)
    return {"rows": len(keys) - len(np.unique(keys)), "conflicting": int((labels_of > 1).sum())}


def _content(
    table: pa.Table, kind: str, fields: Sequence[str]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Key of each row's content, the same in both orders, and which rows were turned for it."""
    keys = _keys(table, fields)
    if KINDS[kind].mirror(2) is None:
        return keys, np.zeros(len(keys), dtype=bool)
    other = _keys(table, list(preference.swap({name: name for name in fields}).values()))
    return np.minimum(keys, other), other < keys


def _keys(table: pa.Table, fields: Sequence[str]) -> npt.NDArray[np.uint64]:
    """64-bit digest of each row's values: texts casefolded, in one Unicode normal form and with whitespace
    collapsed; bytes as they are."""
    for field in fields:
        if field not in table.column_names:
            raise DataError(f"group {field!r} is no field: the rows have {', '.join(_text_columns(table))}")
    digests = (_digest(values) for values in _walk(table.select(list(dict.fromkeys(fields))), fields))
    return np.fromiter(digests, dtype=np.uint64, count=table.num_rows)


def _digest(values: Sequence[str | bytes]) -> int:
    normal = b"\0".join(
        value if isinstance(value, bytes) else " ".join(normalize("NFC", value).casefold().split()).encode()
        for value in values
    )
    return int.from_bytes(blake2b(normal, digest_size=8).digest(), "big")


def _walk(table: pa.Table, fields: Sequence[str]) -> Iterator[tuple[str | bytes, ...]]:
    """Rows as tuples of strings or bytes, a slice of the table in memory at a time."""
    for start in bar(range(0, table.num_rows, 10_000), "rows"):
        part = table.slice(start, 10_000)
        yield from zip(*(_plain(part[field]).to_pylist() for field in fields), strict=True)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers as strings, "" where there is none; strings and bytes as they are."""
    return pc.fill_null(column.cast(pa.string()), "") if pa.types.is_floating(column.type) else column


def _grouped(table: pa.Table, group: str | None, kind: str, fields: Sequence[str]) -> pa.Table:
    """The table with id, stem, swapped, group first; fold comes later."""
    stems = table["id"]
    keys = _keys(table, [group]) if group else _content(table, kind, fields)[0]
    groups = pa.array([f"{key:016x}" for key in keys], pa.string())
    columns = {
        "id": stems,
        "stem": stems,
        "swapped": pa.array(np.zeros(table.num_rows, dtype=bool)),
        "group": groups,
        **{name: table[name] for name in table.column_names if name != "id"},
    }
    return pa.table(columns)


def _swapped(table: pa.Table, kind: str) -> pa.Table:
    """Copies in the other order: fields exchanged, label and bayes mirrored, same stem, group and fold."""
    columns = {name: table[name] for name in table.column_names}
    columns |= preference.swap({name: table[name] for name in _text_columns(table)})
    labels = table["label"].to_numpy()
    mirror = KINDS[kind].mirror(max(int(labels.max(initial=1)) + 1, 2))
    columns["id"] = pc.binary_join_element_wise(table["stem"], SWAPPED, "")
    columns["swapped"] = pa.array(np.ones(table.num_rows, dtype=bool))
    # The last entry is read by the index -1: an unknown label stays unknown.
    columns["label"] = pa.array(np.array([*mirror, -1], dtype=np.int32)[labels])
    if "bayes" in columns:
        columns["bayes"] = pa.array(
            [
                [row[place] for place in KINDS[kind].mirror(len(row))] if row else None
                for row in table["bayes"].to_pylist()
            ],
            pa.list_(pa.float32()),
        )
    return pa.table(columns, schema=table.schema)


def _counts(rows: pa.Table, fields: Sequence[str]) -> dict[str, Any]:
    given = rows.filter(pc.invert(rows["swapped"]))
    parts = {}
    for part in pc.unique(given["part"]).to_pylist():
        chosen = given.filter(pc.equal(given["part"], part))
        parts[part] = {
            "rows": chosen.num_rows,
            "groups": pc.count_distinct(chosen["group"]).as_py(),
            "labels": _tally(chosen["label"]),
            "words": {field: _word_quantiles(chosen[field]) for field in fields},
        }
    train = given.filter(pc.equal(given["part"], "train"))
    folds = {
        str(fold): {"rows": len(chosen), "labels": _tally(chosen["label"])}
        for fold in sorted(pc.unique(train["fold"]).to_pylist())
        for chosen in [train.filter(pc.equal(train["fold"], fold))]
    }
    return {
        "parts": parts,
        "folds": folds,
        "rows": rows.num_rows,
        "share_swapped": round(1 - given.num_rows / rows.num_rows, 4),
    }


def _tally(column: pa.ChunkedArray) -> dict[str, int]:
    values, counts = np.unique(column.to_numpy(), return_counts=True)
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


def _strings(column: pa.ChunkedArray) -> npt.NDArray[np.object_]:
    return np.asarray(column.to_numpy())
