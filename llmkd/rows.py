"""Labelled rows of any source made into the one table that every later stage joins by id.

Three steps: `read` a source into a table, `canonical` checks and renames it, `prepare` groups, folds and
doubles it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llmkd import folds as folding
from llmkd import mapped
from llmkd.canonical import SWAPPED, canonical
from llmkd.errors import DataError
from llmkd.ids import Ids
from llmkd.keyed import Keyed, keyed, text_columns, together
from llmkd.sources import arena_numbers, read
from llmkd.tasks import KINDS, preference

__all__ = ["arena_numbers", "canonical", "of_part", "prepare", "read"]


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
    known: pa.Table | None = None,
    fields: Sequence[str] | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of all parts with stems, groups, folds and swapped copies, and a JSON-able report.

    `fields` are the columns that make up a row's content, by default the kind's texts (`llmkd.tasks.content`
    knows them). Rows of equal content (casefolded, whitespace collapsed) stay together, and so do those whose
    field `group` is equal and not empty; the leak check looks for both. `transfer` rows are in no fold;
    those that leak into the test part, or stand in train, are left out, and so are train's that stand in
    `known`. Swapped copies follow the rows in their order. Duplicates (same content, either order where the
    kind has a mirror) and duplicates with conflicting labels are counted, not removed. Raises DataError.
    """
    if swap and KINDS[kind].mirror(2) is None:
        raise DataError(f"swap is on, but a {kind} row has no order: set task.swap to false")
    fields = KINDS[kind].FIELDS if fields is None else fields
    given = [table for table in (train, test, transfer) if table is not None]
    _check_ids(given)
    ours, *rest = [keyed(table, kind, fields, group) for table in given]
    theirs = rest[0] if test is not None else None
    shared = "texts" if KINDS[kind].FIELDS else "content"
    if group:
        shared = group if group in fields else f"{group} or the {shared}"
    ours, leaked = _without_leaks(ours, theirs, shared, leaks)
    report: dict[str, Any] = {"leaks": {"policy": leaks, **leaked}}
    if known is not None:
        ours, report["leaks"]["in_train"] = _without_known(ours, keyed(known, kind, fields, None))
    if transfer is not None:
        rest[-1], leaked = _without_leaks(rest[-1], theirs, shared, leaks)
        rest[-1], twice = _without_known(rest[-1], ours)
        report["leaks"]["transfer"] = {**leaked, "in_train": twice}
    parts, groups = [ours, *rest], [together(ours), *(part.group for part in rest)]
    report["duplicates"] = {part.part: _duplicates(part, kind) for part in parts}
    numbers = folding.assign(ours.labels, groups[0], folds, seed, stratify=stratify)
    folding.check(numbers, groups[0])
    by_part = [numbers, *(np.full(len(keys), -1, dtype=np.int16) for keys in groups[1:])]
    given = [part.table for part in parts]
    whole = [_grouped(*of) for of in zip(given, groups, by_part, strict=True)]
    report |= _counts(whole, groups, KINDS[kind].FIELDS)
    tables = [pa.concat_tables([table, _swapped(table, kind)]) if swap else table for table in whole]
    rows = pa.concat_tables(tables, promote_options="default")
    share = round(1 - sum(map(len, whole)) / rows.num_rows, 4)
    return rows, {**report, "rows": rows.num_rows, "share_swapped": share}


def of_part(
    table: pa.Table, part: str, kind: str, extra: Sequence[str] = (), fields: Sequence[str] | None = None
) -> pa.Table | None:
    """A prepared table's rows of one part as `canonical` gave them, so that other rows can be held against
    them; None where there are none. `fields` as in `prepare`."""
    fields = KINDS[kind].FIELDS if fields is None else fields
    wanted = pc.and_(pc.equal(table["part"], part), pc.invert(table["swapped"])).to_numpy()
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


def _without_leaks(ours: Keyed, test: Keyed | None, shared: str, leaks: str) -> tuple[Keyed, dict[str, int]]:
    """Our rows less those that are in the test part, and how many those were. shared: what is looked at."""
    if test is None:
        return ours, {"rows": 0, "dropped": 0}
    leaked = np.isin(ours.content, test.content) | np.isin(ours.group, test.group)
    count, what = int(leaked.sum()), f"the {shared} of a test row"
    if leaks == "error" and count:
        first = ours.table["id"][int(leaked.argmax())].as_py()
        raise DataError(
            f"{count} {ours.part} rows have {what}, first {first!r}: remove them, or set leaks to drop"
        )
    if leaks != "drop":
        return ours, {"rows": count, "dropped": 0}
    if leaked.all():
        raise DataError(f"every {ours.part} row has {what}: give a test part of its own")
    return ours.less(leaked), {"rows": count, "dropped": count}


def _without_known(ours: Keyed, known: Keyed) -> tuple[Keyed, int]:
    """Our rows less those of equal content in the training rows, where they have a label too."""
    twice = np.isin(ours.content, known.content)
    if twice.all():
        what = "row" if ours.part == "train" else f"{ours.part} row"  # other rows to train on first, as well
        raise DataError(f"every {what} stands in task.train too: give others, or leave them out")
    return ours.less(twice), int(twice.sum())


def _duplicates(part: Keyed, kind: str) -> dict[str, int]:
    """Rows beyond the first of their content, and how many contents carry more than one known label."""
    keys, labels = part.content, part.labels
    mirror = KINDS[kind].mirror(max(int(labels.max(initial=1)) + 1, 2))
    if mirror is not None:
        labels = np.where(part.turned & (labels >= 0), np.array([*mirror, -1])[labels], labels)
    repeated, known = len(keys) - len(np.unique(keys)), labels >= 0
    keys, labels = keys[known], labels[known]
    order = np.lexsort((labels, keys))
    keys, labels = keys[order], labels[order]
    torn = keys[1:][(keys[1:] == keys[:-1]) & (labels[1:] != labels[:-1])]
    return {"rows": repeated, "conflicting": len(np.unique(torn))}


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
    columns |= preference.swap({name: table[name] for name in text_columns(table)})
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
