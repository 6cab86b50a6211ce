"""Divergences against their formulas, and the traps: reduction, T², precision, rows without a label."""

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from llmkd.losses import LABELLED, LOSSES, PARAMETERS, ce, cosine, dkd, hidden, jsd, kl, parameter_faults

B, C = 5, 4
LABELS = torch.tensor([0, 1, 2, 3, -1])
SOFT: dict[str, Callable[..., Tensor]] = {
    name: functools.partial(loss, labels=LABELS) if name in LABELLED else loss
    for name, loss in LOSSES.items()
    if name != "ce"
}
FIRST_ORDER = ("tvd",)
ROWS = st.lists(st.floats(-20, 20), min_size=C, max_size=C)


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def probabilities(z: Tensor, temperature: float) -> NDArray[np.float64]:
    e = np.exp(z.detach().numpy() / temperature)
    return e / e.sum(-1, keepdims=True)


def gradient(loss: str, z: Tensor, v: Tensor, temperature: float) -> Tensor:
    z = z.clone().requires_grad_()
    SOFT[loss](z, v, temperature).sum().backward()
    assert z.grad is not None
    return z.grad


def plain_kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    return (p * np.log(p / q)).sum(-1)


def plain_dkd(
    p: NDArray[np.float64], q: NDArray[np.float64], alpha: float, beta: float
) -> NDArray[np.float64]:
    """A row at a time, as the paper writes it; the last row has no label, so the teacher's top class."""
    found = []
    for row, label in enumerate(LABELS.tolist()):
        y = label if label >= 0 else int(p[row].argmax())
        others = [c for c in range(C) if c != y]
        binary = [np.array([x[row, y], 1 - x[row, y]]) for x in (p, q)]
        rest = [x[row, others] / (1 - x[row, y]) for x in (p, q)]
        found.append(alpha * plain_kl(*binary) + beta * plain_kl(*rest))
    return np.array(found)


PLAIN: dict[str, Callable[..., NDArray[np.float64]]] = {  # of p, q and T
    "kl": lambda p, q, t: t**2 * plain_kl(p, q),
    "reverse_kl": lambda p, q, t: t**2 * plain_kl(q, p),
    "jsd": lambda p, q, t: t**2 * (plain_kl(p, (p + q) / 2) + plain_kl(q, (p + q) / 2)) / 2,
    "skew_kl": lambda p, q, t: t**2 * plain_kl(p, 0.1 * p + 0.9 * q),
    "tvd": lambda p, q, t: t * np.abs(p - q).sum(-1) / 2,
    "cosine": lambda p, q, t: 1 - (p * q).sum(-1) / np.sqrt((p**2).sum(-1) * (q**2).sum(-1)),
    "dkd": lambda p, q, t: t**2 * plain_dkd(p, q, 1, 8),
}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("loss", PLAIN)
def test_a_loss_is_its_formula_summed_over_classes_and_kept_by_row(loss: str, temperature: float) -> None:
    z, v = logits(0), logits(1)
    expected = PLAIN[loss](probabilities(v, temperature), probabilities(z, temperature), temperature)
    np.testing.assert_allclose(SOFT[loss](z, v, temperature).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", SOFT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_cost_nothing_and_pull_nowhere(loss: str, dtype: torch.dtype) -> None:
    z = logits(2, dtype)
    assert SOFT[loss](z, z, 2.0).abs().max() < 2e-6
    assert gradient(loss, z, z, 2.0).abs().max() < 2e-6


@pytest.mark.parametrize("shift", [-30.0, 7.0])
@pytest.mark.parametrize("loss", SOFT)
def test_only_differences_of_logits_count(loss: str, shift: float) -> None:
    torch.testing.assert_close(SOFT[loss](logits(0) + shift, logits(1)), SOFT[loss](logits(0), logits(1)))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(ROWS, min_size=B, max_size=B), st.lists(ROWS, min_size=B, max_size=B), st.sampled_from([*SOFT])
)
def test_no_loss_is_below_zero_or_not_finite(z: list[list[float]], v: list[list[float]], loss: str) -> None:
    student = torch.tensor(z, dtype=torch.float64)
    found = SOFT[loss](student, torch.tensor(v, dtype=torch.float64), 1.5)
    assert found.shape == (B,)
    assert found.min() > -1e-9
    assert torch.isfinite(gradient(loss, student, torch.tensor(v, dtype=torch.float64), 1.5)).all()


@pytest.mark.parametrize("loss", SOFT)
def test_logits_far_apart_stay_finite_with_their_gradient(loss: str) -> None:
    z = torch.tensor([[300.0, 0.0, 0.0, -300.0]] * B)
    assert torch.isfinite(SOFT[loss](z, z.flip(-1))).all()
    assert torch.isfinite(gradient(loss, z, z.flip(-1), 1.0)).all()


def test_kl_keeps_the_teachers_mode_not_the_students() -> None:
    """Forward KL: a class that the teacher rules out costs nothing, one that it holds costs much."""
    wide, narrow = torch.tensor([[0.0, 0.0, -40.0]]), torch.tensor([[40.0, 0.0, -40.0]])
    assert kl(wide, narrow).item() == pytest.approx(np.log(2), abs=1e-6)
    assert kl(narrow, wide).item() > 15
    assert LOSSES["reverse_kl"](narrow, wide).item() == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize(("loss", "share"), [("kl", 1), ("reverse_kl", 1), ("jsd", 0.25), ("skew_kl", 0.81)])
def test_at_high_temperature_a_divergence_is_its_share_of_mse(loss: str, share: float) -> None:
    """Hinton et al. 2015, eq. 4: with zero-mean logits the gradient tends to (z - v) / C, whatever T.

    That is mse's own gradient; a mixture sees only (1 - its share) of the difference, squared.
    """
    z, v = logits(3), logits(4)
    centred = (z - z.mean(-1, keepdim=True)) - (v - v.mean(-1, keepdim=True))
    torch.testing.assert_close(gradient("mse", z, v, 1.0), centred / C)
    errors = [
        (gradient(loss, z, v, t) - share * centred / C).abs().max().item() for t in (10.0, 100.0, 1000.0)
    ]
    assert errors[2] < 1e-3
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    torch.testing.assert_close(SOFT[loss](z, v, 1e4), share * SOFT["mse"](z, v), rtol=1e-3, atol=1e-6)


def test_mse_takes_the_mean_off_and_knows_no_temperature() -> None:
    z, v = logits(0).numpy(), logits(1).numpy()
    expected = ((z - z.mean(-1, keepdims=True) - v + v.mean(-1, keepdims=True)) ** 2).sum(-1) / (2 * C)
    for temperature in (1.0, 7.0):
        np.testing.assert_allclose(
            SOFT["mse"](logits(0), logits(1), temperature).numpy(), expected, rtol=1e-12
        )


@pytest.mark.parametrize("loss", [name for name in SOFT if name not in ("cosine", "mse")])
def test_the_temperature_s_factor_keeps_the_gradients_size(loss: str) -> None:
    sizes = [gradient(loss, logits(3), logits(4), t).norm().item() for t in (4.0, 8.0, 16.0, 64.0)]
    assert max(sizes) / min(sizes) < 1.5


@pytest.mark.parametrize("loss", SOFT)
def test_bf16_logits_are_widened_before_the_arithmetic(loss: str) -> None:
    z, v = logits(5, torch.bfloat16), logits(6, torch.bfloat16)
    found = SOFT[loss](z, v, 3.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), SOFT[loss](z.double(), v.double(), 3.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", SOFT)
def test_float64_is_not_narrowed(loss: str) -> None:
    assert SOFT[loss](logits(0), logits(1)).dtype == torch.float64


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.7])
def test_jsd_s_mixture_holds_beta_of_the_teacher(beta: float) -> None:
    p, q = probabilities(logits(1), 1.0), probabilities(logits(0), 1.0)
    mixture = beta * p + (1 - beta) * q
    expected = beta * plain_kl(p, mixture) + (1 - beta) * plain_kl(q, mixture)
    np.testing.assert_allclose(jsd(logits(0), logits(1), beta=beta).numpy(), expected, rtol=1e-9)


def test_jsd_tends_to_kl_and_to_reverse_kl() -> None:
    z, v = logits(0), logits(1)
    torch.testing.assert_close(jsd(z, v, beta=1e-6) / 1e-6, kl(z, v), rtol=1e-3, atol=1e-5)
    reverse = LOSSES["reverse_kl"](z, v)
    torch.testing.assert_close(jsd(z, v, beta=1 - 1e-6) / 1e-6, reverse, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_skew_kl_is_bounded_where_kl_is_not(alpha: float) -> None:
    z, v = torch.tensor([[90.0, 0.0]]), torch.tensor([[0.0, 90.0]])
    assert kl(z, v).item() > 80
    assert LOSSES["skew_kl"](z, v, alpha=alpha).item() == pytest.approx(-math.log(alpha), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_dkd_with_the_coupling_put_back_is_kl(temperature: float) -> None:
    """Zhao et al. 2022, eq. 5: KL = TCKD + (1 - p_y) NCKD."""
    z, v, y = logits(0), logits(1), torch.tensor([0, 1, 2, 3, 1])
    rest = 1 - torch.from_numpy(probabilities(v, temperature))[torch.arange(B), y]
    parts = [dkd(z, v, temperature, labels=y, alpha=a, beta=b) for a, b in ((1, 1e-12), (1e-12, 1))]
    torch.testing.assert_close(parts[0] + rest * parts[1], kl(z, v, temperature))


def test_dkd_of_two_classes_is_kl() -> None:
    z, v = logits(0)[:, :2], logits(1)[:, :2]
    torch.testing.assert_close(dkd(z, v, labels=torch.zeros(B, dtype=torch.int64)), kl(z, v))


def test_cosine_of_certain_opposites_is_one() -> None:
    found = cosine(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]))
    assert found.item() == pytest.approx(1, abs=1e-6)


def test_ce_is_minus_the_labels_log_probability() -> None:
    z, y = logits(7), torch.tensor([0, 1, 2, 3, 0])
    expected = -np.log(probabilities(z, 1.0)[np.arange(B), y.numpy()])
    np.testing.assert_allclose(ce(z, y).numpy(), expected, rtol=1e-12)


def test_ce_of_an_unknown_label_is_zero_without_gradient() -> None:
    z = logits(8, torch.float32).requires_grad_()
    loss = ce(z, torch.tensor([1, -1, 2, -1, 0]))
    loss.sum().backward()
    assert z.grad is not None
    assert (loss == 0).tolist() == [False, True, False, True, False]
    assert (z.grad.abs().sum(-1) == 0).tolist() == [False, True, False, True, False]


def test_ce_with_no_label_at_all_is_zero_not_nan() -> None:
    assert ce(logits(8, torch.float32), torch.full((B,), -1)).tolist() == [0.0] * B


# --- hidden states


def states(seed: int) -> Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])


def test_hidden_is_the_mean_over_real_tokens_of_the_formula() -> None:
    s, t = states(0), states(1)
    found = {how: hidden(s, t, MASK, how=how) for how in ("mse", "cosine")}
    for row, tokens in enumerate([[0, 1, 2, 3], [1, 2]]):
        squares, cosines = [], []
        for at in tokens:
            a, b = s[row, at].numpy(), t[row, at].numpy()
            squares.append(((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).sum())
            cosines.append(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert found["mse"][row].item() == pytest.approx(np.mean(squares))
        assert found["cosine"][row].item() == pytest.approx(np.mean(cosines))
    assert found["mse"][2] == found["cosine"][2] == 0


@pytest.mark.parametrize("how", ["mse", "cosine"])
def test_padding_reaches_neither_hidden_nor_its_gradient(how: str) -> None:
    s, t = states(0), states(1)
    expected = hidden(s, t, MASK, how=how)  # type: ignore[arg-type]
    s[1, 0], t[1, 3] = float("nan"), float("inf")
    s.requires_grad_()
    found = hidden(s, t, MASK, how=how)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()
    assert ((s.grad != 0).any(-1) == MASK.bool()).all()


@pytest.mark.parametrize("how", ["mse", "cosine"])
def test_hidden_sees_directions_only_in_float32_at_least(how: str) -> None:
    s = states(0).bfloat16().requires_grad_()
    found = hidden(s, s.detach() * 2, MASK, how=how)  # type: ignore[arg-type]
    found.sum().backward()
    assert found.dtype == torch.float32
    assert found.abs().max() < 1e-6
    assert s.grad is not None
    assert s.grad.abs().max() < 1e-6


# --- the terms' parameters


@pytest.mark.parametrize("term", PARAMETERS)
def test_a_term_takes_each_of_its_parameters_and_they_matter(term: str) -> None:
    z, v = logits(0), logits(1)
    for name, (low, high) in PARAMETERS[term].items():
        value = 0.25 * (low + min(high, 1)) + 0.01
        assert not torch.allclose(SOFT[term](z, v, **{name: value}), SOFT[term](z, v))
        assert parameter_faults({term: {name: value}}) == []


@pytest.mark.parametrize(
    ("params", "fault"),
    [
        ({"jsd": {"beta": 1.0}}, "jsd.beta = 1: must lie between 0 and 1"),
        ({"skew_kl": {"alpha": -0.5}}, "skew_kl.alpha = -0.5: must lie between 0 and 1"),
        ({"dkd": {"beta": 0.0}}, "dkd.beta = 0: must lie between 0 and inf"),
        ({"jsd": {"alpha": 0.5}}, "jsd.alpha: unknown; jsd takes beta"),
        ({"kl": {"beta": 0.5}}, "kl.beta: unknown; kl takes no parameter"),
    ],
)
def test_a_wrong_parameter_is_one_line(params: dict[str, dict[str, float]], fault: str) -> None:
    assert parameter_faults({"dkd": {"alpha": 2.0}, **params}) == [fault]
