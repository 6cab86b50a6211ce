"""A job: so many alike units of a stage, with their steps, tokens, operations, memory and disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from llmkd.planning import activations, memory, models, work
from llmkd.planning.data import Part, task_part
from llmkd.planning.shapes import Shape
from llmkd.planning.way import Way, trained
from llmkd.planning.work import NONE, Batches, Lengths
from llmkd.schema import Config
from llmkd.schema_models import Model
from llmkd.schema_training import Training

ROW = 4096  # rows that stand in where their number is not known: for shapes of batches, never for sums


@dataclass(frozen=True)
class Learning:
    """One training: so many epochs over `count` rows of these lengths, under a section's settings."""

    lengths: Lengths
    count: int
    epochs: float
    batch_rows: int

    def batches(self, batch_tokens: int, ranks: int) -> Batches:
        return work.training_batches(self.lengths, self.count, self.batch_rows, batch_tokens, ranks)

    def steps(self) -> int:
        return math.ceil(self.epochs * math.ceil(self.count / self.batch_rows))


@dataclass(frozen=True)
class Job:
    """`times` alike units of a stage; figures are of all of them but for memory, which is a rank's.

    known: whether the rows are known, and so all sums. need: bytes by part for another way or budget, from
    which advice is found; keys: where the config says what could be changed.
    """

    stage: str
    name: str
    what: str
    times: int = 1
    steps: int = 0
    tokens: float = 0.0
    flops: float = 0.0
    disk: float = 0.0
    scratch: float = 0.0
    host: float = 0.0
    known: bool = True
    way: Way | None = None
    batch_tokens: int = 0
    longest: int = 0
    keys: Mapping[str, str] = field(default_factory=dict)
    need: Callable[[Way, int], dict[str, float]] | None = None

    @cached_property
    def memory(self) -> dict[str, float]:
        return self.need(self.way, self.batch_tokens) if self.need and self.way else {}


@dataclass(frozen=True)
class Plan:
    """What all jobs of a config are made from."""

    config: Config
    ranks: int
    rows: Mapping[str, int]

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        return {model.name: models.shape_of(self.config, model) for model in self.config.models}

    @cached_property
    def classes(self) -> int | None:
        return models.classes(self.config)

    @cached_property
    def parts(self) -> dict[tuple[str, str], Part]:
        """(part, model) -> its rows as the model reads them."""
        names = ("train", "test", "transfer")
        return {
            (part, model.name): task_part(self.config, part, self.rows, model)
            for model in self.config.models
            for part in names
        }

    def share(self, part: str, model: Model) -> int:
        """Rows of a part that a fold's training sees."""
        count, folds = self.parts[part, model.name].count, self.config.folds.count
        return count * (folds - 1) // folds if part == "train" and folds > 1 else count

    def known(self, model: Model, *parts: str) -> bool:
        """Whether anybody knows how many rows these parts have."""
        return all(self.parts[part, model.name].rows is not None for part in parts)

    def key(self, model: Model) -> str:
        """Where the config describes a model, as a dotted override names it."""
        config = self.config
        if model in config.students:
            place = config.students.index(model)  # type: ignore[arg-type]
            return "student" if len(config.students) == 1 else f"students.{place}"
        if model in config.peers:
            return f"peers.{config.peers.index(model)}"
        return f"teachers.{config.teachers.index(model)}"  # type: ignore[arg-type]


def mixed(parts: Sequence[tuple[Part, int]]) -> tuple[Lengths, int]:
    """Lengths of several parts' rows in proportion to their counts, and the sum of these."""
    total = sum(count for _, count in parts)
    if len(parts) == 1 or not total:
        return parts[0][0].lengths, total
    random = np.random.default_rng(0)
    drawn = [
        random.choice(part.lengths, max(1, round(work.TRIED * count / total)))
        for part, count in parts
        if count
    ]
    return np.concatenate(drawn), total


def learn(
    plan: Plan,
    stage: str,
    name: str,
    what: str,
    shape: Shape,
    way: Way,
    section: Training,
    learnings: Sequence[Learning],
    *,
    times: int = 1,
    dev: tuple[Lengths, int] | None = None,
    beside: float = 0.0,
    beside_flops: Callable[[Batches], float] | None = None,
) -> Job:
    """The trainings of one unit in turn, `times` over, with their development evaluations."""
    tokens = flops = 0.0
    for learning in learnings:
        batches = learning.batches(section.batch_tokens, way.ranks)
        tokens += learning.epochs * batches.tokens
        flops += learning.epochs * work.training_flops(shape, way, batches)
        if beside_flops:
            flops += learning.epochs * beside_flops(batches)
        if dev:
            judged = work.running_batches(*dev, section.batch_tokens)
            rounds = max(1, round(learning.epochs * section.evaluations))
            flops += rounds * work.running_flops(shape, way.classes, judged)

    def need(way: Way, batch_tokens: int) -> dict[str, float]:
        cut = [learning.batches(batch_tokens, way.ranks) for learning in learnings]
        judged = work.running_batches(*dev, batch_tokens).largest if dev else ()
        micros = [micro for batches in cut for micro in batches.largest]
        several = any(batches.accumulated for batches in cut)
        return memory.training(shape, way, micros, several, judged=judged, beside=beside)

    learnt = trained(shape, way)
    return Job(
        stage=stage,
        name=name,
        what=what,
        times=times,
        steps=times * sum(learning.steps() for learning in learnings),
        tokens=times * tokens,
        flops=times * flops,
        disk=times * 4.0 * learnt,
        scratch=16.0 * learnt,  # a checkpoint: weights, Adam's moments, the best weights so far
        way=way,
        batch_tokens=section.batch_tokens,
        longest=max(int(learning.lengths.max()) for learning in learnings),
        need=need,
    )


def run_over(
    plan: Plan,
    stage: str,
    name: str,
    what: str,
    model: Model,
    way: Way,
    batch_tokens: int,
    views: Any,
    learnt: bool = False,
) -> Job:
    """Logits of `views`, a list of (Part, rows): one forward pass over each, its result on disk. learnt: by
    a model that was trained just before, and not loaded for it."""
    shape = plan.shapes[model.name]
    given = [(part, count) for part, count in views if count]
    passes = [work.running_batches(part.lengths, count, batch_tokens) for part, count in given] or [NONE]
    flops = sum(work.running_flops(shape, way.classes, batches) for batches in passes)

    def need(way: Way, batch_tokens: int) -> dict[str, float]:
        cut = [work.running_batches(part.lengths, count, batch_tokens) for part, count in given] or [NONE]
        widest = max(activations.running(shape, way, micro) for one in cut for micro in one.largest)
        parts = (
            {**memory.resting(shape, way), "activations": widest}
            if learnt
            else memory.frozen(shape, way, widest)
        )
        return {**parts, "peak": sum(parts.values()) - parts["host"]}

    rows = sum(count for _, count in given)
    return Job(
        stage=stage,
        name=name,
        what=what,
        tokens=sum(batches.tokens for batches in passes),
        flops=flops,
        disk=rows * (4.0 * (plan.classes or 0) + 16),
        way=way,
        batch_tokens=batch_tokens,
        longest=max((int(part.lengths.max()) for part, _ in given), default=1),
        need=need,
    )


def repeated(job: Job, times: int) -> Job:
    return replace(
        job, times=times, tokens=times * job.tokens, flops=times * job.flops, disk=times * job.disk
    )


def seen(plan: Plan, model: Model, views: Sequence[str]) -> list[tuple[Part, int]]:
    """A fold's views as parts and rows of them."""
    train = plan.parts["train", model.name]
    inside = plan.share("train", model)
    held = train.count - inside
    rows = {"in_sample": (train, inside), "oof": (train, held)}
    rows |= {name: (plan.parts[name, model.name], plan.share(name, model)) for name in ("test", "transfer")}
    return [rows[view] for view in dict.fromkeys(views)]


def dev_of(plan: Plan, model: Model) -> tuple[Lengths, int] | None:
    """A fold's development rows: its own in their given order only."""
    if plan.config.folds.count == 1:
        return None
    train = plan.parts["train", model.name]
    held = (train.count or ROW) // plan.config.folds.count
    return train.lengths, held // (2 if plan.config.task.swap else 1)
