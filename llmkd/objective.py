"""Which terms, which teachers, which weights: from logits to a loss and its named parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmkd.losses import LABELLED, LOSSES
from llmkd.weights import by_row

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """(w_ce CE + Σ_i v_i Σ_t w_t term_t(student, teacher_i, T_i)) / (w_ce + Σ_i v_i Σ_t w_t).

    With weights of 1 and terms ce, kl, cosine this is the reference recipe's
    (CE + Σ KL_i + Σ cos_i) / (1 + 2N). `normalize=False` leaves the division out.
    `params` are the terms' own, {term: {name: value}}. `weighting`: v_i are the teacher weights themselves
    (fixed), or shared out anew on every row by what each teacher says there (`llmkd.weights.WEIGHTINGS`);
    their sum, and so the divisor, stays.
    """

    terms: Mapping[str, float]
    teachers: Sequence[str] = ()
    teacher_weights: Sequence[float] = ()
    temperatures: Sequence[float] = ()
    normalize: bool = True
    params: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    weighting: str = "fixed"
    total: float = field(init=False)

    def __post_init__(self) -> None:
        soft = sum(weight for name, weight in self.terms.items() if name != "ce")
        total = self.terms.get("ce", 0.0) + soft * sum(self.teacher_weights)
        object.__setattr__(self, "total", total if self.normalize else 1.0)

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        soft_logits: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """logits (B, C), labels (B,), teacher_logits (B, N, C) -> loss (B,) and unweighted parts (B,).

        With soft_logits (B, C), of a second head, ce alone is taken on `logits`, every other term on them.
        """
        from torch import float32, promote_types

        soft_logits = logits if soft_logits is None else soft_logits
        parts = {}
        loss = logits.new_zeros(len(logits), dtype=promote_types(logits.dtype, float32))
        weights = self._weights(teacher_logits, labels)
        for term, weight in self.terms.items():
            if term == "ce":
                parts["ce"] = LOSSES["ce"](logits, labels)
                loss = loss + weight * parts["ce"]
                continue
            assert teacher_logits is not None or not self.teachers
            options = {**self.params.get(term, {}), **({"labels": labels} if term in LABELLED else {})}
            for i, teacher in enumerate(self.teachers):
                part = LOSSES[term](soft_logits, teacher_logits[:, i], self.temperatures[i], **options)  # type: ignore[index]
                parts[f"{term}/{teacher}"] = part
                loss = loss + weight * weights[i] * part
        return loss / self.total, parts

    def _weights(self, teacher_logits: Tensor | None, labels: Tensor) -> Sequence[float] | Tensor:
        """A weight for each teacher: a number, or (B,) of them."""
        if self.weighting == "fixed" or teacher_logits is None:
            return self.teacher_weights
        return by_row(self.weighting, teacher_logits, labels, self.teacher_weights).T  # (N, B)


HARD = Objective({"ce": 1.0})
