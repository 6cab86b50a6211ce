"""Mapped rows and tokens: equal to what was written, and not held in memory."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkd import mapped


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
