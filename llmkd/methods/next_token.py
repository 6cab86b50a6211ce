"""Causal language modelling on plain text: the `causal_lm` objective of continued pretraining."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from llmkd.methods.sequence import Sequence
from llmkd.models.head import head_of, head_rows, hidden_states, oddity
from llmkd.models.lora import sharded
from llmkd.models.pooling import autocast
from llmkd.objective import HARD
from llmkd.train import inference


def next_token(student: nn.Module, precision: str = "fp32") -> nn.Module:
    """What learns every next token: without whole logits, where the head is a plain matrix."""
    if oddity(student) or not _agrees(student):
        return WholeLogits(student, precision)
    return Sequence(student, HARD, vocab=head_rows(student), precision=precision)


def _agrees(student: nn.Module, tolerance: float = 2e-2) -> bool:
    """Whether its head makes its logits of its states, asked of a few words: a config need not tell.

    A model that ZeRO-3 has cut up cannot be asked before its training.
    """
    if sharded(student):
        return True
    ids = torch.arange(3, 8, device=next(student.parameters()).device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with inference(student):
        own = student(**inputs, use_cache=False).logits.float()  # (1, 5, V)
        states, head = hidden_states(student, inputs), head_of(student)
        made = head.logits(states.to(head.weight.dtype)).float()
    near = own.shape == made.shape and (own - made).abs().max() <= tolerance * own.abs().max()
    return bool(near)


class WholeLogits(nn.Module):
    """For a head that does more than multiply and cap, which only its own model can compute."""

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
            logits = self.student(**inputs, use_cache=False).logits  # (B, L, V); a slice would be copied
        targets, real = pad(ids[:, 1:], (0, 1)), pad(mask[:, 1:], (0, 1)).float()  # (B, L)
        # flat, as the class axis must be the innermost one to be fast
        flat = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = flat.view_as(real)
        loss = (loss * real).sum(-1) / real.sum(-1).clamp(min=1)
        return loss, {"ce": loss}
