"""Scores by hand, swap test-time augmentation, drift and the Bayes floor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmkd.evaluate import bayes, both_orders, drift, ece, mean_scores, scores, softmax, unswapped

MIRROR = (1, 0, 2)


def random_logits(rows: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)


def two(*confidence: float) -> NDArray[np.float64]:
    """Rows of two classes, the first with this probability."""
    return np.array([[p, 1 - p] for p in confidence])


@pytest.mark.parametrize(
    ("confidence", "labels", "bins", "expected"),
    [
        ([1.0, 1.0], [0, 0], 15, 0.0),
        ([1.0, 1.0], [1, 1], 15, 1.0),
        ([0.9, 0.9], [0, 1], 10, 0.4),  # one bin: accuracy 0.5, confidence 0.9
        ([0.75, 0.85, 0.85, 0.85], [0, 0, 0, 1], 10, (1 * 0.25 + 3 * abs(2 / 3 - 0.85)) / 4),
        ([0.55, 0.95], [1, 0], 1, abs(0.5 - 0.75)),  # in a single bin over- and underconfidence cancel
        ([0.55, 0.95], [1, 0], 10, (0.55 + 0.05) / 2),
        ([0.5, 0.55], [1, 0], 2, (0.5 + 0.45) / 2),  # bins are open below, closed above: (0, .5] and (.5, 1]
        ([0.2], [1], 10, 0.2),  # the top class is the second, at 0.8
    ],
)
def test_ece_by_hand(confidence: list[float], labels: list[int], bins: int, expected: float) -> None:
    assert ece(two(*confidence), np.array(labels), bins) == pytest.approx(expected)


def test_scores_by_hand_over_the_labelled_rows_only() -> None:
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.9, 0.05, 0.05], [0.2, 0.7, 0.1]])
    found = scores(p, np.array([0, 1, -1, 1]))
    assert found["rows"] == 3
    assert found["log_loss"] == pytest.approx(-(np.log(0.5) + np.log(0.2) + np.log(0.7)) / 3)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["ece"] == pytest.approx(ece(p[[0, 1, 3]], np.array([0, 1, 1])))


def test_scores_of_a_single_class_and_of_none() -> None:
    assert scores(two(0.25, 0.25), np.array([1, 1]))["log_loss"] == pytest.approx(-np.log(0.75))
    assert scores(two(0.5), np.array([-1])) == {"rows": 0}


def test_a_certain_mistake_costs_much_and_is_finite() -> None:
    assert 30 < float(scores(two(1.0), np.array([1]))["log_loss"]) < 1000


def test_softmax_is_float64_and_stands_large_logits() -> None:
    found = softmax(np.array([[1e4, 0, -1e4]], dtype=np.float32))
    assert found.dtype == np.float64
    assert found.tolist() == [[1, 0, 0]]


def test_mean_scores_averages_each_score_and_keeps_counts_whole() -> None:
    found = mean_scores([{"log_loss": 1.0, "rows": 4}, {"log_loss": 2.0, "rows": 4}])
    assert found == {"log_loss": 1.5, "rows": 4}
    assert type(found["rows"]) is int


@pytest.mark.parametrize("mirror", [MIRROR, (1, 0)])
def test_both_orders_unswaps_before_it_averages(mirror: tuple[int, ...]) -> None:
    given_order, swapped = (random_logits(9, seed)[:, : len(mirror)] for seed in (0, 1))
    p, q = softmax(given_order), softmax(swapped)
    expected = np.stack([(p[:, i] + q[:, mirror[i]]) / 2 for i in range(len(mirror))], axis=1)
    np.testing.assert_allclose(both_orders(given_order, swapped, mirror), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(0, 99))
def test_a_model_blind_to_order_gains_nothing_from_both(rows: int, seed: int) -> None:
    logits = random_logits(rows, seed)
    np.testing.assert_allclose(both_orders(logits, unswapped(logits, MIRROR), MIRROR), softmax(logits))


def test_both_orders_are_the_same_from_either_side() -> None:
    one, two_ = random_logits(9, 0), random_logits(9, 1)
    turned = both_orders(two_, one, MIRROR)
    np.testing.assert_allclose(both_orders(one, two_, MIRROR), turned[:, list(MIRROR)])


def test_drift_of_equal_logits_is_zero() -> None:
    logits = random_logits(9)
    assert drift(logits, logits.copy()) == {"max_abs_logit": 0, "mean_abs_logit": 0, "kl": 0, "agreement": 1}


def test_drift_by_hand() -> None:
    before = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])).astype(np.float32)
    after = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])).astype(np.float32)
    found = drift(before, after)
    assert found["max_abs_logit"] == pytest.approx(np.log(2), abs=1e-6)
    assert found["mean_abs_logit"] == pytest.approx(2 * np.log(2) / 6, abs=1e-6)
    assert found["kl"] == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2, abs=1e-6)
    assert found["agreement"] == 0.5


def test_drift_is_of_kl_before_to_after_and_finite_for_certain_rows() -> None:
    sure, open_ = np.array([[2000.0, 0.0]], dtype=np.float32), np.array([[0.0, 0.0]], dtype=np.float32)
    assert drift(sure, open_)["kl"] == pytest.approx(np.log(2))
    assert drift(open_, sure)["kl"] == pytest.approx(1000 - np.log(2))
    assert drift(sure, sure)["kl"] == 0


def test_bayes_by_hand() -> None:
    found = bayes(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.8, 0.1, 0.1]]), np.array([1, 0, 2]))
    assert found["bayes_log_loss"] == pytest.approx(
        (np.log(2) + 0 - 0.8 * np.log(0.8) - 0.2 * np.log(0.1)) / 3
    )
    assert found["bayes_log_loss_drawn"] == pytest.approx((np.log(2) + 0 - np.log(0.1)) / 3)


def test_nothing_beats_the_bayes_floor() -> None:
    """Over labels drawn from the known probabilities, any other forecast's log loss is higher."""
    random = np.random.default_rng(0)
    p = random.dirichlet([1, 1, 1], 20_000)
    labels = (p.cumsum(1) > random.random((len(p), 1))).argmax(1)
    floor = bayes(p, labels)
    assert floor["bayes_log_loss_drawn"] == pytest.approx(floor["bayes_log_loss"], abs=0.02)
    for other in (softmax(np.log(p) * 1.3), softmax(np.log(p) * 0.7), np.full_like(p, 1 / 3)):
        assert float(scores(other, labels)["log_loss"]) > floor["bayes_log_loss_drawn"] + 0.005
