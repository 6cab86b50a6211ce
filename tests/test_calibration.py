"""The temperature: what it minimises, on which rows it is fitted, and what tells it."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax
from test_judging import LABELS, TRAIN, caches, column, given, prepared

from llmkd import calibration, run
from llmkd.calibration import LIMITS, calibrate, effect, fit_temperature
from llmkd.evaluate import ece, scores, softmax


def drawn(temperature: float, rows: int = 20_000) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits, and labels drawn from softmax(logits / temperature)."""
    random = np.random.default_rng(0)
    logits = (3 * random.normal(size=(rows, 3))).astype(np.float32)
    p = softmax(logits / np.float32(temperature))
    return logits, (p.cumsum(1) > random.random((rows, 1))).argmax(1)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_of_the_labels_is_found(temperature: float) -> None:
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.05)


def test_no_other_temperature_has_a_lower_log_loss() -> None:
    logits, labels = drawn(1.7, 500)

    def loss(temperature: float) -> float:
        wide = logits.astype(np.float64) / temperature
        return float(-log_softmax(wide, axis=-1)[np.arange(len(labels)), labels].mean())

    found = fit_temperature(logits, labels)
    assert all(loss(found) < loss(found * factor) for factor in (0.5, 0.99, 1.01, 2.0))
    slope = (loss(found * 1.0001) - loss(found / 1.0001)) / 0.0002
    assert abs(slope) < 1e-4


def test_logits_without_a_mistake_and_logits_that_know_nothing_stay_within_limits() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2] * 5]
    assert LIMITS[0] <= fit_temperature(logits, np.array([0, 1, 2] * 5)) < 0.1  # flat from there on
    assert 0.99 * LIMITS[1] < fit_temperature(logits, np.array([1, 2, 0] * 5)) <= LIMITS[1]


def test_calibration_lowers_both_and_moves_no_row() -> None:
    logits, labels = drawn(2.5)
    temperature = fit_temperature(logits, labels)
    before, after = softmax(logits), softmax(logits / np.float32(temperature))
    found = effect(before, after, labels)
    assert found["log_loss_after"] < found["log_loss_before"] - 0.1
    assert found["ece_after"] < 0.02 < found["ece_before"]
    assert found["ece_before"] == pytest.approx(ece(before, labels))
    assert (before.argmax(-1) == after.argmax(-1)).all()


@pytest.mark.parametrize("swap", [True, False])
def test_it_is_fitted_on_each_given_row_by_the_fold_that_did_not_see_it(tmp_path: Path, swap: bool) -> None:
    table = prepared(3, swap)
    files, values = caches(table, 3, tmp_path)
    rows = given(table, "train")
    pairs = zip(rows, column(table, "fold")[rows], strict=True)
    unseen = np.stack([values[fold][row] for row, fold in pairs])
    labels = column(table, "label")[rows]
    found = calibrate(table, files, LABELS)
    temperature = fit_temperature(unseen, labels)
    assert found["fitted"] == pytest.approx(temperature)
    assert found["rows"] == TRAIN
    assert found["oof"] == pytest.approx(effect(softmax(unseen), softmax(unseen / temperature), labels))


@pytest.mark.parametrize(("temperature", "kept"), [(0.5, True), (1.0, False), (2.5, True)])
def test_a_temperature_that_chance_explains_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, temperature: float, kept: bool
) -> None:
    logits, labels = drawn(temperature, 1000)
    rows = [np.arange(500), np.arange(500, 1000)]
    monkeypatch.setattr(calibration, "on_view", lambda *_: (rows, [logits[part] for part in rows]))
    found = calibrate(pa.table({"label": labels}), [Path("a"), Path("b")], LABELS)
    assert found["fitted"] == fit_temperature(logits, labels)
    assert found["temperature"] == (found["fitted"] if kept else None)


def test_rows_without_a_mistake_calibrate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any lower temperature is better there: the lowest would make the first mistake endless."""
    labels = np.array([0, 1, 2] * 200)
    logits = 3 * np.eye(3, dtype=np.float32)[labels]
    rows = [np.arange(300), np.arange(300, 600)]
    monkeypatch.setattr(calibration, "on_view", lambda *_: (rows, [logits[part] for part in rows]))
    found = calibrate(pa.table({"label": labels}), [Path("a"), Path("b")], LABELS)
    assert found == {"temperature": None, "rows": 600}
    labels[0] = 1
    assert calibrate(pa.table({"label": labels}), [Path("a"), Path("b")], LABELS)["temperature"] > 0.1


def test_rows_without_a_label_calibrate_nothing(tmp_path: Path) -> None:
    table = prepared(2, swap=False)
    files, _ = caches(table, 2, tmp_path)
    place, unknown = table.column_names.index("label"), np.array(column(table, "label"))
    unknown[0] = -1
    assert calibrate(table.set_column(place, "label", [unknown]), files, LABELS)["rows"] == TRAIN - 1
    nothing = calibrate(table.set_column(place, "label", [np.full(len(table), -1)]), files, LABELS)
    assert nothing == {"temperature": None, "rows": 0}


def test_one_fold_has_no_temperature(tmp_path: Path) -> None:
    table = prepared(1)
    assert calibrate(table, caches(table, 1, tmp_path)[0], LABELS) == {"temperature": None, "rows": 0}


def test_a_run_tells_its_temperature_and_what_it_changes(finished: Path) -> None:
    artifacts = [finished / stage / "model" / "llmkd.json" for stage in ("04_merge", "05_quantize")]
    said = [json.loads(path.read_text()) for path in artifacts]
    metrics = json.loads((finished / "06_evaluate/metrics.json").read_text())
    found = metrics["calibration"]
    assert said[0] == said[1]
    assert said[0]["temperature"] == found["temperature"]
    assert run.manifest(finished / "04_merge")["metrics"]["calibration"]["oof"] == found["oof"]
    assert found["rows"] == 96
    assert found["oof"]["log_loss_after"] <= found["oof"]["log_loss_before"]
    assert found["oof"]["log_loss_before"] == pytest.approx(metrics["student"]["oof"]["log_loss"])
    table = pq.read_table(finished / "06_evaluate/logits.parquet")
    logits, labels = np.stack(table["quantized"].to_pylist()).astype(np.float32), table["label"].to_numpy()
    assert metrics["quantized"] == pytest.approx(scores(softmax(logits), labels))
    after = scores(softmax(logits / found["temperature"]), labels)
    assert metrics["quantized_calibrated"] == pytest.approx(after)
    assert metrics["ece_after"] == found["test"]["ece_after"] == pytest.approx(after["ece"])
    assert metrics["ece_before"] == metrics["quantized"]["ece"]
    assert metrics["quantized_tta_calibrated"]["rows"] == 40
    assert metrics["quantized_tta_calibrated"]["log_loss"] != metrics["quantized_tta"]["log_loss"]
