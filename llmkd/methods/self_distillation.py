"""A network that is its own teacher: its depth teaches its shallows (arXiv 1905.08094)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.losses import ce, kl
from llmkd.models.exits import exit_logits, new_exits
from llmkd.models.pooling import autocast
from llmkd.objective import Objective


class SelfDistillation(nn.Module):
    """Classifiers at some depths of one student learn from the labels and from the deepest.

    With logits z_1 ... z_{M-1} of the exits and z_M of the student's own head, a row's loss is
        hard · (Σ_{m<M} CE(z_m) + objective(z_M)) / M
        + soft · Σ_{m<M} T² KL(softmax(z_M/T) || softmax(z_m/T)) / (M - 1),
    z_M detached in the second sum. objective(z_M) is CE(z_M) for HARD; one with teachers teaches the
    deepest. The paper's equation 4 has hard = 1 - α, soft = α for the exits, and a hint on features, which
    is left out: `llmkd.methods.feature` compares features.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        depths: Sequence[int],
        temperature: float = 3.0,
        precision: str = "fp32",
        *,
        hard: float = 1.0,
        soft: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student, self.objective, self.precision = student, objective, precision
        self.temperature, self.hard, self.soft = temperature, hard, soft
        self.exits = new_exits(student, depths, seed)

    @property
    def config(self) -> Any:
        return self.student.config

    def forward(
        self,
        inputs: dict[str, Tensor],
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        beside: Any = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self.precision, labels.device):
            deepest, shallow = exit_logits(self.student, self.exits, **inputs)  # (B, C), {depth: (B, C)}
        hard, parts = self.objective(deepest, labels, teacher_logits)
        teacher = deepest.detach()
        own = {depth: ce(logits, labels) for depth, logits in shallow.items()}  # {depth: (B,)}
        soft = {depth: kl(logits, teacher, self.temperature) for depth, logits in shallow.items()}
        loss = self.hard * torch.stack([hard, *own.values()]).mean(0)
        loss = loss + self.soft * torch.stack([*soft.values()]).mean(0)
        for depth in shallow:
            parts |= {f"exit{depth}/ce": own[depth], f"exit{depth}/kl": soft[depth]}
        return loss, parts
