"""Divergences against their formulas, and the traps: reduction, T², precision, rows without a label."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llmkd.losses import LOSSES, ce, cosine, kl

B, C = 5, 4


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def probabilities(z: Tensor, temperature: float) -> np.ndarray:
    e = np.exp(z.detach().numpy() / temperature)
    return e / e.sum(-1, keepdims=True)


def gradient(loss: str, z: Tensor, v: Tensor, temperature: float) -> Tensor:
    z = z.clone().requires_grad_()
    LOSSES[loss](z, v, temperature).sum().backward()
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_summed_over_classes_and_kept_by_row(temperature: float) -> None:
    z, v = logits(0), logits(1)
    p, q = probabilities(v, temperature), probabilities(z, temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(kl(z, v, temperature).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("loss", ["kl", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_cost_nothing_and_pull_nowhere(loss: str, dtype: torch.dtype) -> None:
    z = logits(2, dtype)
    assert LOSSES[loss](z, z, 2.0).abs().max() < 1e-6
    assert gradient(loss, z, z, 2.0).abs().max() < 1e-6


@pytest.mark.parametrize("shift", [-30.0, 7.0])
def test_only_differences_of_logits_count(shift: float) -> None:
    torch.testing.assert_close(kl(logits(0) + shift, logits(1)), kl(logits(0), logits(1)))


def test_kl_keeps_the_teachers_mode_not_the_students() -> None:
    """Forward KL: a class that the teacher rules out costs nothing, one that it holds costs much."""
    wide, narrow = torch.tensor([[0.0, 0.0, -40.0]]), torch.tensor([[40.0, 0.0, -40.0]])
    assert kl(wide, narrow).item() == pytest.approx(np.log(2), abs=1e-6)
    assert kl(narrow, wide).item() > 15


def test_gradient_tends_to_the_mean_difference_of_logits_as_temperature_grows() -> None:
    """Hinton et al. 2015, eq. 4: with zero-mean logits, (z - v) / N, whatever T."""
    z, v = (x - x.mean(-1, keepdim=True) for x in (logits(3), logits(4)))
    errors = [(gradient("kl", z, v, t) - (z - v) / C).abs().max().item() for t in (10.0, 100.0, 1000.0)]
    assert errors[2] < 1e-3
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_t_squared_keeps_the_gradients_size() -> None:
    sizes = [gradient("kl", logits(3), logits(4), t).norm().item() for t in (2.0, 4.0, 8.0, 16.0)]
    assert max(sizes) / min(sizes) < 1.5


@pytest.mark.parametrize("loss", ["kl", "cosine"])
def test_bf16_logits_are_widened_before_the_arithmetic(loss: str) -> None:
    z, v = logits(5, torch.bfloat16), logits(6, torch.bfloat16)
    found = LOSSES[loss](z, v, 3.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), LOSSES[loss](z.double(), v.double(), 3.0), rtol=1e-5, atol=1e-6
    )


def test_float64_is_not_narrowed() -> None:
    assert kl(logits(0), logits(1)).dtype == torch.float64


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_cosine_is_one_minus_the_cosine_of_probabilities(temperature: float) -> None:
    z, v = logits(0), logits(1)
    q, p = probabilities(z, temperature), probabilities(v, temperature)
    expected = 1 - (p * q).sum(-1) / np.sqrt((p**2).sum(-1) * (q**2).sum(-1))
    np.testing.assert_allclose(cosine(z, v, temperature).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_cosine_of_certain_opposites_is_one() -> None:
    assert cosine(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])).item() == pytest.approx(
        1, abs=1e-6
    )


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
