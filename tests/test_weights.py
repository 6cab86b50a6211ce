"""Teachers' weights row by row against their formulas; the fitted mixture against what made the labels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import softmax

from llmkd import weights
from llmkd.errors import DataError
from llmkd.weights import WEIGHTINGS, by_row, fit

B, N, C = 4, 3, 3
FIXED = (1.0, 0.5, 2.5)
LABELS = torch.tensor([0, 2, 1, -1])


def logits(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(B, N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- by row


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_teacher_s_weight_is_its_own_times_what_it_counts_for(weighting: str) -> None:
    p, y = softmax(logits().numpy(), -1), LABELS.numpy()
    found = by_row(weighting, logits(), LABELS, FIXED).numpy()
    for row in range(B):
        counts = {
            "confidence": p[row].max(-1),
            "entropy": np.exp((p[row] * np.log(p[row])).sum(-1)),
            "ce": p[row, :, y[row]] if y[row] >= 0 else np.ones(N),
        }[weighting]
        shares = np.array(FIXED) * counts
        np.testing.assert_allclose(found[row], sum(FIXED) * shares / shares.sum(), rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*WEIGHTINGS]),
    st.lists(st.floats(-200, 200, width=32), min_size=N * C, max_size=N * C),
    st.lists(st.floats(0, 9), min_size=N, max_size=N),
    st.integers(-1, C - 1),
)
def test_weights_are_finite_and_sum_to_the_fixed_ones(
    weighting: str, values: list[float], fixed: list[float], label: int
) -> None:
    teachers = torch.tensor(values, dtype=torch.float32).view(1, N, C)
    found = by_row(weighting, teachers, torch.tensor([label]), fixed)
    assert found.min() >= 0
    assert found.sum().item() == pytest.approx(sum(fixed), rel=1e-5)
    assert all(found[0, i] == 0 for i in range(N) if fixed[i] == 0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_teachers_that_agree_keep_their_weights(weighting: str) -> None:
    alike = logits()[:, :1].expand(B, N, C)
    found = by_row(weighting, alike, LABELS, FIXED)
    torch.testing.assert_close(found, torch.tensor([FIXED] * B, dtype=torch.float64))


def test_the_sure_teacher_and_the_right_one_count_more() -> None:
    teachers = torch.tensor([[[8.0, 0, 0], [0.1, 0, 0]]])
    for weighting in ("confidence", "entropy"):
        sure, unsure = by_row(weighting, teachers, torch.tensor([1]), (1, 1))[0].tolist()
        assert sure > 1.4 > 0.6 > unsure
    wrong, unsure = by_row("ce", teachers, torch.tensor([1]), (1, 1))[0].tolist()
    assert wrong < 0.01 < 1.9 < unsure


def test_ce_weights_of_two_teachers_are_ca_mkd_s() -> None:
    """arXiv 2201.00007: (1 - exp(CE_i) / Σ_j exp(CE_j)) / (N - 1)."""
    teachers, labels = logits()[:, :2], torch.tensor([0, 2, 1, 1])
    loss = -teachers.log_softmax(-1)[torch.arange(B), :, labels]  # (B, 2)
    torch.testing.assert_close(by_row("ce", teachers, labels, (0.5, 0.5)), 1 - loss.softmax(-1))


def test_no_gradient_flows_through_the_weights_and_bf16_is_widened() -> None:
    teachers = logits().requires_grad_()
    assert not by_row("entropy", teachers, LABELS, FIXED).requires_grad
    assert by_row("entropy", teachers.bfloat16(), LABELS, FIXED).dtype == torch.float32


# --- fit


def told(
    rows: int, weights: list[float], temperatures: list[float], seed: int = 0
) -> tuple[NDArray, NDArray]:
    """Teachers' logits and labels drawn from their mixture."""
    random = np.random.default_rng(seed)
    found = random.normal(size=(rows, len(weights), C)) * 3
    p = (softmax(found / np.array(temperatures)[:, None], -1) * np.array(weights)[:, None]).sum(1)
    labels = (p.cumsum(-1) < random.random(rows)[:, None]).sum(-1)
    return found.astype(np.float32), labels.astype(np.int64)


def log_loss(z: NDArray, y: NDArray, weights: NDArray, temperatures: NDArray) -> float:
    p = (softmax(z.astype(np.float64) / temperatures[:, None], -1) * weights[:, None]).sum(1)
    return float(-np.log(p[np.arange(len(y)), y]).mean())


def test_weights_and_temperatures_that_made_the_labels_are_found() -> None:
    weights, temperatures = [0.6, 0.3, 0.1], [1.0, 2.0, 0.7]
    z, y = told(30_000, weights, temperatures)
    found = fit(z, y)
    np.testing.assert_allclose(found.weights, weights, atol=0.02)
    np.testing.assert_allclose(found.temperatures[:2], temperatures[:2], rtol=0.1)
    assert found.after <= log_loss(z, y, np.array(weights), np.array(temperatures))
    assert found.before == pytest.approx(log_loss(z, y, np.full(3, 1 / 3), np.ones(3)))
    assert found.after == pytest.approx(log_loss(z, y, found.weights, found.temperatures))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [1 / 3] * 3])
def test_it_is_never_worse_than_one_teacher_or_the_plain_mean(weights: list[float], seed: int) -> None:
    z, y = told(40, weights, [3.0, 1.0, 0.5], seed)
    found = fit(z, y)
    assert found.weights.sum() == pytest.approx(1)
    assert (found.weights >= 0).all()
    for candidate in [np.full(3, 1 / 3), *np.eye(3)]:
        assert found.after <= log_loss(z, y, candidate, np.ones(3)) + 1e-12


def test_that_holds_also_where_the_descent_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_descend", lambda z, y, *start: start)
    for best in range(3):
        z, y = told(500, np.eye(3)[best].tolist(), [1.0] * 3)
        found = fit(z, y)
        np.testing.assert_array_equal(found.weights, np.eye(3)[best])
        assert found.after == pytest.approx(log_loss(z, y, np.eye(3)[best], np.ones(3)))


def test_one_teacher_is_calibrated() -> None:
    z, y = told(20_000, [1.0], [2.5])
    found = fit(z, y)
    assert found.weights.tolist() == [1]
    assert found.temperatures[0] == pytest.approx(2.5, rel=0.1)
    assert found.after < found.before


def test_it_is_a_minimum_and_the_same_twice() -> None:
    z, y = told(500, [0.5, 0.5], [1.0, 2.0])
    found = fit(z, y)
    random = np.random.default_rng(1)
    for _ in range(20):
        weights = found.weights * np.exp(random.normal(size=2) * 0.05)
        near = found.temperatures * np.exp(random.normal(size=2) * 0.05)
        assert log_loss(z, y, weights / weights.sum(), near) > found.after - 1e-9
    for one, two in zip(found, fit(z, y), strict=True):
        np.testing.assert_array_equal(one, two)


def test_rows_without_a_label_do_not_count() -> None:
    z, y = told(200, [0.7, 0.3], [1.0, 1.0])
    hidden = np.where(np.arange(200) % 3 == 0, -1, y)
    for one, two in zip(fit(z, hidden), fit(z[hidden >= 0], y[hidden >= 0]), strict=True):
        np.testing.assert_array_equal(one, two)


def test_without_a_label_it_is_refused() -> None:
    with pytest.raises(DataError, match="no row has a label; give labels or fixed weights"):
        fit(np.zeros((3, 2, C), np.float32), np.full(3, -1))
