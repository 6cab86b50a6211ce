"""Folds: groups stay whole, classes stay in proportion, and a fold's rows are the right ones."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from llmkd import folds
from llmkd.errors import DataError


def labelled(count: int = 300) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.str_]]:
    rng = np.random.default_rng(3)
    return rng.integers(0, 3, count), np.array([f"g{i}" for i in rng.integers(0, count // 3, count)])


def test_groups_stay_whole_and_classes_in_proportion() -> None:
    labels, groups = labelled()
    assigned = folds.assign(labels, groups, 5, seed=1)
    assert assigned.dtype == np.int16
    assert set(assigned) == set(range(5))
    for group in np.unique(groups):
        assert len(set(assigned[groups == group])) == 1
    for fold in range(5):
        shares = np.bincount(labels[assigned == fold], minlength=3) / (assigned == fold).sum()
        assert np.abs(shares - np.bincount(labels) / len(labels)).max() < 0.08
    folds.check(assigned, groups)


def test_many_groups_are_dealt_and_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "WALKED", 80)
    labels, groups = labelled()
    found = folds.assign(labels, groups, 5, seed=1)
    folds.check(found, groups)
    shares = [(labels[found == fold] == 0).mean() for fold in range(5)]
    assert max(shares) - min(shares) < 0.25
    sizes = np.bincount(found)
    assert len(sizes) == 5
    assert sizes.min() > 0.7 * sizes.max()


def test_the_largest_of_many_groups_are_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dealt by number alone, a few users of many rows would make folds of any size."""
    monkeypatch.setattr(folds, "WALKED", 1000)
    groups = np.concatenate([np.arange(1100), np.repeat(np.arange(20), 200)])
    labels = np.random.default_rng(1).integers(0, 3, len(groups))
    found = folds.assign(labels, groups, 5, seed=1)
    folds.check(found, groups)
    assert np.bincount(found).min() > 0.95 * np.bincount(found).max()


def test_the_seed_decides() -> None:
    labels, groups = labelled()
    first, again = (folds.assign(labels, groups, 5, seed=1) for _ in range(2))
    assert (first == again).all()
    assert (first != folds.assign(labels, groups, 5, seed=2)).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("stratify", [True, False])
def test_rows_of_their_own_fill_every_fold_evenly(stratify: bool) -> None:
    labels = np.arange(100) % 2
    assigned = folds.assign(labels, [str(i) for i in range(100)], 4, seed=0, stratify=stratify)
    assert np.bincount(assigned).tolist() == [25] * 4
    if stratify:
        assert {int(labels[assigned == fold].sum()) for fold in range(4)} <= {12, 13}


def test_one_fold_means_no_development_rows() -> None:
    assert folds.assign([0, 1, 0], ["a", "b", "c"], 1, seed=0).tolist() == [-1, -1, -1]


def test_unlabelled_rows_are_spread_too() -> None:
    assert set(folds.assign(np.full(10, -1), np.arange(10), 2, seed=0)) == {0, 1}


def test_a_fold_with_one_class_is_refused_by_number() -> None:
    labels = np.array([0] * 20 + [1] * 20)
    groups = np.array(["x"] * 20 + ["y"] * 20)
    with pytest.raises(
        DataError, match=r"fold 0 has fewer than two classes on its training side: .*folds.count"
    ):
        folds.assign(labels, groups, 2, seed=0)
    with pytest.raises(DataError, match=r"2 groups cannot fill 3 folds"):
        folds.assign(labels, groups, 3, seed=0)


def test_a_torn_group_is_found() -> None:
    folds.check([0, 0, 1, -1], ["a", "a", "b", "a"])
    with pytest.raises(DataError, match=r"1 groups stand in more than one fold .*'a'"):
        folds.check([0, 1, 1], ["a", "a", "b"])


def table() -> pa.Table:
    return pa.table(
        {
            "part": ["train"] * 4 + ["test"] * 2,
            "fold": pa.array([0, 0, 1, 1, -1, -1], pa.int16()),
            "swapped": [False, True] * 3,
        }
    )


def test_rows_of_a_fold() -> None:
    rows = table()
    assert folds.dev_rows(rows, 0).tolist() == [0]
    with pytest.raises(DataError, match=r"fold 2 is not among the rows' folds 0 to 1"):
        folds.dev_rows(rows, 2)


def test_a_single_fold_is_judged_on_nothing() -> None:
    single = table().set_column(1, "fold", pa.array([-1] * 6, pa.int16()))
    assert folds.dev_rows(single, 0).tolist() == []
