"""Learning from teachers that run beside the student, instead of from a cache of their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.errors import ModelError
from llmkd.models.pooling import autocast, class_logits, logits_and_states, without_dropout
from llmkd.objective import Objective

Beside = Mapping[str, dict[str, Tensor]]  # the batch's rows as other models read them, by name


class Frozen(nn.Module):
    """A teacher that runs and never learns: no gradient, and no dropout, whatever mode its owner is in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        self.training = False
        without_dropout(self.model)
        return self

    @torch.no_grad()
    def forward(
        self, inputs: dict[str, Tensor], layers: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits (B, C) and the hidden states of `layers`, {layer: (B, L, H)}."""
        if not layers:
            return class_logits(self.model, **inputs), {}
        return logits_and_states(self.model, layers, **inputs)


def stacked(names: Sequence[str], live: Mapping[str, Tensor], cached: Tensor | None) -> Tensor | None:
    """The logits an objective reads, (B, N, C): a running teacher's own, else its column of the cache.

    Raises ModelError for a teacher that neither runs nor has logits in the batch.
    """
    missing = [name for name in names if name not in live]
    if cached is None and missing:
        raise ModelError(
            f"teacher {missing[0]} neither runs beside the student nor has cached logits; add one"
        )
    columns = [live[name] if name in live else cached[:, i] for i, name in enumerate(names)]  # type: ignore[index]
    return torch.stack(columns, dim=1) if columns else None


class Online(nn.Module):
    """`Cached` with the logits made on the spot.

    teachers: name -> a classifier with weights as they are held (fp32, bf16, nf4). They compute under the
    student's `precision`, as capture does, on `beside[name]` or else on the student's own inputs. An
    objective's teacher that is not among them (boosted trees, a file) is read from `teacher_logits`.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        teachers: Mapping[str, nn.Module],
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.student, self.objective, self.precision = student, objective, precision
        self.names = list(teachers)  # names may hold dots, which a ModuleDict refuses
        self.teachers = nn.ModuleList(Frozen(teacher) for teacher in teachers.values())

    @property
    def config(self) -> Any:
        return self.student.config

    def forward(
        self,
        inputs: dict[str, Tensor],
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        beside: Beside | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self.precision, labels.device):
            live = {
                name: teacher((beside or {}).get(name, inputs))[0]
                for name, teacher in zip(self.names, self.teachers, strict=True)
            }  # {name: (B, C)}
            logits = class_logits(self.student, **inputs)  # (B, C)
        return self.objective(logits, labels, stacked(self.objective.teachers, live, teacher_logits))
