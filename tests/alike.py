"""Two models side by side: their logits and gradients."""

import torch
from torch import Tensor, nn

from llmkd.models.pooling import autocast, class_logits

LENGTH = 300  # more than one block of queries


def rows() -> dict[str, Tensor]:
    """Unpadded, padded on the right, padded on the left."""
    torch.manual_seed(1)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, 200:], mask[2, :40] = 0, 0
    return {"input_ids": torch.randint(3, 64, (3, LENGTH)), "attention_mask": mask}


def logits_and_gradients(model: nn.Module, precision: str = "fp32") -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(2)
    with autocast(precision, "cpu"):
        logits = class_logits(model, **rows())
    (logits * torch.randn(3, 3)).sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return logits.detach(), found


def assert_alike(one: nn.Module, two: nn.Module, precision: str, tolerance: float) -> None:
    (logits, gradients), (others, theirs) = (logits_and_gradients(m, precision) for m in (one, two))
    assert (logits - others).abs().max() <= tolerance * others.abs().max()
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (gradients[name] - gradient).abs().max() <= 10 * tolerance * gradient.abs().max() + 1e-9, name
