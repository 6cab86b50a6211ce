"""Fold and test scores from caches: each row once, from the right fold, copies un-swapped."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from llmkd import judging, logits
from llmkd.errors import CacheError, DataError
from llmkd.evaluate import scores, softmax, unswapped

LABELS = ["a", "b", "tie"]
MIRROR = (1, 0, 2)
TRAIN, TEST = 6, 4
Logits = NDArray[np.float32]


def prepared(folds: int, swap: bool = True) -> pa.Table:
    """As stage 00 leaves it: train rows, their copies, test rows, their copies."""
    rows = []
    for part, count in (("train", TRAIN), ("test", TEST)):
        for copy in (False, True)[: 1 + swap]:
            for i in range(count):
                label, fold = i % 3, i % folds if part == "train" and folds > 1 else -1
                rows.append(
                    {
                        "id": f"{part}{i}" + "#swapped" * copy,
                        "stem": f"{part}{i}",
                        "swapped": copy,
                        "part": part,
                        "fold": fold,
                        "label": MIRROR[label] if copy else label,
                        "bayes": np.roll([0.5, 0.3, 0.2], i)[list(MIRROR) if copy else [0, 1, 2]].tolist(),
                    }
                )
    return pa.Table.from_pylist(rows)


def column(table: pa.Table, name: str) -> NDArray:
    return np.array(table[name].to_pylist())


def caches(table: pa.Table, folds: int, directory: Path) -> tuple[list[Path], list[Logits]]:
    """One file a fold; its rows in a shuffled order. Also every fold's logits on all rows."""
    files, everything = [], []
    for fold in range(folds):
        random = np.random.default_rng(fold)
        values = random.normal(size=(len(table), 3)).astype(np.float32)
        train = column(table, "part") == "train"
        held = train & (column(table, "fold") == fold)
        views = {"in_sample": train & ~held, "test": ~train} | ({"oof": held} if folds > 1 else {})
        ids, path = column(table, "id"), directory / f"fold{fold}.parquet"
        shuffled = {view: random.permutation(np.flatnonzero(chosen)) for view, chosen in views.items()}
        cached = {view: (ids[at].tolist(), values[at]) for view, at in shuffled.items()}
        logits.write(path, cached, teacher="t", labels=LABELS)
        files.append(path)
        everything.append(values)
    return files, everything


def given(table: pa.Table, part: str) -> NDArray[np.int64]:
    return np.flatnonzero((column(table, "part") == part) & ~column(table, "swapped"))


@pytest.mark.parametrize("swap", [True, False])
def test_oof_is_each_training_row_once_by_the_fold_that_did_not_see_it(tmp_path: Path, swap: bool) -> None:
    table = prepared(3, swap)
    files, values = caches(table, 3, tmp_path)
    rows = given(table, "train")
    unseen = np.stack(
        [values[fold][row] for row, fold in zip(rows, column(table, "fold")[rows], strict=True)]
    )
    expected = scores(softmax(unseen), column(table, "label")[rows])
    found = judging.folds(table, files, LABELS)["oof"]
    assert found == pytest.approx(expected)
    assert found["rows"] == TRAIN


@pytest.mark.parametrize("swap", [True, False])
def test_test_scores_are_means_over_folds_and_of_the_mean_forecast(tmp_path: Path, swap: bool) -> None:
    table = prepared(2, swap)
    files, values = caches(table, 2, tmp_path)
    rows = given(table, "test")
    truth = column(table, "label")[rows]
    each = [scores(softmax(one[rows]), truth) for one in values]
    found = judging.folds(table, files, LABELS)
    assert found["test"]["log_loss"] == pytest.approx((each[0]["log_loss"] + each[1]["log_loss"]) / 2)
    assert found["test"]["rows"] == found["test_ensemble"]["rows"] == TEST
    together = (softmax(values[0][rows]) + softmax(values[1][rows])) / 2
    assert found["test_ensemble"] == pytest.approx(scores(together, truth))
    assert found["test_ensemble"]["log_loss"] < found["test"]["log_loss"]  # Jensen


def test_a_single_fold_has_no_oof(tmp_path: Path) -> None:
    table = prepared(1)
    files, _ = caches(table, 1, tmp_path)
    assert set(judging.folds(table, files, LABELS)) == {"test", "test_ensemble"}


def test_files_of_other_folds_are_refused(tmp_path: Path) -> None:
    table = prepared(3)
    files, _ = caches(table, 3, tmp_path)
    with pytest.raises(CacheError, match="no oof logits"):
        judging.folds(table, files[::-1], LABELS)


def test_rows_follow_ids_not_positions(tmp_path: Path) -> None:
    table = prepared(3)
    files, _ = caches(table, 3, tmp_path)
    shuffled = table.take(np.random.default_rng(9).permutation(len(table)))
    expected, found = (judging.folds(one, files, LABELS) for one in (table, shuffled))
    for name in expected:
        assert found[name] == pytest.approx(expected[name])


@pytest.fixture
def part() -> judging.TestRows:
    table = prepared(2)
    return judging.TestRows(table.take(np.random.default_rng(5).permutation(len(table))), "preference", 3)


def by_stem(part: judging.TestRows, seed: int = 0) -> Logits:
    """Logits of part.table's rows that do not change with the order of a pair."""
    stems = {f"test{i}": row for i, row in enumerate(np.random.default_rng(seed).normal(size=(TEST, 3)))}
    rows = part.table.select(["stem", "swapped"]).to_pylist()
    return np.stack(
        [stems[row["stem"]][list(MIRROR) if row["swapped"] else [0, 1, 2]] for row in rows]
    ).astype(np.float32)


def test_test_rows_are_counted_once_in_their_given_order(part: judging.TestRows) -> None:
    assert len(part.table) == 2 * TEST
    assert len(part.given) == len(part.labels) == TEST
    assert part.scores(by_stem(part))["rows"] == TEST
    stems = part.table["stem"].to_pylist()
    assert [stems[i] for i in part.given] == [stems[i] for i in part.copies]
    assert [
        int(stem.removeprefix("test")) % 3 for stem in (stems[i] for i in part.given)
    ] == part.labels.tolist()


def test_swap_scores_unswap_each_copy(part: judging.TestRows) -> None:
    found = by_stem(part)
    np.testing.assert_allclose(
        part.probabilities(found, swap=True), part.probabilities(found, swap=False), rtol=1e-6
    )
    found[part.copies] *= 0.1
    expected = (softmax(found[part.given]) + softmax(unswapped(found[part.copies], MIRROR))) / 2
    np.testing.assert_allclose(part.probabilities(found, swap=True), expected)
    assert part.scores(found, swap=True) != part.scores(found)


def test_without_copies_only_the_given_order_can_be_judged() -> None:
    part = judging.TestRows(prepared(2, swap=False), "preference", 3)
    found = np.zeros((TEST, 3), dtype=np.float32)
    assert part.scores(found)["rows"] == TEST
    with pytest.raises(DataError, match="no copy in the other order"):
        part.scores(found, swap=True)


def test_the_known_probabilities_are_those_of_the_given_order(part: judging.TestRows) -> None:
    assert part.bayes is not None
    stems = part.table["stem"].to_pylist()
    expected = [np.roll([0.5, 0.3, 0.2], int(stems[i].removeprefix("test"))) for i in part.given]
    np.testing.assert_allclose(part.bayes, expected)


def test_a_table_without_known_probabilities_has_no_floor() -> None:
    assert judging.TestRows(prepared(2).drop_columns(["bayes"]), "preference", 3).bayes is None


@pytest.mark.parametrize("swap", [True, False])
def test_predictions_hold_each_test_row_once(part: judging.TestRows, tmp_path: Path, swap: bool) -> None:
    found = np.random.default_rng(3).normal(size=(2 * TEST, 3)).astype(np.float32)
    part.write(tmp_path / "predictions.parquet", found, LABELS, swap=swap)
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert table.column_names == ["id", "label", "p_a", "p_b", "p_tie"]
    assert sorted(table["id"].to_pylist()) == [f"test{i}" for i in range(TEST)]
    p = np.stack([column(table, f"p_{name}") for name in LABELS], axis=1)
    assert scores(p, column(table, "label")) == pytest.approx(part.scores(found, swap=swap))


def test_logits_are_of_the_given_orders_and_name_their_labels(part: judging.TestRows, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    found = {name: random.normal(size=(2 * TEST, 3)).astype(np.float32) for name in ("merged", "quantized")}
    part.write_logits(tmp_path / "logits.parquet", found, LABELS)
    table = pq.read_table(tmp_path / "logits.parquet")
    assert table.column_names == ["id", "label", "merged", "quantized"]
    assert str(table.schema.field("merged").type) == "fixed_size_list<element: float>[3]"
    assert table.schema.metadata == {b"labels": b'["a", "b", "tie"]'}
    assert table["id"].to_pylist() == [id for id in part.table["id"].to_pylist() if "#" not in id]
    for name, values in found.items():
        assert scores(softmax(column(table, name)), column(table, "label")) == pytest.approx(
            part.scores(values)
        )


def test_a_temperature_divides_the_logits_of_both_orders(part: judging.TestRows) -> None:
    found = np.random.default_rng(4).normal(size=(2 * TEST, 3)).astype(np.float32)
    for swap in (True, False):
        halved = part.probabilities(found, swap=swap, temperature=2.0)
        np.testing.assert_allclose(halved, part.probabilities(found / 2, swap=swap))
        assert np.abs(halved - part.probabilities(found, swap=swap)).max() > 0.01


def test_the_summary_tells_of_calibration() -> None:
    row = {"log_loss": 1.0, "accuracy": 0.5, "ece": 0.1, "rows": 4}
    test = {"ece_before": 0.1, "ece_after": 0.02}
    metrics = {"merged": row, "merged_calibrated": row, "calibration": {"temperature": 1.5, "test": test}}
    shown = judging.summary(metrics)
    assert "merged_calibrated" in shown
    assert "calibrated by temperature 1.5000: ece on test rows 0.1000 before, 0.0200 after" in shown
    assert "not calibrated" in judging.summary(
        {"merged": row, "calibration": {"temperature": None, "rows": 0}}
    )
    foreign = judging.summary({"artifact": row, "calibration": {"temperature": None}})
    assert "calibrated" not in foreign
