"""From a config to what one fold's student learns by: its teachers' logits, objectives, method and phases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkd import crossfit, units
from llmkd.inputs import base
from llmkd.loading import examples_of, load_model
from llmkd.objective import HARD, Objective
from llmkd.schema import Config
from llmkd.schema_distill import Distill
from llmkd.schema_models import Model, Student

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from llmkd.batches import Examples

ONLINE = ("online", "feature")  # methods that run their teachers beside the student, and read no cache


def fits(
    config: Config,
    which: Student,
    kind: str,
    fold: int,
    model: nn.Module,
    examples: Examples,
    table: pa.Table,
    labels: list[str],
    directory: Path,
    precision: str,
) -> tuple[list[crossfit.Fit], dict[str, Any]]:
    """The trainings of one fold's student or baseline, in turn; and what was found on the way to them."""
    from llmkd.methods.cached import Cached
    from llmkd.train import arguments, split

    distill = config.distill_of(which)
    names = config.teachers_of(which) if kind == "student" else []
    settings: Any = model.config
    if which.init and getattr(settings, "heads", 1) > 1:  # a baseline's second head learns nothing
        settings.take = which.init.config.get("take", "mean") if names else "hard"
    facts: dict[str, Any] = {}
    if names and distill.method not in ONLINE:
        examples = examples.with_teachers(cached_logits(config, distill, names, fold, table, labels))
    weights = [distill.teacher_weights.get(name, 1.0) for name in names]
    if distill.weighting == "fitted" and names:
        examples, weights, facts = fitted(config, names, fold, examples, table, labels)
    method: nn.Module | None = None
    found = []
    for phase in distill.in_phases() if kind == "student" else units.baseline_phases(distill):
        soft = bool(names) and any(weight for name, weight in phase.terms.items() if name != "ce")
        objective = objective_of(phase, names, weights) if kind == "student" else HARD
        parts = phase.rows if kind == "student" else ["train"]
        rows = crossfit.learning_rows(table, fold, config.folds.count, parts, soft=soft)
        trainer, batching = split(phase.training())
        training = arguments(directory, seed=config.seed, **trainer)
        if method is None and kind == "baseline":
            method = Cached(model, HARD, precision)
        if method is None:  # after `arguments`, so that ZeRO-3 shards an online teacher too
            method, examples = method_of(
                config, distill, names, fold, model, examples, table, labels, precision
            )
        found.append(crossfit.Fit(method, objective, examples, rows, training, batching))
    return found, facts


def objective_of(phase: Distill, names: list[str], weights: list[float]) -> Objective:
    degrees = phase.temperature
    temperatures = [degrees.get(name, 1.0) if isinstance(degrees, dict) else degrees for name in names]
    weighting = "fixed" if phase.weighting == "fitted" else phase.weighting
    return Objective(
        {name: weight for name, weight in phase.terms.items() if weight},
        names,
        weights,
        temperatures,
        phase.normalize,
        params=phase.params,
        weighting=weighting,
    )


def cached_logits(
    config: Config, distill: Distill, names: list[str], fold: int, table: pa.Table, labels: list[str]
) -> Any:
    """The teachers' logits (N, T, C) beside every row that any phase learns from."""
    there = set(table["part"].unique().to_pylist())
    asked = {part for phase in distill.in_phases() for part in phase.rows}
    where = {name: lambda source, name=name: units.source(config, name, source).directory for name in names}
    return crossfit.teacher_logits(
        table,
        where,
        fold,
        count=config.folds.count,
        view=distill.view,
        labels=labels,
        parts=sorted(asked & there),
    )


def fitted(
    config: Config, names: list[str], fold: int, examples: Examples, table: pa.Table, labels: list[str]
) -> tuple[Examples, list[float], dict[str, Any]]:
    """The convex combination of calibrated teachers that is best on out-of-fold logits of `fold`'s own
    training rows; the cached logits are divided by the temperatures found."""
    from llmkd import weights

    where = {name: lambda source, name=name: units.source(config, name, source).directory for name in names}
    count = config.folds.count
    held = crossfit.teacher_logits(table, where, fold, count=count, view="oof", labels=labels)
    rows = crossfit.learning_rows(table, fold, count, ["train"], soft=False)
    found = weights.fit(held[rows], crossfit.training_labels(table)[rows])
    if examples.teacher_logits is not None:
        scaled = np.empty_like(examples.teacher_logits)
        for t, temperature in enumerate(found.temperatures):
            scaled[:, t] = examples.teacher_logits[:, t] / np.float64(temperature)  # rounded once
        examples = replace(examples, teacher_logits=scaled)
    shares = found.weights * len(names)  # as much in all as weights of 1
    facts = {
        "teacher_weights": dict(zip(names, map(float, found.weights), strict=True)),
        "teacher_temperatures": dict(zip(names, map(float, found.temperatures), strict=True)),
    }
    return examples, [float(share) for share in shares], facts


def method_of(
    config: Config,
    distill: Distill,
    names: list[str],
    fold: int,
    model: nn.Module,
    examples: Examples,
    table: pa.Table,
    labels: list[str],
    precision: str,
) -> tuple[nn.Module, Examples]:
    """The method that a student learns by, with further models' inputs beside the examples."""
    objective = objective_of(distill, names, [1.0] * len(names))
    if distill.method == "cached":
        from llmkd.methods.cached import Cached

        return Cached(model, objective, precision), examples
    if distill.method == "self_distillation":
        from llmkd.methods.self_distillation import SelfDistillation
        from llmkd.models.exits import depths

        at = depths(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
        exits = SelfDistillation(model, objective, at, distill.exit_temperature, precision, seed=config.seed)
        return exits, examples
    if distill.method == "mutual":
        return mutual(config, distill, objective, model, examples, table, labels, precision)
    from llmkd.methods.feature import Feature
    from llmkd.methods.online import Online

    teachers, examples = online_teachers(config, names, fold, examples, table, labels, precision)
    if distill.method == "online":
        return Online(model, objective, teachers, precision), examples
    pairs = [(pair.teacher, pair.teacher_layer, pair.student_layer) for pair in distill.features]
    feature = Feature(
        model,
        objective,
        teachers,
        pairs,
        weight=distill.feature_weight,
        how=distill.feature_loss,
        at=distill.feature_at,
        precision=precision,
        seed=config.seed,
    )
    return feature, examples


def mutual(
    config: Config,
    distill: Distill,
    objective: Objective,
    model: nn.Module,
    examples: Examples,
    table: pa.Table,
    labels: list[str],
    precision: str,
) -> tuple[nn.Module, Examples]:
    from llmkd.methods.mutual import Mutual

    peers, beside = {config.student.name: model}, dict(examples.beside)
    for peer in config.peers:
        network, reader = load_model(config, peer, base(config, peer)[0], labels, precision)
        peers[peer.name] = network
        if not peer.is_net:  # a net reads the very images that the student reads, shifted alike
            beside[peer.name] = examples_of(config, peer, table, reader).inputs
    method = Mutual(peers, objective, distill.peer_temperature, precision)
    return method, replace(examples, beside=beside)


def online_teachers(
    config: Config,
    names: list[str],
    fold: int,
    examples: Examples,
    table: pa.Table,
    labels: list[str],
    precision: str,
) -> tuple[dict[str, nn.Module], Examples]:
    """This fold's teachers as they were trained, and their own inputs beside the student's.

    Nets read the very inputs that the student reads, so they see the same random shifts.
    """
    from llmkd.models.lora import load_trained

    networks, beside = {}, dict(examples.beside)
    for name in names:
        which = next(model for model in config.models if model.name == name)
        network, reader = load_model(config, which, base(config, which)[0], labels, precision)
        load_trained(network, units.source(config, name, fold).directory / "adapter")
        networks[name] = network
        if not isinstance(which, Model) or not which.is_net:
            beside[name] = examples_of(config, which, table, reader).inputs
    return networks, replace(examples, beside=beside)
