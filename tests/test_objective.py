"""The weighted sum of terms over teachers, against the formula written out."""

import pytest
import torch
from torch import Tensor

from llmkd.losses import ce, cosine, dkd, jsd, kl
from llmkd.objective import HARD, Objective

B, N, C = 6, 2, 3
DEFAULT = {"ce": 1.0, "kl": 1.0, "cosine": 1.0}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, teachers = torch.randn(B, C, generator=generator), torch.randn(B, N, C, generator=generator)
    return logits, torch.tensor([0, 1, 2, 0, 1, 2]), teachers


def test_default_is_the_reference_recipe(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """(CE + KL₁ + cos₁ + KL₂ + cos₂) / (1 + 2N)"""
    z, y, v = batch
    loss, _ = Objective(DEFAULT, ("a", "b"), (1.0, 1.0), (1.0, 1.0))(z, y, v)
    log_q, p = z.log_softmax(-1), v.softmax(-1)  # plain formulas, not the module's own
    expected = -log_q[torch.arange(B), y]
    for i in range(N):
        q, t = z.softmax(-1), p[:, i]
        expected = expected + (t * (t.log() - log_q)).sum(-1)
        expected = expected + 1 - (t * q).sum(-1) / (t.norm(dim=-1) * q.norm(dim=-1))
    torch.testing.assert_close(loss, expected / 5)


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_and_temperatures_belong_to_their_teachers(
    batch: tuple[Tensor, Tensor, Tensor], normalize: bool
) -> None:
    z, y, v = batch
    objective = Objective(
        {"ce": 0.5, "kl": 2.0, "cosine": 3.0}, ("a", "b"), (0.7, 0.1), (1.0, 4.0), normalize
    )
    expected = 0.5 * ce(z, y)
    for i, weight, t in ((0, 0.7, 1.0), (1, 0.1, 4.0)):
        expected = expected + weight * (2 * kl(z, v[:, i], t) + 3 * cosine(z, v[:, i], t))
    total = 0.5 + (0.7 + 0.1) * (2 + 3)
    torch.testing.assert_close(objective(z, y, v)[0], expected / total if normalize else expected)


def test_parts_are_named_unweighted_and_by_row(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, v = batch
    _, parts = Objective({"ce": 9.0, "kl": 9.0}, ("a", "b"), (5.0, 5.0), (1.0, 2.0))(z, y, v)
    assert set(parts) == {"ce", "kl/a", "kl/b"}
    torch.testing.assert_close(parts["ce"], ce(z, y))
    torch.testing.assert_close(parts["kl/b"], kl(z, v[:, 1], 2.0))


def test_a_teacher_of_weight_zero_does_not_change_the_loss(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, v = batch
    alone = Objective(DEFAULT, ("a",), (1.0,), (1.0,))(z, y, v[:, :1])[0]
    torch.testing.assert_close(Objective(DEFAULT, ("a", "b"), (1.0, 0.0), (1.0, 1.0))(z, y, v)[0], alone)


def test_hard_is_plain_cross_entropy(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, _ = batch
    loss, parts = HARD(z, y)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(z, y, reduction="none"))
    assert set(parts) == {"ce"}


def test_rows_without_a_label_learn_from_teachers_alone(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, _, v = batch
    objective = Objective(DEFAULT, ("a", "b"), (1.0, 1.0), (1.0, 1.0))
    expected = sum(kl(z, v[:, i]) + cosine(z, v[:, i]) for i in range(N)) / 5
    torch.testing.assert_close(objective(z, torch.full((B,), -1), v)[0], expected)


def test_bf16_logits_give_a_float32_loss(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, v = batch
    loss, _ = Objective(DEFAULT, ("a", "b"), (1.0, 1.0), (1.0, 1.0))(z.bfloat16(), y, v)
    assert loss.dtype == torch.float32


def test_terms_get_their_parameters_and_dkd_the_labels(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, v = batch
    params = {"jsd": {"beta": 0.3}, "dkd": {"beta": 2.0}}
    terms = {"jsd": 2.0, "dkd": 0.5}
    loss, parts = Objective(terms, ("a",), (1.0,), (2.0,), params=params)(z, y, v)
    torch.testing.assert_close(parts["jsd/a"], jsd(z, v[:, 0], 2.0, beta=0.3))
    torch.testing.assert_close(parts["dkd/a"], dkd(z, v[:, 0], 2.0, labels=y, beta=2.0))
    torch.testing.assert_close(loss, (2 * parts["jsd/a"] + 0.5 * parts["dkd/a"]) / 2.5)


def test_a_second_head_takes_the_soft_terms(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, v = batch
    hard, soft = z.clone().requires_grad_(), (-z).requires_grad_()
    loss, parts = Objective(DEFAULT, ("a", "b"), (1.0, 1.0), (1.0, 2.0))(hard, y, v, soft)
    torch.testing.assert_close(parts["ce"], ce(z, y))
    torch.testing.assert_close(parts["kl/b"], kl(-z, v[:, 1], 2.0))
    torch.testing.assert_close(loss, sum(parts.values()) / 5)
    grad = torch.autograd.grad(loss.sum(), (hard, soft))
    assert all(g.abs().sum() > 0 for g in grad)
    torch.testing.assert_close(grad[0], torch.autograd.grad(ce(hard, y).sum() / 5, hard)[0])


@pytest.mark.parametrize("weighting", ["confidence", "entropy", "ce"])
def test_weights_by_row_multiply_each_teachers_terms(
    batch: tuple[Tensor, Tensor, Tensor], weighting: str
) -> None:
    z, y, v = batch
    p = v.softmax(-1)  # (B, N, C)
    counts = {
        "confidence": p.amax(-1),
        "entropy": (p * p.log()).sum(-1).exp(),
        "ce": p[torch.arange(B), :, y],
    }[weighting]
    shares = torch.tensor([0.5, 2.0]) * counts  # (B, N)
    shares = 2.5 * shares / shares.sum(-1, keepdim=True)
    loss, parts = Objective(DEFAULT, ("a", "b"), (0.5, 2.0), (1.0, 3.0), weighting=weighting)(z, y, v)
    soft = sum(shares[:, i] * (kl(z, v[:, i], t) + cosine(z, v[:, i], t)) for i, t in enumerate((1.0, 3.0)))
    torch.testing.assert_close(loss, (ce(z, y) + soft) / (1 + 2 * 2.5))
    torch.testing.assert_close(parts["kl/a"], kl(z, v[:, 0]))


def test_ce_weights_are_the_fixed_ones_on_rows_without_a_label(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, v = batch
    y = torch.where(torch.arange(B) % 2 == 0, y, -1)
    fixed, by_row = (
        Objective(DEFAULT, ("a", "b"), (0.5, 2.0), (1.0, 1.0), weighting=how)(z, y, v)[0]
        for how in ("fixed", "ce")
    )
    assert torch.isclose(fixed, by_row).tolist() == [False, True] * 3


def test_hard_needs_no_teacher_whatever_the_weighting(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, _ = batch
    torch.testing.assert_close(Objective({"ce": 1.0}, weighting="entropy")(z, y)[0], ce(z, y))
