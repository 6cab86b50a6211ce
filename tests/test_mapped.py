"""Mapped rows and tokens: equal to what was written, and not held in memory."""

import errno
import os
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkd import lm_rows, mapped
from llmkd.errors import DataError, RunError


def rows(count: int) -> pa.Table:
    columns = {"id": [f"row{i}" for i in range(count)], "text": [f"{i} " * 200 for i in range(count)]}
    return pa.table(columns).replace_schema_metadata({b"labels": b'["a", "b"]'})


@pytest.mark.parametrize("count", [0, 1, 20_000])
def test_a_mapped_table_equals_the_file(tmp_path, count):
    pq.write_table(rows(count), tmp_path / "rows.parquet", compression="zstd")
    table = mapped.table(tmp_path / "rows.parquet")
    assert table.equals(rows(count), check_metadata=True)


def test_a_mapped_table_takes_no_memory_of_its_own(tmp_path):
    pq.write_table(rows(20_000), tmp_path / "rows.parquet", compression="zstd")
    before = pa.total_allocated_bytes()
    table = mapped.table(tmp_path / "rows.parquet")
    assert table.nbytes > 10_000_000
    assert pa.total_allocated_bytes() - before < 100_000


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 5]])
def test_mapped_tokens_are_the_parts_end_to_end(lengths):
    parts = [np.arange(length, dtype=np.int32) for length in lengths]
    found = mapped.tokens(iter(parts))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.concatenate([np.empty(0, np.int32), *parts]))


def test_mapped_tokens_lie_in_a_file():
    assert isinstance(mapped.tokens([np.ones(4, np.int32)]), np.memmap)


def failing(number):
    def fail(*given, **named):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("where", "number", "why"),
    [
        ("tempfile.SpooledTemporaryFile.write", errno.EFBIG, "File too large"),
        ("tempfile.SpooledTemporaryFile.rollover", errno.EACCES, "Permission denied"),
        ("tempfile.SpooledTemporaryFile.close", errno.EIO, "Input/output error"),
        ("mmap.mmap", errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_a_fault_of_the_temporary_file_names_its_directory(monkeypatch, where, number, why):
    monkeypatch.setattr(where, failing(number))
    message = f"temporary directory '{tempfile.gettempdir()}': {why}; name another with TMPDIR"
    with pytest.raises(RunError) as caught:
        mapped.copied(rows(1).schema, [rows(5000)])
    assert str(caught.value) == message


def test_no_usable_temporary_directory_is_told_with_the_one_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", failing(errno.ENOENT))
    monkeypatch.setenv("TMPDIR", "/nowhere")
    for work in (lambda: mapped.copied(rows(1).schema, [rows(5000)]), lambda: mapped.Column(np.int32)):
        with pytest.raises(RunError, match=r"temporary directory '/nowhere': .*; name another with TMPDIR"):
            work()


def test_a_fault_of_what_is_copied_stays_as_it_is():
    def parts():
        yield rows(5000)
        raise PermissionError(errno.EACCES, "Permission denied", "rows.parquet")

    with pytest.raises(PermissionError, match=r"Permission denied: 'rows\.parquet'"):
        mapped.copied(rows(1).schema, parts())


def test_a_chats_column_may_have_braces_in_its_name():
    table = pa.table({"a {row} {": ['[{"role": "user", "content": "x"}]', "no chat"]})
    with pytest.raises(DataError, match=r"train: row 1 of 'a \{row\} \{' is no list of role and content"):
        lm_rows.chats_as_text(table, "a {row} {", "train")
    assert lm_rows.chats_as_text(table.slice(0, 1), "a {row} {", "train").num_rows == 1
