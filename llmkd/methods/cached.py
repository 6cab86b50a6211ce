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
        self,
        inputs: dict[str, Tensor],
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        beside: Any = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A student with a head of its own for soft labels (`head_logits`) learns each kind with its head."""
        student: Any = self.student
        with autocast(self.precision, labels.device):
            if hasattr(student, "head_logits"):
                heads = student.head_logits(**inputs)  # {"hard", "soft"}: (B, C) each
            else:
                heads = {"hard": class_logits(student, **inputs)}  # (B, C)
        loss, parts = self.objective(heads["hard"], labels, teacher_logits, heads.get("soft"))
        if len(heads) > 1:  # a head that no term reads has a gradient too, as ranks wait for it
            loss = loss + 0 * sum(logits.sum(-1) for logits in heads.values())
        return loss, parts
