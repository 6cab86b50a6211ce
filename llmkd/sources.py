"""Where rows come from: a file, a glob, a hub data set, or the embedded data."""

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pyarrow as pa

from llmkd.errors import DataError
from llmkd.tasks import arena

_LINE = re.compile(r"\n|<br\s*/?>")
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


def read(source: str, *, seed: int = 0) -> pa.Table:
    """The rows of a source as they are.

    A path or a glob ending in .csv (every column is read as strings), .jsonl, .ndjson, .json (one object
    a line) or .parquet; `hub:owner/name[:config[:split]]` (split train where none is named);
    `arena:rows=3000,seed=1,judge=machine`, the embedded data (`seed` where the source names none).
    Raises DataError.
    """
    if source.startswith("hub:"):
        return _read_hub(source)
    if source.startswith("arena:"):
        return _read_arena(source, seed)
    suffix = Path(source).suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{source}: suffix {suffix!r} is not read: use {', '.join(READERS)}, hub: or arena:")
    paths = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))
    if not paths:
        raise DataError(f"{source}: no such file: correct the path")
    try:
        return pa.concat_tables([READERS[suffix](path) for path in paths], promote_options="permissive")
    except pa.ArrowException as error:
        line = " ".join(str(error).split())
        raise DataError(f"{source}: cannot be read as {suffix} ({line[:200]}): mend the file") from error


def _read_csv(path: str) -> pa.Table:
    from pyarrow import csv

    # Strings throughout: a guessed type would turn the id 007 into 7 and a text "12" into a number.
    parse = csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(path, parse_options=parse) as reader:
        names = reader.schema.names
    types = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    return csv.read_csv(path, parse_options=parse, convert_options=types)


def _read_json(path: str) -> pa.Table:
    from pyarrow import json as lines

    # A row must fit a block; the default of 1 MB is less than one long document.
    return lines.read_json(path, lines.ReadOptions(block_size=1 << 26))


def _read_parquet(path: str) -> pa.Table:
    from pyarrow import parquet

    return parquet.read_table(path, partitioning=None)


READERS: dict[str, Callable[[str], pa.Table]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
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
    for text in table[column].to_pylist():
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
