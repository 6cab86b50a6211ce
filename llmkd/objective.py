"""Which terms, which teachers, which weights: from logits to a loss and its named parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmkd.losses import LOSSES

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """(w_ce CE + Σ_i v_i Σ_t w_t term_t(student, teacher_i, T_i)) / (w_ce + Σ_i v_i Σ_t w_t).

    With weights of 1 and terms ce, kl, cosine this is the reference recipe's
    (CE + Σ KL_i + Σ cos_i) / (1 + 2N). `normalize=False` leaves the division out.
    """

    terms: Mapping[str, float]
    teachers: Sequence[str] = ()
    teacher_weights: Sequence[float] = ()
    temperatures: Sequence[float] = ()
    normalize: bool = True
    total: float = field(init=False)

    def __post_init__(self) -> None:
        soft = sum(weight for name, weight in self.terms.items() if name != "ce")
        total = self.terms.get("ce", 0.0) + soft * sum(self.teacher_weights)
        object.__setattr__(self, "total", total if self.normalize else 1.0)

    def __call__(
        self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """logits (B, C), labels (B,), teacher_logits (B, N, C) -> loss (B,) and unweighted parts (B,)."""
        parts, loss = {}, logits.new_zeros(len(logits), dtype=LOSSES["ce"](logits, labels).dtype)
        for term, weight in self.terms.items():
            if term == "ce":
                parts["ce"] = LOSSES["ce"](logits, labels)
                loss = loss + weight * parts["ce"]
                continue
            assert teacher_logits is not None or not self.teachers
            for i, teacher in enumerate(self.teachers):
                part = LOSSES[term](logits, teacher_logits[:, i], self.temperatures[i])  # type: ignore[index]
                parts[f"{term}/{teacher}"] = part
                loss = loss + weight * self.teacher_weights[i] * part
        return loss / self.total, parts


HARD = Objective({"ce": 1.0})
