"""Ids out of their column, and logits out of arrays: the same as lists and dicts would give."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from llmkd import crossfit, logits, mapped
from llmkd.ids import Ids
from llmkd.kept import Kept, in_order

WORDS = [f"r{n}" for n in range(3000)]


def column(words: list[str], chunk: int) -> pa.ChunkedArray:
    parts = [words[start : start + chunk] for start in range(0, len(words), chunk)]
    return pa.chunked_array([pa.array(part, pa.string()) for part in parts], pa.string())


@pytest.mark.parametrize("chunk", [1, 7, 1024, 3000])
def test_ids_are_those_of_a_list(chunk: int) -> None:
    ids = Ids(column(WORDS, chunk))
    assert list(ids) == WORDS
    assert [ids[0], ids[2999], ids[-1]] == ["r0", "r2999", "r2999"]
    assert ids[5:2000:3] == WORDS[5:2000:3]
    assert ids[10:10] == []
    assert ids[::-1] == WORDS[::-1]
    assert ids[3::-1] == WORDS[3::-1]


def test_ids_of_some_rows_and_of_some_of_those() -> None:
    rows = np.random.default_rng(0).permutation(len(WORDS))[:1500]
    ids = Ids(column(WORDS, 100)).of(rows)
    assert list(ids) == [WORDS[row] for row in rows]
    assert ids[3] == WORDS[rows[3]]
    assert ids[::-1] == [WORDS[row] for row in rows[::-1]]
    some = np.array([7, 2, 1400])
    assert list(ids.of(some)) == [WORDS[rows[at]] for at in some]
    assert len(ids) == 1500
    assert list(Ids(column([], 1))) == []


def test_a_list_becomes_ids_and_ids_stay() -> None:
    ids = Ids.over(WORDS)
    assert list(ids) == WORDS
    assert Ids.over(ids) is ids


def test_what_stands_twice_is_named_once() -> None:
    assert Ids.over(WORDS).repeated == []
    assert Ids.over([*WORDS, "r5", "r2", "r5"]).repeated == ["r2", "r5"]


def test_one_hash_of_two_ids_is_no_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.hash", lambda id: len(id))
    assert Ids.over(["aa", "bb"]).repeated == []
    assert Ids.over(["aa", "bb", "aa"]).repeated == ["aa"]


def test_logits_of_several_ranks_stand_in_the_order_asked_for() -> None:
    values = np.random.default_rng(1).normal(size=(10, 3)).astype(np.float32)
    kept = Kept()
    for batch in (np.array([9, 2]), np.array([], dtype=np.int64), np.array([4])):
        kept.add(batch, values[batch])
    assert len(kept) == 3
    rows = np.array([4, 9, 2, 0])
    more = np.array([0, 9, 7])  # 9 twice, 7 not asked for
    found = in_order(rows, [kept.joined(), (more, values[more]), Kept().joined()])
    np.testing.assert_array_equal(found, values[rows])
    assert in_order(np.array([], dtype=np.int64), [Kept().joined()]).shape == (0, 0)
    with pytest.raises(KeyError, match="4"):
        in_order(rows, [Kept().joined()])


def test_rows_that_several_ranks_kept_count_once() -> None:
    kept = Kept()
    for batch in (np.array([3, 1]), np.array([1, 3])):
        kept.add(batch, np.repeat(batch[:, None], 2, axis=1).astype(np.float32))
    rows, values = kept.once().joined()
    assert rows.tolist() == [1, 3]
    np.testing.assert_array_equal(values, [[1, 1], [3, 3]])


@pytest.mark.parametrize("shape", [(3, 2), (200_000, 2, 3)])
def test_zeros_can_be_written_over_wherever_they_lie(shape: tuple[int, ...]) -> None:
    found = mapped.zeros(shape, np.float32)
    assert found.shape == shape
    assert not found.any()
    found[-1] = 4
    assert found.sum() == 4 * np.prod(shape[1:])


def test_a_cache_of_several_row_groups_joined_in_its_order_and_in_another(tmp_path: Path) -> None:
    many = [f"r{n}" for n in range(2 * logits.GROUP + 5)]
    values = np.random.default_rng(2).normal(size=(len(many), 2)).astype(np.float32)
    half, path = logits.GROUP + 3, tmp_path / "logits.parquet"
    views = {"oof": (many[:half], values[:half]), "test": (many[half:], values[half:])}
    logits.write(path, views, teacher="t", labels=["x", "y"])
    for view, (ids, wanted) in views.items():
        np.testing.assert_array_equal(logits.read(path, view, ids, labels=["x", "y"]), wanted)
        backwards = logits.read(path, view, ids[::-1], labels=["x", "y"])
        np.testing.assert_array_equal(backwards, wanted[::-1])


def test_writing_and_joining_caches_hold_no_ids(tmp_path: Path) -> None:
    """What a row takes beside its own logits: as a string of Python's an id alone takes 60 bytes."""
    count, labels = 100_000, ["x", "y"]
    names = column([f"train-{n:07d}" for n in range(count)], mapped.BATCH)
    folds = np.arange(count) % 2
    table = pa.table({"id": names, "part": pa.array(["train"] * count).dictionary_encode(), "fold": folds})
    values = np.random.default_rng(3).normal(size=(count, 2)).astype(np.float32)
    places = [tmp_path / "0", tmp_path / "1"]
    tracemalloc.start()
    for fold, place in enumerate(places):
        place.mkdir()
        views = crossfit.view_rows(table, fold, 2)
        views = {view: at for view, at in views.items() if len(at)}
        own = {view: values[at] for view, at in views.items()}
        crossfit.write_views(place, Ids(table["id"]), views, own, "t", labels)
    wrote = tracemalloc.get_traced_memory()[1] / count
    del own, views
    tracemalloc.reset_peak()
    teachers = {"t": lambda fold: places[fold]}
    found = crossfit.teacher_logits(table, teachers, 0, count=2, view="oof", labels=labels)
    joined = tracemalloc.get_traced_memory()[1] / count
    tracemalloc.stop()
    np.testing.assert_array_equal(found[folds == 1, 0], values[folds == 1])
    assert wrote < 60
    assert joined < 60
