"""The logits cache: joined by id, exact to the set, and every damage told with its remedy."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmkd import logits
from llmkd.errors import CacheError

LABELS = ["a", "b", "tie"]
IDS = ["r1", "r2", "r3"]
FLOATS = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False, width=32)
VALUES = np.array([[0.1, 2, 3], [4, 5, -6], [7, 8, 1e-7]], dtype=np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "logits.parquet"
    views = {"in_sample": (IDS, VALUES), "test": (["t#swapped"], VALUES[:1] * 2)}
    logits.write(path, views, teacher="llama", labels=LABELS)
    return path


def raw(path: Path, ids: list[str], rows: list[list[float] | None], labels: object = LABELS) -> Path:
    """A file as some other program might leave it."""
    table = pa.table(
        {"id": ids, "view": ["test"] * len(ids), "logits": pa.array(rows, pa.list_(pa.float32()))}
    )
    pq.write_table(table.replace_schema_metadata({"labels": json.dumps(labels)}), path)
    return path


def test_rows_come_in_the_order_asked_for(file: Path) -> None:
    np.testing.assert_array_equal(
        logits.read(file, "in_sample", ["r3", "r1", "r2"], labels=LABELS), VALUES[[2, 0, 1]]
    )


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("view", ["oof", "ärger", "test"])
def test_views_that_share_row_groups_do_not_mix(tmp_path: Path, counted: bool, view: str) -> None:
    """As some other program may write them, with or without each group's least and greatest view."""
    views = ["oof", "ärger", "test", "oof", "test", "ärger", "oof"]
    ids, values = [f"r{n}" for n in range(len(views))], np.arange(3.0 * len(views), dtype=np.float32)
    columns = [pa.array(ids), pa.array(views), pa.FixedSizeListArray.from_arrays(values, 3)]
    table = pa.table(columns, logits.COLUMNS).replace_schema_metadata({"labels": json.dumps(LABELS)})
    pq.write_table(table, tmp_path / "c", row_group_size=3, write_statistics=counted)
    rows = [n for n, one in enumerate(views) if one == view]
    found = logits.read(tmp_path / "c", view, [ids[n] for n in rows], labels=LABELS)
    np.testing.assert_array_equal(found, values.reshape(-1, 3)[rows])


def test_other_views_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = {name: ([f"{name}{n}" for n in range(20)], np.zeros((20, 3))) for name in ("oof", "test")}
    monkeypatch.setattr(logits, "GROUP", 8)
    logits.write(tmp_path / "c", views, teacher="t", labels=LABELS)
    read, batches = list[list[int]](), pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, *given, row_groups, **more: (
            read.append(row_groups),
            batches(self, *given, row_groups=row_groups, **more),
        )[1],
    )
    logits.read(tmp_path / "c", "test", views["test"][0], labels=LABELS)
    assert read == [[3, 4, 5]]


def test_views_do_not_mix(file: Path) -> None:
    np.testing.assert_array_equal(logits.read(file, "test", ["t#swapped"], labels=LABELS), VALUES[:1] * 2)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.lists(FLOATS, min_size=2, max_size=2)), st.data())
def test_round_trip_is_exact_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[str, list[float]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cache") / "logits.parquet"
    values = np.array(list(rows.values()), dtype=np.float32).reshape(-1, 2)
    logits.write(path, {"oof": (list(rows), values)}, teacher="t", labels=["x", "y"])
    asked = data.draw(st.permutations(list(rows)))
    found = logits.read(path, "oof", asked, labels=["x", "y"])
    expected = np.array([rows[id] for id in asked], dtype=np.float32).reshape(-1, 2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("view", "ids", "labels", "message"),
    [
        ("in_sample", [*IDS, "r4"], LABELS, "no in_sample logits for 1 of 4 rows, first 'r4'"),
        ("in_sample", IDS[:2], LABELS, "1 rows that are not this run's"),
        ("in_sample", ["r1", "r2", "r2"], LABELS, "twice"),
        ("oof", IDS, LABELS, "no oof logits for 3 of 3"),
        ("in_sample", IDS, ["b", "a", "tie"], "labels"),
        ("in_sample", IDS, ["a", "b"], "labels"),
    ],
)
def test_anything_but_the_exact_set_is_refused(
    file: Path, view: str, ids: list[str], labels: list[str], message: str
) -> None:
    with pytest.raises(CacheError, match=message) as error:
        logits.read(file, view, ids, labels=labels, remedy="make tea")
    assert str(error.value).startswith(str(file))
    assert "make tea" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no logits here; make tea"):
        logits.read(tmp_path / "none.parquet", "test", IDS, labels=LABELS, remedy="make tea")


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_a_truncated_file_is_refused(file: Path, keep: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(CacheError, match=r"not a logits cache .*; make tea"):
        logits.read(file, "in_sample", IDS, labels=LABELS, remedy="make tea")


@pytest.mark.parametrize("metadata", [None, {"labels": "not json"}, {"other": "[]"}])
def test_a_parquet_file_of_something_else_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": IDS, "view": ["test"] * 3}).replace_schema_metadata(metadata), path)
    with pytest.raises(CacheError, match="not a logits cache"):
        logits.read(path, "test", IDS, labels=LABELS)


def test_a_parquet_file_without_its_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": IDS}).replace_schema_metadata({"labels": json.dumps(LABELS)}), path)
    with pytest.raises(CacheError, match="not a logits cache"):
        logits.read(path, "test", IDS, labels=LABELS)


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        (["x", "y"], [[1, 2, 3], [1, float("nan"), 3]], "'y' has a logit that is not finite; make tea"),
        (["x", "y"], [[1, 2, 3], [1, float("-inf"), 3]], "'y' has a logit that is not finite; make tea"),
        (["x", "x"], [[1, 2, 3], [1, 2, 3]], "an id twice; make tea"),
        (["x", "y"], [[1, 2], [1, 2]], "do not hold 3 logits each; make tea"),
        (["x", "y"], [[1, 2, 3], None], "do not hold 3 logits each; make tea"),
    ],
)
def test_bad_rows_on_disk_are_refused(
    tmp_path: Path, ids: list[str], rows: list[list[float] | None], message: str
) -> None:
    path = raw(tmp_path / "other.parquet", ids, rows)
    with pytest.raises(CacheError, match=message):
        logits.read(path, "test", sorted(set(ids)), labels=LABELS, remedy="make tea")


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (["x", "x"], VALUES[:2], "twice"),
        (["x"], VALUES[:2], r"\(2, 3\), expected \(1, 3\)"),
        (["x"], VALUES[:1, :2], r"\(1, 2\), expected \(1, 3\)"),
        (["x"], VALUES[:1] * np.float32("nan"), "'x' has a logit that is not finite"),
    ],
)
def test_bad_rows_are_not_written_and_the_old_file_stays(
    file: Path, ids: list[str], values: NDArray[np.float32], message: str
) -> None:
    before = file.read_bytes()
    with pytest.raises(CacheError, match=message):
        logits.write(file, {"test": (ids, values)}, teacher="llama", labels=LABELS)
    assert file.read_bytes() == before


def test_the_file_says_whose_logits_and_of_which_labels_and_leaves_nothing_beside(file: Path) -> None:
    metadata = pq.read_schema(file).metadata
    assert metadata[b"teacher"] == b"llama"
    assert json.loads(metadata[b"labels"]) == LABELS
    assert [path.name for path in file.parent.iterdir()] == [file.name]
