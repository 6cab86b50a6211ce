"""Where rows come from: a file, a glob, a hub data set, or the embedded data."""

import codecs
import glob
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from llmkd import mapped, run
from llmkd.errors import DataError
from llmkd.tasks import arena

BOM = codecs.BOM_UTF8
BLOCK = 1 << 26  # bytes; a row must fit one, and the readers' own 1 MB is less than one long document
PIECE = 1 << 20  # bytes of a CSV that are parsed at once where every row fits
_LINE = re.compile(r"\n|<br\s*/?>")
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


def read(source: str, *, seed: int = 0) -> pa.Table:
    """The rows of a source as they are; those of files are mapped, not held (see `llmkd.mapped`).

    A path or a glob ending in .csv (every column is read as strings; parted by comma, semicolon or tab),
    .jsonl, .ndjson, .json (one object a line) or .parquet; `hub:owner/name[:config[:split]]` (split train
    where none is named); `arena:rows=3000,seed=1,judge=machine`, the embedded data (`seed` where the
    source names none).
    Raises DataError.
    """
    if source.startswith("hub:"):
        return _read_hub(source)
    if source.startswith("arena:"):
        return _read_arena(source, seed)
    suffix, paths = files(source)
    try:
        return _joined([_whole(path, suffix) for path in paths])
    except pa.ArrowException as error:
        raise DataError(
            f"{source}: cannot be read as {suffix} ({reason_of(error)}): mend the file"
        ) from error


def files(source: str) -> tuple[str, list[str]]:
    """The suffix of a path or a glob, and the files that it names, in order. Raises DataError."""
    suffix = Path(source).suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{source}: suffix {suffix!r} is not read: use {', '.join(READERS)}, hub: or arena:")
    found = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))
    paths = [path for path in found if Path(path).is_file()]
    if not paths:
        what = "a directory, not a file" if found else "no such file"
        raise DataError(f"{source}: {what}: correct the path")
    return suffix, paths


def _joined(tables: list[pa.Table]) -> pa.Table:
    """The tables end to end, of one schema; copied only where theirs differ."""
    head = _permissive([table.slice(0, 0) for table in tables])
    if all(table.schema.equals(head.schema) for table in tables):
        return _permissive(tables)
    parts = (_permissive([head, part]) for table in tables for _, part in mapped.slices(table))
    return mapped.copied(head.schema, parts)


def _permissive(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="permissive")


def _whole(path: str, suffix: str) -> pa.Table:
    """One file's rows. Raises DataError naming it, and of JSON the line."""
    try:
        table = READERS[suffix](path)
        table.validate(full=True)  # a reader may let bytes pass that are no UTF-8
        return table
    except (pa.ArrowException, OSError) as error:
        if run.is_disk_full(error):
            raise
        reason = _broken_line(path) if READERS[suffix] is _read_json else None
        remedy = "save it as UTF-8" if "utf8" in str(error).lower() else "mend the file"
        raise DataError(
            f"{path}: cannot be read as {suffix} ({reason or reason_of(error)}): {remedy}"
        ) from error


def reason_of(error: Exception) -> str:
    """A reader's complaint on one line that may be printed."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(error).split())[:200])


def _broken_line(path: str) -> str | None:
    """The first line of a file that holds no JSON object, counted from 1."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                whole = not line.strip() or isinstance(json.loads(line.removeprefix(BOM)), dict)
            except (ValueError, RecursionError):
                whole = False
            if not whole:
                return f"line {number} is no JSON object"
    return None


def csv_layout(path: str, block: int) -> tuple[Any, Any]:
    """pyarrow's read and parse options, for blocks of so many bytes.

    The delimiter is that of comma, semicolon and tab which the first line has most of.
    """
    from pyarrow import csv

    with open(path, "rb") as file:
        head = re.sub(rb'"[^"]*"', b"", file.readline(block))  # what stands in quotes parts no columns
    delimiter = max(",;\t", key=lambda mark: head.count(mark.encode()))
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    return csv.ReadOptions(block_size=block), parse


def _read_csv(path: str) -> pa.Table:
    for size in (PIECE, 8 * PIECE):
        with suppress(pa.ArrowInvalid):  # a row longer than a piece, or a fault that is met again below
            return _csv_in_pieces(path, size)
    return _csv_in_pieces(path, BLOCK)


def _csv_in_pieces(path: str, size: int) -> pa.Table:
    """The rows, so many bytes of the file parsed at once.

    Strings throughout: a guessed type would turn the id 007 into 7 and a text "12" into a number.
    """
    with _csv(path, size, _names(path, size)) as reader:
        return mapped.copied(reader.schema, reader)


def _names(path: str, size: int) -> list[str]:
    with _csv(path, size, []) as reader:  # what it has read ahead goes with it, not with its closing
        return cast(list[str], reader.schema.names)


def _csv(path: str, size: int, strings: list[str]) -> Any:
    """pyarrow's reader of blocks of so many bytes, which makes strings of the named columns."""
    from pyarrow import csv

    _, parse = csv_layout(path, BLOCK)
    types = csv.ConvertOptions(column_types=dict.fromkeys(strings, pa.string()))
    # mapped, as 32 blocks are read ahead, which would be held
    source = pa.memory_map(path)
    return csv.open_csv(source, csv.ReadOptions(block_size=size), parse, types)


def _read_json(path: str) -> pa.Table:
    from pyarrow import json as lines  # of Arrow, where `json` is Python's

    table = lines.read_json(path, lines.ReadOptions(block_size=BLOCK))
    return mapped.copied(table.schema, table.to_batches(mapped.BATCH))


READERS: dict[str, Callable[[str], pa.Table]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": mapped.table,
}


def _read_hub(source: str) -> pa.Table:
    import datasets

    name, config, split, *rest = (*source.removeprefix("hub:").split(":"), "", "")
    if any(rest) or not name:
        raise DataError(f"{source}: write hub:owner/name, or hub:owner/name:config:split")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise DataError(f"{source}: cannot be loaded ({line}): check the name or give a file") from error
    return cast(pa.Table, dataset.with_format("arrow")[:])


def sentences(table: pa.Table, column: str, least: int, most: int) -> pa.Table:
    """The distinct sentences of `least` to `most` words in a column of texts, in their order, one a row.

    A sentence ends after . ! ? and their quotes, at a line's end, and at an HTML line break.
    """
    found: dict[str, None] = {}
    for text in (text for _, some in mapped.slices(table[column]) for text in some.to_pylist()):
        for line in _LINE.split(text or ""):
            pieces = (" ".join(piece.split()) for piece in _SENTENCE.split(line))
            found |= dict.fromkeys(piece for piece in pieces if least <= piece.count(" ") + 1 <= most)
    return pa.table({column: pa.array(list(found), pa.string())})


def arena_numbers(source: str, seed: int = 0) -> tuple[int, int]:
    """Row count and seed that an `arena:` source asks for; `seed` where it names none."""
    given = _arena_settings(source)
    return int(given["rows"]), int(given.get("seed", seed))


def _read_arena(source: str, seed: int) -> pa.Table:
    rows, own_seed = arena_numbers(source, seed)
    return arena.generate(rows, own_seed, judge=cast(arena.Judge, _arena_settings(source)["judge"]))


def _arena_settings(source: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in source.removeprefix("arena:").split(",")]
    given = {"judge": "human", **{key: value for key, _, value in pairs}}
    numbers = [given.get("rows", ""), given.get("seed", "0")]
    known = set(given) <= {"rows", "seed", "judge"} and given["judge"] in ("human", "machine")
    if not known or not all(number.isdecimal() for number in numbers) or not int(numbers[0]):
        raise DataError(f"{source}: write arena:rows=3000,seed=1,judge=human (or judge=machine)")
    return given
