"""What each unit of a run is made from: its settings and its inputs' digests, hence its fingerprint.

A stage skips its own unit by it, and refuses an input that was made from another config or other rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd import run
from llmkd.config import Config, Teacher, science
from llmkd.errors import RunError
from llmkd.stage import (
    DISTILL,
    MERGE,
    PREPARE,
    QUANTIZE,
    TEACHERS,
    base,
    command,
    model_settings,
    rows_directory,
    text_settings,
)


@dataclass(frozen=True)
class Recipe:
    """A unit's place and what it is made from."""

    directory: Path
    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]

    @property
    def mark(self) -> str:
        return run.fingerprint(self.stage, self.settings, self.inputs)

    @property
    def stands(self) -> bool:
        return run.stands(self.directory, self.mark)

    def writing(self, seed: int, *, alone: bool = False) -> AbstractContextManager[run.Unit]:
        return run.writing(self.directory, self.stage, self.settings, self.inputs, seed, alone=alone)


def rows(config: Config) -> dict[str, str]:
    """The digest of stage 00's rows."""
    return {PREPARE: run.digest(rows_directory(config))}


def finished(config: Config, *recipes: Recipe) -> dict[str, str]:
    """Digests of units as inputs of the next. Raises RunError where one is missing or stale."""
    digests = {}
    for recipe in recipes:
        remedy = command(config, recipe.stage)
        if run.manifest(recipe.directory, remedy).get("fingerprint") != recipe.mark:
            raise RunError(f"{recipe.directory}: made from another config or other inputs; {remedy}")
        digests[str(recipe.directory.relative_to(config.run))] = run.digest(recipe.directory)
    return digests


def teacher(config: Config, which: Teacher, fold: int) -> Recipe:
    settings = {"seed": config.seed, "teacher": science(which), "views": config.views}
    settings |= {"fold": fold, "text": text_settings(config, which)}
    inputs = {**rows(config), **base(config, which)[1]}
    directory = Path(config.run) / TEACHERS / which.name / f"fold{fold}"
    return Recipe(directory, TEACHERS, settings, inputs)


def teachers(config: Config, folds: list[int]) -> list[Recipe]:
    return [teacher(config, which, fold) for which in config.teachers for fold in folds]


def read_from(config: Config, fold: int) -> list[int]:
    """The folds whose teachers' logits this fold's student reads."""
    if config.distill.view == "in_sample":
        return [fold]
    return [other for other in range(config.folds.count) if other != fold]


def student(config: Config, kind: str, fold: int) -> Recipe:
    """One fold's student, or its baseline, which has no teachers in its settings nor its inputs."""
    settings: dict[str, Any] = {"kind": kind, "fold": fold, "student": model_settings(config.student)}
    settings |= {"text": text_settings(config, config.student), "distill": science(config.distill)}
    settings["seed"] = config.seed
    inputs = {**rows(config), **base(config, config.student)[1]}
    name = config.student.name if kind == "student" else f"{config.student.name}-baseline"
    if kind == "baseline":
        for field in ("view", "terms", "temperature", "teacher_weights", "normalize"):
            settings["distill"].pop(field)
    else:
        inputs |= finished(config, *teachers(config, read_from(config, fold)))
    settings["distill"].pop("baseline")  # whether there is one changes nothing in the student
    return Recipe(Path(config.run) / DISTILL / name / f"fold{fold}", DISTILL, settings, inputs)


def students(config: Config, kind: str = "student") -> list[Recipe]:
    return [student(config, kind, fold) for fold in range(config.folds.count)]


def merged(config: Config) -> Recipe:
    settings = {"merge": science(config.merge), "student": model_settings(config.student)}
    inputs = {**base(config, config.student)[1], **finished(config, *students(config))}
    return Recipe(Path(config.run) / MERGE, MERGE, settings, inputs)


def quantized(config: Config) -> Recipe:
    assert config.quantize
    # the seed draws the rows that calibrate
    settings = {"seed": config.seed, "quantize": science(config.quantize)}
    settings |= {"text": text_settings(config, config.student)}
    inputs = {**rows(config), **finished(config, merged(config))}
    return Recipe(Path(config.run) / QUANTIZE, QUANTIZE, settings, inputs)
