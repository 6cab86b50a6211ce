"""A source's table checked and renamed to the columns of its kind; every problem is told at once.

Row numbers in messages and in generated ids count the source's rows from 0.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llmkd import mapped
from llmkd.errors import DataError
from llmkd.ids import Ids
from llmkd.tasks import KINDS, content
from llmkd.tasks.image import BYTES

SWAPPED = "#swapped"
OWN_COLUMNS = ("id", "stem", "swapped", "group", "part", "fold", "label", "bayes")
Part = Literal["train", "test", "transfer"]
Texts: TypeAlias = pa.Array | pa.ChunkedArray


def canonical(
    table: pa.Table,
    *,
    part: Part,
    kind: str,
    columns: Mapping[str, str] | None = None,
    label: str | Sequence[str] | None = "label",
    labels: Sequence[str],
    label_values: Mapping[str, int] | None = None,
    id_column: str | None = None,
    extra: Sequence[str] = (),
    turns: Literal["text", "json"] = "text",
    empty: Literal["error", "drop"] = "error",
    features: Mapping[str, Any] | None = None,
    image: Mapping[str, Any] | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """One part's rows as id, part, label, the kind's fields, `extra` (and bayes where the source has it).

    `columns` maps a field to its column in the source, identity where absent. `label` is a column of ints
    (-1 = unknown) or of names, a list of one-hot columns in the order of `labels`, or None for unlabelled
    rows; `label_values` maps the source's values to class numbers. Rows of the part transfer are unlabelled
    whatever they carry. With `turns` json, a field is a JSON list of turns. `empty` drop leaves out rows
    whose content is empty instead of refusing them. `features` (numeric, categorical, steps) and
    `image` (column, shape) name the columns of the kinds that have no texts; these keep their names.
    The second result counts rows and dropped rows. Every problem found is in one DataError.
    """
    task, label = KINDS[kind], None if part == "transfer" else label
    named = {field: (columns or {}).get(field, field) for field in (*task.FIELDS, *extra)}
    settings = features if kind == "tabular" else image
    plain = () if task.FIELDS else content(kind, settings)
    _check_columns(table, part, _wanted(task.FIELDS, named, plain, kind, label, id_column))
    problems: list[str] = []
    _check_names(plain, extra, (*task.FIELDS, *task.COMPUTED), problems)
    _check_flat(table, part, label, id_column)
    texts = {
        field: plain_texts(table[named[field]], field, turns if field in task.FIELDS else "text", problems)
        for field in named
    }
    data = texts if task.FIELDS else task.read(table, settings, problems)
    numbers = labels_of(table, label, labels, label_values, problems)
    ids = _ids(table, part, id_column, problems)
    blank = blank_rows(texts, kind, table.num_rows) if task.FIELDS else task.blank(data)
    if empty == "error" and blank.any():
        problems.append(_emptiness(texts, kind, blank))
    _raise(part, problems)
    data = {
        "id": ids,
        "part": pa.repeat(part, table.num_rows),
        "label": numbers,
        **data,
        **texts,
    }
    if "bayes" in table.column_names and "bayes" not in texts:
        data["bayes"] = table["bayes"].cast(pa.list_(pa.float32()))
    rows = mapped.filtered(pa.table(data), ~blank)
    if not rows.num_rows:
        raise DataError(f"{part}: no rows are left: give a source that has some")
    return rows, {"rows": rows.num_rows, "dropped_empty": int(blank.sum())}


def _wanted(
    fields: Sequence[str],
    named: Mapping[str, str],
    plain: Sequence[str],
    kind: str,
    label: str | Sequence[str] | None,
    id_column: str | None,
) -> dict[str, str]:
    """Every column that the source must have -> the key of the config that names it."""
    wanted = dict.fromkeys(plain, "task.features" if kind == "tabular" else "task.image.column")
    for field, column in named.items():
        own = field in fields or column != field
        wanted[column] = f"task.columns.{field}" if own else "task.extra"
    wanted |= dict.fromkeys([label] if isinstance(label, str) else label or (), "task.label")
    return wanted | ({id_column: "task.id"} if id_column else {})


def _check_columns(table: pa.Table, part: str, wanted: Mapping[str, str]) -> None:
    """Columns that are not there end the check: nothing else can be said without them."""
    missing = [f"{name!r} (correct {key})" for name, key in wanted.items() if name not in table.column_names]
    if missing:
        raise DataError(f"{part}: no column {', '.join(missing)}: there are {', '.join(table.column_names)}")


def _check_flat(table: pa.Table, part: str, label: str | Sequence[str] | None, id_column: str | None) -> None:
    """Labels and ids are compared as strings: a list or bytes have none."""
    for name in (*([label] if isinstance(label, str) else label or ()), *([id_column] if id_column else ())):
        kind = table[name].type
        if pa.types.is_nested(kind) or any(is_bytes(kind) for is_bytes in BYTES):
            raise DataError(f"{part}: column {name!r} is {kind}: labels and ids are strings or whole numbers")


def _check_names(
    plain: Sequence[str], extra: Sequence[str], fields: Sequence[str], problems: list[str]
) -> None:
    taken = [name for name in extra if name in (*OWN_COLUMNS, *fields, *plain)]
    if taken:
        problems.append(f"extra column {taken[0]!r} has a name that is taken: rename it with task.columns")
    clash = [name for name in plain if name in OWN_COLUMNS]
    if clash:
        problems.append(f"column {clash[0]!r} has a name that is taken: rename it in the source")


def plain_texts(column: pa.ChunkedArray, field: str, turns: str, problems: list[str]) -> pa.ChunkedArray:
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        if turns == "text" or not _is_list_of_text(column.type):
            problems.append(f"field {field!r} is {column.type}, not text: map it to a column of strings")
            return pa.chunked_array([pa.array(["?"] * len(column))])
        return _joined(column, field, lambda value: value, problems)
    if turns == "json":
        return _joined(column.cast(pa.string()), field, json.loads, problems)
    if column.null_count or not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        parts = (pc.fill_null(part.cast(pa.string()), "") for _, part in mapped.slices(column))
        return mapped.column(pa.string(), parts)
    return column.cast(pa.string())  # the texts are not copied


def _joined(
    column: pa.ChunkedArray, field: str, parse: Callable[[Any], Any], problems: list[str]
) -> pa.ChunkedArray:
    """Turns joined by blank lines; a null turn is empty."""
    wrong: list[int] = []

    def joined(place: int, value: Any) -> str:
        try:
            turns = parse(value or "[]")
            return _encodable("\n\n".join("" if turn is None else turn for turn in turns))
        except (ValueError, TypeError, RecursionError):
            wrong.append(place)
            return "?"

    parts = (
        pa.array([joined(place, value) for place, value in enumerate(part.to_pylist(), start)], pa.string())
        for start, part in mapped.slices(column)
    )
    texts = mapped.column(pa.string(), parts)
    if wrong:
        problems.append(
            f"{len(wrong)} rows of {field!r} are no JSON list of turns, first row {wrong[0]}: "
            "mend them or set task.turns to text"
        )
    return texts


def _encodable(text: str) -> str:
    # JSON may escape half of a surrogate pair, which UTF-8 cannot hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_list_of_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)) and bool(
        pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)
    )


def labels_of(
    table: pa.Table,
    label: str | Sequence[str] | None,
    names: Sequence[str],
    values: Mapping[str, int] | None,
    problems: list[str],
) -> pa.Array:
    if label is None:
        return pa.array(np.full(table.num_rows, -1, dtype=np.int32))
    if not isinstance(label, str):
        return _one_hot(table.select(list(label)), names, problems)
    column = table[label]
    if pa.types.is_floating(column.type):
        problems.append(f"label column {label!r} holds floats: write whole numbers, -1 where it is unknown")
        return pa.array(np.full(table.num_rows, -1, dtype=np.int32))
    known = _known_values(column.type, names, values)
    outside = [name for name, number in known.items() if not -1 <= number < len(names)]
    if outside:
        problems.append(
            f"label value {outside[0]!r} maps to {known[outside[0]]}, outside the {len(names)} labels"
        )
    strings = column.cast(pa.string())
    places = pc.index_in(strings, value_set=pa.array(list(known), pa.string()))
    _report_unknown(strings, places, label, known, problems)
    numbers = np.array([*known.values(), -1], dtype=np.int32)
    return pa.array(numbers[pc.fill_null(places, len(known)).to_numpy()])


def _known_values(
    kind: pa.DataType, names: Sequence[str], values: Mapping[str, int] | None
) -> dict[str, int]:
    if values is not None:
        return {str(value): number for value, number in values.items()}
    numbers = {str(number): number for number in range(-1, len(names))}
    by_name = {name: number for number, name in enumerate(names)}
    if pa.types.is_integer(kind):
        return numbers
    # A CSV's numbers arrive as strings; names that look like numbers must not be taken for them.
    return by_name if set(by_name) & set(numbers) else numbers | by_name


def _report_unknown(
    strings: pa.ChunkedArray, places: pa.ChunkedArray, label: str, known: Iterable[str], problems: list[str]
) -> None:
    unknown = np.flatnonzero(pc.is_null(places).to_numpy())
    if not len(unknown):
        return
    first = int(unknown[0])
    value = strings[first].as_py()
    shown = "missing" if value is None else repr(value[:40])
    problems.append(
        f"{len(unknown)} labels in {label!r} are unknown, first {shown} in row {first}: "
        f"known are {', '.join(list(known)[:12])}"
    )


def _one_hot(table: pa.Table, names: Sequence[str], problems: list[str]) -> pa.Array:
    if len(names) != table.num_columns:
        problems.append(f"{table.num_columns} one-hot columns for {len(names)} labels: give one each")
        return pa.array(np.full(table.num_rows, -1, dtype=np.int32))
    hot, cold = _among(table, ["1", "1.0", "true"]), _among(table, ["0", "0.0", "false"])
    wrong = np.flatnonzero((hot.sum(axis=1) != 1) | ~(hot | cold).all(axis=1))
    if len(wrong):
        problems.append(
            f"{len(wrong)} rows are not one-hot in {', '.join(table.column_names)}, "
            f"first row {wrong[0]}: exactly one must be 1, the others 0"
        )
    return pa.array(hot.argmax(axis=1).astype(np.int32))


def _among(table: pa.Table, values: list[str]) -> npt.NDArray[np.bool_]:
    wanted = pa.array(values)
    found = [pc.is_in(column.cast(pa.string()), value_set=wanted).to_numpy() for column in table.columns]
    return np.stack(found, axis=1)


def numbered(part: str, stop: int, start: int = 0) -> list[str]:
    """Ids of the rows of a part that has none of its own."""
    return [f"{part}-{row:07d}" for row in range(start, stop)]


def _ids(table: pa.Table, part: str, id_column: str | None, problems: list[str]) -> Texts:
    if id_column is None:
        starts = range(0, table.num_rows, mapped.BATCH)
        names = (numbered(part, min(start + mapped.BATCH, table.num_rows), start) for start in starts)
        return mapped.column(pa.string(), (pa.array(some, pa.string()) for some in names))
    ids = pc.fill_null(table[id_column].cast(pa.string()), "")
    twice = [id for id in Ids(ids).repeated if id]
    if empty := pc.sum(pc.equal(ids, "")).as_py():
        problems.append(f"{empty} rows have no id in {id_column!r}: fill them")
    if twice:
        problems.append(
            f"{len(twice)} ids in {id_column!r} repeat, first {twice[0]!r}: "
            "make them unique, or leave task.id out"
        )
    if pc.any(pc.ends_with(ids, SWAPPED)).as_py():
        problems.append(f"an id in {id_column!r} ends with {SWAPPED}, the mark of swapped copies: rename it")
    return ids


def blank_rows(texts: Mapping[str, pa.ChunkedArray], kind: str, count: int) -> npt.NDArray[np.bool_]:
    """Rows that lack a text in all fields of one of the kind's NEEDED alternatives."""
    without = np.zeros(count, dtype=bool)
    for alternatives in KINDS[kind].NEEDED:
        empty = [_blank(texts[field]) for field in alternatives]
        without |= np.all(empty, axis=0)
    return without


def _blank(column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    parts = (pc.utf8_trim_whitespace(part) for _, part in mapped.slices(column))
    return np.concatenate([np.empty(0, bool), *(pc.equal(part, "").to_numpy() for part in parts)])


def _emptiness(texts: Mapping[str, pa.ChunkedArray], kind: str, blank: npt.NDArray[np.bool_]) -> str:
    first = int(blank.argmax())
    if not KINDS[kind].FIELDS:
        return f"{blank.sum()} rows have no {KINDS[kind].WHOLE}, first row {first}: fill or drop them"
    names = " and ".join(name for name in KINDS[kind].FIELDS if not texts[name][first].as_py().strip())
    return f"{blank.sum()} rows lack a text, first row {first} ({names}): fill or drop them"


def _raise(part: str, problems: Sequence[str]) -> None:
    if problems:
        raise DataError(f"{part}: " + "; ".join(problems))
