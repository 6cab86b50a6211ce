"""Causal language modelling on plain text: the `causal_lm` objective of continued pretraining."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llmkd.models.pooling import autocast


class NextToken(nn.Module):
    def __init__(self, student: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        self.student, self.precision = student, precision

    @property
    def config(self) -> Any:
        return self.student.config

    def forward(self, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """inputs (B, L) -> each row's mean cross-entropy over its real next tokens, (B,)."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with autocast(self.precision, ids.device):
            logits = self.student(**inputs, use_cache=False).logits[:, :-1]  # (B, L - 1, V)
        targets, real = ids[:, 1:], mask[:, 1:].float()
        # flat, as the class axis must be the innermost one to be fast
        flat = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = flat.view_as(real)  # (B, L - 1)
        loss = (loss * real).sum(-1) / real.sum(-1).clamp(min=1)
        return loss, {"next_token": loss}
