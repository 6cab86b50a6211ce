"""What the report computes row by row: gaps, agreement, calibration, mistakes, weights."""

from pathlib import Path

import numpy as np
import pytest
from tiny_report import TEST, made, page, plots, rows_of

from llmkd.evaluate import ece, softmax
from llmkd.reporting import gather, judged, rowwise, write_report


def test_the_gap_is_paired_over_rows(modelless: Path) -> None:
    rows = rows_of(modelless)
    losses = {
        name: np.mean(
            [-np.log(softmax(fold)[np.arange(TEST), rows["labels"]]) for fold in rows["folds"][name]], axis=0
        )
        for name in ("student", "baseline")
    }
    difference = losses["baseline"] - losses["student"]
    found = judged.gap(rows)
    assert found == pytest.approx((difference.mean(), difference.std(ddof=1) / TEST**0.5))
    metrics = gather.gather(modelless)["metrics"]
    assert found
    assert found[0] == pytest.approx(metrics["baseline"]["log_loss"] - metrics["student"]["log_loss"])


def test_agreement_by_hand(modelless: Path) -> None:
    p = judged.means(rows_of(modelless), "quantized")
    same, divergence = judged.agreement(p)
    a, b = list(p).index("teacher llama"), list(p).index("student")
    left, right = p["teacher llama"], p["student"]
    assert same[a, b] == np.mean(left.argmax(1) == right.argmax(1))
    assert divergence[a, b] == pytest.approx(np.mean(np.sum(left * np.log(left / right), axis=1)))
    assert np.allclose(np.diag(divergence), 0)
    assert np.allclose(np.diag(same), 1)


def test_reliability_sums_up_to_the_ece(modelless: Path) -> None:
    rows = rows_of(modelless)
    p, labels = rows["shipped"], np.where(np.arange(TEST) % 5, rows["labels"], -1)
    found = {name: np.array(values) for name, values in judged.reliability(p, labels).items()}
    known = labels >= 0
    assert found["rows"].sum() == known.sum()
    gaps = np.abs(found["accuracy"] - found["confidence"]) * found["rows"]
    assert gaps.sum() / known.sum() == pytest.approx(ece(p[known], labels[known]))


def test_confusion_counts_every_labelled_row_once(modelless: Path) -> None:
    rows = rows_of(modelless)
    labels = np.where(np.arange(TEST) % 5, rows["labels"], -1)
    found = judged.confusion(rows["shipped"], labels)
    assert found.sum() == (labels >= 0).sum()
    assert found[1, 2] == np.sum((labels == 1) & (rows["shipped"].argmax(1) == 2))


def test_of_many_classes_the_commonest_mistakes_are_told() -> None:
    many, truth = [f"class {i}" for i in range(rowwise.CELLS + 1)], np.repeat(np.arange(4), 5)
    p = np.eye(len(many))[np.where(truth == 3, 7, truth)]
    rows = {"shipped": p, "labels": truth, "name": "quantized"}
    content = rowwise.confusion(rows, many, {})
    assert "<td>class 3</td><td class='word'>class 7</td><td>5</td><td>100.0%</td>" in content
    assert content.count("<tr>") == 2


def test_rows_are_joined_by_id_and_the_most_moved_stands_first(modelless: Path) -> None:
    rows = rows_of(modelless)
    p = softmax(rows["logits"]["quantized"])
    np.testing.assert_allclose(p, rows["shipped"], atol=1e-6)
    size = np.abs(rows["logits"]["merged"] - rows["logits"]["quantized"]).max(axis=1)
    first, *rest = judged.most(rows, size, {"quantized": p})
    assert first["id"] == rows["ids"][7]
    assert first["size"] == pytest.approx(1.01, abs=1e-5)
    assert len(rest) == judged.SHOWN - 1
    assert first["sides"]["quantized"] == pytest.approx(rows["shipped"][7].tolist(), abs=1e-6)


def test_rows_weighed_anew_each_have_weights_that_sum_to_the_fixed_ones(modelless: Path) -> None:
    names = ["teacher llama", "teacher qwen"]
    found = judged.row_weights(rows_of(modelless), names, "entropy", [1.0, 1.0])
    assert sum(found) == pytest.approx(2)
    assert all(0.5 < weight < 1.5 for weight in found)


def test_without_the_artifacts_logits_it_says_what_is_missing(tmp_path: Path) -> None:
    content = page(write_report(made(tmp_path / "run", artifacts=False)))
    assert content.count("06_evaluate has no logits.parquet; stage 06 run anew writes it.") == 2
    assert [trace["name"] for trace in plots(content)["calibration"]["data"]] == [
        "perfectly calibrated",
        "quantized",
    ]


def test_the_calibrated_curve_is_at_the_temperature_found(modelless: Path) -> None:
    content = page(write_report(modelless))
    curves = {trace["name"]: trace for trace in plots(content)["calibration"]["data"]}
    rows = rows_of(modelless)
    expected = judged.reliability(softmax(rows["logits"]["quantized"] / 1.5), rows["labels"])
    assert curves["quantized_calibrated"]["x"] == pytest.approx(expected["confidence"], rel=1e-5)
    assert curves.keys() == {"perfectly calibrated", "merged", "quantized", "quantized_calibrated"}
