"""Learning from hard labels and from teachers' logits that lie in a cache.

Without teachers it is an ordinary fine-tune, so teachers, baselines and students share it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmkd.models.pooling import autocast, class_logits
from llmkd.objective import Objective


class Cached(nn.Module):
    def __init__(self, student: nn.Module, objective: Objective, precision: str = "fp32") -> None:
        super().__init__()
        self.student, self.objective, self.precision = student, objective, precision

    @property
    def config(self) -> Any:
        """The student's: DeepSpeed sizes its buckets by it."""
        return self.student.config

    def forward(
        self, inputs: dict[str, Tensor], labels: Tensor, teacher_logits: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self.precision, labels.device):
            logits = class_logits(self.student, **inputs)  # (B, C)
        return self.objective(logits, labels, teacher_logits)
