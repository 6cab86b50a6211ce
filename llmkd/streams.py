"""A file's rows a chunk at a time, and a file written a chunk at a time: memory does not grow with rows."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmkd.errors import DataError
from llmkd.sources import csv_layout, files, read, reason_of

CHUNK = 8192  # rows
BLOCK = 1 << 24  # bytes of a CSV that are parsed at once; a row must fit
Choose = Callable[[Sequence[str]], list[str]]


def chunks(source: str, choose: Choose, rows: int = CHUNK) -> Iterator[pa.Table]:
    """Tables of at most `rows` rows with the columns that `choose` picks from the names there are.

    Of objects it is asked again where further names come, and may refuse them.

    source: a path or a glob, of .csv (strings throughout), .jsonl, .ndjson, .json (an object a line) or
    .parquet; `hub:` and `arena:` as `llmkd.sources.read` has them, which are held whole.
    Raises DataError naming the file, and the line where it is known.
    """
    if source.startswith(("hub:", "arena:")):
        table = read(source)
        yield from _slices(table.select(choose(table.column_names)), rows)
        return
    suffix, paths = files(source)
    for path in paths:
        try:
            for table in READERS[suffix](path, choose, rows):
                table.validate(full=True)  # a reader may let bytes pass that are no UTF-8
                yield table
        except pa.ArrowException as error:
            raise DataError(
                f"{path}: cannot be read as {suffix} ({reason_of(error)}): mend the file"
            ) from error


def _slices(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, rows):
        yield table.slice(start, rows)


def _csv(path: str, choose: Choose, rows: int) -> Iterator[pa.Table]:
    from pyarrow import csv

    block, parse = csv_layout(path, BLOCK)
    with csv.open_csv(path, read_options=block, parse_options=parse) as reader:
        wanted = choose(reader.schema.names)
    # strings throughout, as in llmkd.sources: the id 007 stays what it is
    types = csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted)
    with csv.open_csv(path, read_options=block, parse_options=parse, convert_options=types) as reader:
        for batch in reader:
            yield from _slices(pa.Table.from_batches([batch]), rows)


def _parquet(path: str, choose: Choose, rows: int) -> Iterator[pa.Table]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        wanted = choose(file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=rows, columns=wanted):
            yield pa.Table.from_batches([batch])


def _lines(path: str, choose: Choose, rows: int) -> Iterator[pa.Table]:
    """Line by line, as a block's types, which Arrow's reader guesses, need not be those of the next."""
    names, wanted = dict[str, None](), list[str]()
    with open(path, "rb") as file:
        objects = (_object(path, number, line) for number, line in enumerate(file, 1) if line.strip())
        while found := list(islice(objects, rows)):
            known = len(names)
            names.update(dict.fromkeys(name for row in found for name in row))
            if len(names) > known:
                wanted = choose(list(names))
            yield pa.table({name: pa.array([row.get(name) for row in found]) for name in wanted})


def _object(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8))
        if b"\\ud" in line.lower():  # half a surrogate pair is no text
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {number} is not JSON ({error}): mend or remove it") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {number} is no JSON object: write one a line")
    return row


READERS: dict[str, Callable[[str, Choose, int], Iterator[pa.Table]]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _lines),
}


@contextmanager
def writing(output: Path) -> Iterator[Callable[[pa.Table], None]]:
    """A function that appends a table to `output`, in the format of its suffix.

    The file has its name only when the block ends without an error; else nothing is left.
    """
    if output.suffix.lower() not in WRITERS:
        raise DataError(f"{output}: suffix {output.suffix!r} is not written: use {', '.join(WRITERS)}")
    if not output.absolute().parent.is_dir():
        raise DataError(f"{output}: there is no folder {output.parent}: make it first")
    if output.is_dir():
        raise DataError(f"{output}: is a folder: name a file")
    beside, opened = output.with_name(f"{output.name}.{os.getpid()}.tmp"), list[Callable[[pa.Table], None]]()
    try:
        with ExitStack() as stack:

            def write(table: pa.Table) -> None:
                if not opened:
                    opened.append(WRITERS[output.suffix.lower()](stack, beside, table.schema))
                opened[0](table)

            yield write
        if opened:
            os.replace(beside, output)
    finally:
        beside.unlink(missing_ok=True)


def _to_parquet(stack: ExitStack, path: Path, schema: pa.Schema) -> Callable[[pa.Table], None]:
    from pyarrow import parquet

    return stack.enter_context(parquet.ParquetWriter(path, schema, compression="zstd")).write_table


def _to_csv(stack: ExitStack, path: Path, schema: pa.Schema) -> Callable[[pa.Table], None]:
    from pyarrow import csv

    return stack.enter_context(csv.CSVWriter(path, schema)).write_table


def _to_lines(stack: ExitStack, path: Path, schema: pa.Schema) -> Callable[[pa.Table], None]:
    file = stack.enter_context(path.open("w", encoding="utf-8"))
    return lambda table: file.writelines(
        json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()
    )


WRITERS: dict[str, Callable[[ExitStack, Path, pa.Schema], Callable[[pa.Table], None]]] = {
    ".parquet": _to_parquet,
    ".csv": _to_csv,
    ".jsonl": _to_lines,
}
