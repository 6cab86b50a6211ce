"""Stage 00 holds a few texts at a time, whatever there is: the others lie in mapped files."""

import errno
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from llmkd import mapped, rows, sources
from llmkd.errors import DataError, RunError

COUNT = 20_000
WORDS = (" " + "word" * 24) * 20  # 1,940 bytes
FIELDS = ("prompt", "response_a", "response_b")


def pairs(start: int, count: int, **changes: Any) -> pa.Table:
    numbers = range(start, start + count)
    said = {field: [f"{field} {i}{WORDS}" for i in numbers] for field in FIELDS}
    return pa.table({**said, "label": ["ab"[i % 2] for i in numbers], **changes})


def with_nulls(start: int, count: int) -> pa.Table:
    """A tenth of the rows has a null for an answer, a tenth no prompt."""
    table = pairs(start, count)
    numbers = np.arange(count)
    prompts = pa.array(table["prompt"].to_pylist(), pa.string(), mask=numbers % 10 == 1)
    answers = pa.array(table["response_a"].to_pylist(), pa.string(), mask=numbers % 10 == 0)
    return table.set_column(0, "prompt", prompts).set_column(1, "response_a", answers)


def prepared(train: Path, test: Path, into: Path) -> pa.Table:
    tables = [
        rows.canonical(rows.read(str(path)), part=part, kind="preference", labels=["a", "b"], empty="drop")[0]
        for part, path in (("train", train), ("test", test))
    ]
    table, _ = rows.prepare(*tables, kind="preference", swap=True, group="prompt", folds=2, seed=1)
    mapped.write(table, into)
    return table


def written(table: pa.Table, path: Path) -> Path:
    (csv.write_csv if path.suffix == ".csv" else pq.write_table)(table, path)
    return path


@pytest.mark.parametrize(
    ("suffix", "make", "share", "anonymous_share"),
    [(".parquet", pairs, 0.3, 0.5), (".csv", with_nulls, 0.3, 0.6)],
)
def test_rows_are_prepared_without_their_texts_in_memory(
    suffix: str, make: Callable[[int, int], pa.Table], share: float, anonymous_share: float, tmp_path: Path
) -> None:
    tables = [make(0, COUNT), make(COUNT - 100, 300), make(0, 100)]  # a hundred leak
    size = tables[0].nbytes
    paths = [written(table, tmp_path / f"{n}{suffix}") for n, table in enumerate(tables)]
    del tables
    command = [sys.executable, __file__, *map(str, paths), str(tmp_path / "rows.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    arrow, anonymous = map(int, done.stdout.split())
    assert size > 100_000_000
    assert arrow < share * size, "some blocks of a CSV, some thousand rows of a Parquet file"
    assert anonymous < anonymous_share * size, "Python's strings and bytes are no more"


def test_a_row_longer_than_a_piece_leaves_the_file_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = pairs(50, 1, prompt=["y" * 40_000])
    path = written(pa.concat_tables([pairs(0, 50), long, pairs(51, 50)]), tmp_path / "rows.csv")
    whole = csv.read_csv(path)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "PIECE", 20_000)
        patch.setattr(sources, "BLOCK", 90_000)
        table = rows.read(str(path))
        assert table.equals(whole)
        assert table["prompt"].num_chunks > 2
        with path.open("a") as file:
            file.write("1,2\n")
        with pytest.raises(DataError, match=r"Row #103: Expected 4 columns, got 2: 1,2\): mend the file"):
            rows.read(str(path))


def test_small_copies_stay_in_memory_and_large_ones_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for count in (0, 3, 2000):
        table = pairs(0, count)
        copy = mapped.copied(table.schema, (part for _, part in mapped.slices(table)))
        assert copy.equals(table)
        assert not list(tmp_path.iterdir())
        assert mapped.filtered(copy, np.ones(len(copy), bool)) is copy
        keep = np.arange(count) % 3 == 0
        assert mapped.filtered(copy, keep).equals(table.filter(pa.array(keep)))


def test_a_disk_too_full_for_the_copy_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told as what it is, so that the stage says to free some space, not to mend the file."""

    class Full(tempfile.SpooledTemporaryFile[bytes]):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    for suffix in (".parquet", ".csv"):
        path = written(pairs(0, 5), tmp_path / f"rows{suffix}")
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "SpooledTemporaryFile", Full)
            with pytest.raises(
                OSError, match=f"No space left on device: '{tempfile.gettempdir()}'"
            ) as caught:
                rows.read(str(path))
        assert not isinstance(caught.value, DataError)
        assert rows.read(str(path)).num_rows == 5


def anonymous_now() -> int:
    """Bytes of this process that are no file's; 0 where the system does not tell (only Linux does)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def anonymous_peak(work: Callable[[], Any]) -> int:
    """The most of `anonymous_now` while `work` goes on, over what there was before."""
    before, seen, done = anonymous_now(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            seen.append(anonymous_now())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen) - before


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_temporary_directory_that_cannot_be_used_is_no_fault_of_the_file(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in pairs(0, 1000).to_pylist()))
    else:
        written(pairs(0, 1000), path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    told = "temporary directory '.*gone': No such file or directory; name another with TMPDIR"
    with pytest.raises(RunError, match=told):
        rows.read(str(path))


if __name__ == "__main__":  # in a process of its own: most bytes that Arrow has held in it, and most of all
    train, test, few, into = map(Path, sys.argv[1:])
    prepared(few, test, into)  # every import once
    peak = anonymous_peak(lambda: prepared(train, test, into))
    print(pa.default_memory_pool().max_memory(), peak)
