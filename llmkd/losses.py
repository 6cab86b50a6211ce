"""Divergences between a student's and a teacher's logits, as pure functions.

Every function returns one value a row, shape (B,), in float32 or wider, so that whoever calls it
decides over what to average. Logits are raw, shape (B, C).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -1  # the label of a row without a hard label


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with hard labels, -log softmax(logits)[label]; 0 where the label is -1.

    logits (B, C), labels (B,) int64 -> (B,)
    """
    from torch.nn.functional import cross_entropy

    return cross_entropy(_wide(logits), labels, reduction="none", ignore_index=IGNORE)


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(softmax(teacher/T) || softmax(student/T)), summed over classes.

    The teacher's entropy is included, so kl(p, p) = 0. T² keeps the gradient's size as T grows
    (Hinton et al. 2015, arXiv 1503.02531, section 2). student, teacher (B, C) -> (B,)
    """
    log_p = (_wide(teacher) / temperature).log_softmax(-1)  # (B, C)
    log_q = (_wide(student) / temperature).log_softmax(-1)  # (B, C)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def cosine(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """1 - cos(softmax(student/T), softmax(teacher/T)), the reference recipe's third term.

    Bounded, so it carries no T². student, teacher (B, C) -> (B,)
    """
    from torch.nn.functional import cosine_similarity

    p = (_wide(teacher) / temperature).softmax(-1)  # (B, C)
    q = (_wide(student) / temperature).softmax(-1)  # (B, C)
    return 1 - cosine_similarity(q, p, dim=-1)


def _wide(logits: Tensor) -> Tensor:
    """float32 at least: sums of small differences of logarithms do not survive bf16."""
    import torch

    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# name in `distill.terms` -> function of (student, teacher, temperature), or of (logits, labels) for ce
LOSSES: dict[str, Callable[..., Tensor]] = {"ce": ce, "kl": kl, "cosine": cosine}
