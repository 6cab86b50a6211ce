"""Learning from a teacher's hidden states, through a learned projection (FitNets, arXiv 1412.6550)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmkd.errors import ModelError
from llmkd.losses import hidden
from llmkd.methods.online import Beside, Frozen, stacked
from llmkd.models.pooling import autocast, depth, logits_and_states, pooled, unwrapped
from llmkd.objective import Objective

Pair = tuple[str, int, int]  # teacher, its layer, the student's layer


class Feature(nn.Module):
    """objective + weight · mean over pairs of hidden(W_pair student states, teacher states).

    pairs: (teacher, its layer, student's layer); layer 0 is the embeddings, i the output of layer i.
    at: `tokens` compares every real token, so both must read the same ones; `pooled` compares the vector
    that stands for the row, whatever the tokenizers. Each W is H_student -> H_teacher, drawn from `seed`
    so that ranks and folds begin alike. The objective's teachers are read from `teacher_logits` where the
    batch has them, else from those that run here.

    Raises ModelError for a teacher or a layer that does not exist.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        teachers: Mapping[str, nn.Module],
        pairs: Sequence[Pair],
        weight: float = 1.0,
        how: Literal["mse", "cosine"] = "mse",
        precision: str = "fp32",
        *,
        at: Literal["tokens", "pooled"] = "tokens",
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_pairs(student, teachers, pairs)
        self.student, self.objective, self.precision = student, objective, precision
        self.pairs, self.weight, self.how, self.at = list(pairs), weight, how, at
        self.names = list(teachers)
        self.teachers = nn.ModuleList(Frozen(teacher) for teacher in teachers.values())
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.projectors = nn.ModuleList(
                nn.Linear(_width(student), _width(teachers[name])) for name, _, _ in pairs
            ).to(next(student.parameters()).device)

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
        live, theirs = {}, {}
        read = {name: (beside or {}).get(name, inputs) for name in self.names}
        with autocast(self.precision, labels.device):
            for name, teacher in zip(self.names, self.teachers, strict=True):
                layers = [layer for of, layer, _ in self.pairs if of == name]
                live[name], theirs[name] = teacher(read[name], layers)  # (B, C), {layer: (B, L, H)}
            logits, mine = logits_and_states(self.student, [own for _, _, own in self.pairs], **inputs)
            distances = {
                f"hidden/{name}/{layer}-{own}": self._distance(
                    projector, mine[own], inputs, name, theirs[name][layer], read[name]
                )
                for projector, (name, layer, own) in zip(self.projectors, self.pairs, strict=True)
            }  # {part: (B,)}
        given = teacher_logits is not None
        known = teacher_logits if given else stacked(self.objective.teachers, live, None)  # (B, N, C)
        loss, parts = self.objective(logits, labels, known)
        return loss + self.weight * torch.stack([*distances.values()]).mean(0), {**parts, **distances}

    def _distance(
        self,
        projector: Any,
        mine: Tensor,
        inputs: dict[str, Tensor],
        name: str,
        theirs: Tensor,
        read: dict[str, Tensor],
    ) -> Tensor:
        """States `mine` (B, L, H) of `inputs` and `theirs` (B, L', H') of `read` -> (B,)"""
        mask = inputs["attention_mask"]  # (B, L)
        if self.at == "tokens":
            self._check_same_tokens(name, read, inputs)
        else:
            teacher: Any = self.teachers[self.names.index(name)]
            mine = pooled(self.student, mine, mask).unsqueeze(1)  # (B, 1, H)
            theirs = pooled(teacher.model, theirs, read["attention_mask"]).unsqueeze(1)  # (B, 1, H')
            mask = mask.new_ones(len(mask), 1)
        return hidden(projector(mine.to(projector.weight.dtype)), theirs, mask, how=self.how)

    def _check_same_tokens(self, name: str, theirs: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
        if all(torch.equal(theirs[key], mine[key]) for key in ("input_ids", "attention_mask")):
            return
        shapes = [tuple(read["input_ids"].shape) for read in (theirs, mine)]
        raise ModelError(
            f"features: teacher {name} and the student ({unwrapped(self.student).config.model_type}) read "
            f"other tokens, {shapes[0]} and {shapes[1]}; compare them pooled, or give both one tokenizer"
        )


def _check_pairs(student: nn.Module, teachers: Mapping[str, nn.Module], pairs: Sequence[Pair]) -> None:
    if not pairs:
        raise ModelError("features: no pairs of layers; name at least one teacher's layer and the student's")
    for name, theirs, own in pairs:
        if name not in teachers:
            raise ModelError(f"features: no teacher {name!r}; there are {sorted(teachers)}")
        for who, model, layer in ((f"teacher {name}", teachers[name], theirs), ("the student", student, own)):
            layers = depth(model)
            if not layers:
                raise ModelError(f"features: {who} is no transformer with hidden states; use method: online")
            if not 0 <= layer <= layers:
                raise ModelError(
                    f"features: {who} has no layer {layer}; choose 0 (embeddings) to {layers}, its last"
                )


def _width(model: nn.Module) -> int:
    return int(unwrapped(model).config.get_text_config().hidden_size)
