"""Sequence distillation: a causal LM learns next tokens, and its teachers' distributions over them.

Teachers stand beside the student (online), or their distributions come with the batch (cached). The loss is
the objective's at every target, a mean over a row's targets; the shift and the mask are the same for
student and teachers, and logits only ever exist for a chunk of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmkd.batches import Examples, Rows
from llmkd.chunked import chunked_loss
from llmkd.closed_form import Teacher
from llmkd.errors import ConfigError
from llmkd.models.head import head_of, predicting_states, target_mask, with_heads
from llmkd.objective import Objective
from llmkd.sparse import Sparse


class Sequence(nn.Module):
    """Args:

    student: a causal LM, wrapped by PEFT or not. objective: its teachers by name, in order.
    teachers: online ones by name; all of the objective's, or none: then a batch carries them beside.
    vocab: the real vocabulary that all share. precision: "bf16" or "fp32". chunk: tokens at a time,
    by default `llmkd.chunked.tokens_at_once`.
    on_policy: the share of batches whose text the student says itself, after the row's prompt (or its
    first half), and the online teachers judge: the terms but ce (Agarwal et al. 2024, GKD, arXiv
    2306.13649, algorithm 1). pad_id, eos_id, seed: for those samples.

    Raises ConfigError where these do not fit together, ModelError where a head does not fit.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        teachers: Mapping[str, nn.Module] | None = None,
        *,
        vocab: int,
        precision: str = "fp32",
        chunk: int | None = None,
        on_policy: float = 0.0,
        pad_id: int = 0,
        eos_id: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(objective, dict(teachers or {}), on_policy)
        self.student, self.objective, self.precision = student, objective, precision
        self.teachers = nn.ModuleList((teachers or {})[name] for name in objective.teachers if teachers)
        self.teachers.requires_grad_(False).eval()
        self.vocab, self.chunk, self.on_policy = vocab, chunk, on_policy
        self.pad_id, self.eos_id, self.seed, self.batches = pad_id, eos_id, seed, 0
        for model in (student, *self.teachers):
            head_of(model, vocab)

    @property
    def config(self) -> Any:
        """The student's: DeepSpeed sizes its buckets by it."""
        return self.student.config

    def get_extra_state(self) -> dict[str, int]:
        """How many batches were drawn from, so that a resumed training draws the next ones."""
        return {"batches": self.batches}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.batches = int(state["batches"])

    def train(self, mode: bool = True) -> Sequence:
        super().train(mode)
        self.teachers.eval()
        return self

    def forward(
        self, inputs: dict[str, Tensor], labels: Tensor, beside: dict[str, dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """inputs (B, L); beside: "targets" {"mask": (B, L)}, by default all tokens, and for a cached teacher
        its `Sparse` fields over the batch's targets, row by row. -> loss (B,) and its parts (B,)."""
        beside = beside or {}
        marked = beside["targets"]["mask"] if "targets" in beside else None
        real = target_mask(inputs, marked)  # (B, L - 1)
        if not self._own_turn():
            return self._judged(inputs, real, real.sum(-1), self.objective, beside)
        inputs, marked = self._said(inputs, real)
        soft = {name: weight for name, weight in self.objective.terms.items() if name != "ce"}
        own = target_mask(inputs, marked)
        loss, parts = self._judged(inputs, own, real.sum(-1), replace(self.objective, terms=soft), beside)
        return loss, {f"on_policy/{name}": part for name, part in parts.items()}

    def dev_loss(self, examples: Examples, rows: Rows, batch_tokens: int) -> float:
        """Mean negative log-likelihood of development rows' targets, by which the best state is kept."""
        from llmkd.generation import evaluate_lm

        found = evaluate_lm(
            self.student,
            examples,
            rows,
            batch_tokens=batch_tokens,
            vocab=self.vocab,
            precision=self.precision,
            chunk=self.chunk,
            timed=False,
        )
        return found["nll"]

    def _own_turn(self) -> bool:
        """Drawn from a count of batches, so that all ranks say and hear the same: ZeRO-3 needs them to."""
        if not (self.training and self.on_policy):
            return False
        self.batches += 1
        return bool(np.random.default_rng([self.seed, self.batches]).random() < self.on_policy)

    def _judged(
        self,
        inputs: dict[str, Tensor],
        real: Tensor,
        weights: Tensor,
        objective: Objective,
        beside: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """weights (B,): the rows' in a step, up to one factor: promised to the chunked loss, as under ZeRO-3
        its backward finds no whole head to compute a gradient anew."""
        from llmkd.generation import readable

        row, counts = real.nonzero()[:, 0], real.sum(-1).clamp(min=1)  # (N,), (B,)
        targets, inputs = inputs["input_ids"][:, 1:][real], readable(inputs)  # (N,)
        states = predicting_states(self.student, inputs, real, self.precision)  # (N, H)
        with torch.no_grad():
            theirs = [predicting_states(teacher, inputs, real, self.precision) for teacher in self.teachers]

        def body() -> tuple[Tensor, dict[str, Tensor]]:
            teachers: list[Teacher] = [
                (state, head_of(teacher, self.vocab))
                for state, teacher in zip(theirs, self.teachers, strict=True)
            ]
            if not teachers:
                teachers = [_sparse(beside, name) for name in objective.teachers]
            head = head_of(self.student, self.vocab)
            shares = (weights / counts)[row].float()  # (N,)
            return chunked_loss(states, head, targets, objective, teachers, weights=shares, chunk=self.chunk)

        loss, parts = with_heads([self.student, *self.teachers], states, body)  # (N,), {name: (N,)}

        def mean(values: Tensor) -> Tensor:
            return values.new_zeros(len(real)).index_add(0, row, values) / counts

        return mean(loss), {name: mean(part) for name, part in parts.items()}

    def _said(self, inputs: dict[str, Tensor], real: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Rows of a prompt and what the student says after it, no longer than they were; its own tokens
        marked (B, L). The prompt is what stands before the first target, in plain text the first half."""
        from llmkd.generation import continuations

        lengths = inputs["attention_mask"].sum(-1).tolist()
        first = (real.int().argmax(-1) + 1).tolist()  # the first target's place
        starts = [
            place if place > 1 else max(1, length // 2) for place, length in zip(first, lengths, strict=True)
        ]
        rows = inputs["input_ids"].tolist()
        prompts = [row[:start] for row, start in zip(rows, starts, strict=True)]
        room = [max(1, length - start) for length, start in zip(lengths, starts, strict=True)]
        said = continuations(
            self.student,
            prompts,
            max_new_tokens=max(room),
            vocab=self.vocab,
            pad_id=self.pad_id,
            eos_id=self.eos_id,
            sample=True,
        )
        ids = torch.full_like(inputs["input_ids"], self.pad_id)
        mask, marked = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (prompt, own) in enumerate(zip(prompts, said, strict=True)):
            start, end = len(prompt), len(prompt) + min(len(own), room[i])
            ids[i, :end] = torch.tensor([*prompt, *own[: room[i]]], device=ids.device)
            mask[i, :end] = 1
            marked[i, start:end] = True
        return {"input_ids": ids, "attention_mask": mask}, marked


def _check(objective: Objective, teachers: Mapping[str, nn.Module], on_policy: float) -> None:
    missing = [name for name in objective.teachers if teachers and name not in teachers]
    if missing:
        raise ConfigError(f"teacher {missing[0]} is not online, but others are; cache all, or none")
    if not 0 <= on_policy <= 1:
        raise ConfigError(f"on_policy = {on_policy}; give a share from 0 to 1")
    if on_policy and not teachers:
        raise ConfigError(f"on_policy = {on_policy} needs online teachers: a cache knows only its own rows")
    if on_policy and not set(objective.terms) - {"ce"}:
        raise ConfigError(f"on_policy = {on_policy} needs a term besides ce: its own words teach it nothing")
    cached = bool(objective.teachers) and not teachers
    odd = [term for term in objective.terms if term not in ("ce", "kl")] if cached else []
    if odd or (cached and objective.weighting != "fixed"):
        what = f"term {odd[0]}" if odd else f"weighting {objective.weighting}"
        raise ConfigError(f"{what} needs all the teacher's logits; a cache serves ce and kl, fixed weights")


def _sparse(beside: Mapping[str, Any], name: str) -> Sparse:
    if name not in beside:
        raise ConfigError(f"teacher {name} is neither online nor in the batch; join its cache to the rows")
    found = beside[name]
    return Sparse(found["ids"], found["weights"], found.get("tail"))
