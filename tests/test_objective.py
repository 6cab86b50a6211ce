"""The weighted sum of terms over teachers, against the formula written out."""

import pytest
import torch
from torch import Tensor

from llmkd.losses import ce, cosine, kl
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
