"""What each unit of a run is made from: its settings and its inputs' digests, hence its fingerprint.

A stage skips its own unit by it, and refuses an input that was made from another config or other rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd import description, run
from llmkd.config import science
from llmkd.errors import RunError
from llmkd.inputs import (
    DISTILL,
    EVALUATE,
    MERGE,
    PREPARE,
    PRETRAIN,
    QUANTIZE,
    TEACHERS,
    base,
    checkpoint,
    command,
    rows_directory,
)
from llmkd.schema import Config
from llmkd.schema_distill import Distill
from llmkd.schema_models import External, Lightgbm, Llm, Model, Student
from llmkd.schema_training import Training
from llmkd.settings import (
    model_settings,
    phases,
    prepare_settings,
    pretrain_settings,
    seed_of,
    teacher_settings,
    text_settings,
)
from llmkd.tracking import Track

TRAINING = set(Training.model_fields)


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


def track(config: Config, recipe: Recipe) -> Track:
    """Where a unit's curves go."""
    root = Path(config.run)
    return Track(config.tracking, root, recipe.directory.relative_to(root).as_posix(), recipe.settings)


def rows(config: Config) -> dict[str, str]:
    """The digest of stage 00's rows."""
    return {PREPARE: run.digest(rows_directory(config), command(config, PREPARE))}


def finished(config: Config, *recipes: Recipe) -> dict[str, str]:
    """Digests of units as inputs of the next. Raises RunError where one is missing or stale."""
    digests = {}
    for recipe in recipes:
        remedy = command(config, recipe.stage)
        if run.manifest(recipe.directory, remedy).get("fingerprint") != recipe.mark:
            raise RunError(f"{recipe.directory}: made from another config or other inputs; {remedy}")
        digests[str(recipe.directory.relative_to(config.run))] = run.digest(recipe.directory, remedy)
    return digests


def prepared(config: Config) -> Recipe:
    task = config.task
    sources = {"train": task.train, "test": task.test, "transfer": task.transfer and task.transfer.data}
    inputs = {part: run.source_digest(source) for part, source in sources.items() if source}
    return Recipe(Path(config.run) / PREPARE, PREPARE, prepare_settings(config), inputs)


def pretrained(config: Config, model: Model) -> Recipe:
    todo = phases(config, model)
    inputs = {f"data {i}": run.source_digest(phase.data) for i, phase in enumerate(todo)} | checkpoint(model)
    held = config.task.kind == "causal_lm" or any(phase.objective == "supervised" for phase in todo)
    if model.init or held:  # a tokenizer is trained on the rows; other rows are held against test rows
        inputs |= rows(config)
    directory = Path(config.run) / PRETRAIN / model.name
    return Recipe(directory, PRETRAIN, pretrain_settings(config, model), inputs)


def teacher(config: Config, which: Llm | Lightgbm | External, fold: int) -> Recipe:
    """One fold's teacher; of a language model one cache of all rows serves every fold."""
    fold = 0 if config.task.kind == "causal_lm" else fold
    seed = seed_of(config, which) if isinstance(which, Llm) else config.seed
    settings: dict[str, Any] = {"seed": seed, "teacher": teacher_settings(which), "views": config.views}
    settings |= {"fold": fold}
    inputs = rows(config)
    if config.task.kind == "causal_lm":
        assert isinstance(which, Llm)
        settings |= {"precision": config.precision, **_captured(config, which.name)}
        inputs |= base(config, which)[1]
    elif isinstance(which, Llm):
        settings |= {"precision": config.precision, "text": text_settings(config, which)}
        inputs |= base(config, which)[1]
    elif isinstance(which, External):
        inputs |= {
            f"{which.name} {part}": run.source_digest(source) for part, source in said_in(config, which)
        }
    directory = Path(config.run) / TEACHERS / which.name / f"fold{fold}"
    return Recipe(directory, TEACHERS, settings, inputs)


def _captured(config: Config, name: str) -> dict[str, Any]:
    """What a cache of next tokens is of: its layout, and the student's tokens, which its teachers read."""
    student, distill = config.student, config.distill_of(config.student)
    degrees = distill.temperature
    tokenizer = {"model": student.model, "init": student.init and science(student.init)["tokenizer"]}
    return {
        "text": text_settings(config, student),
        "tokenizer": {**tokenizer, "pad_token": student.pad_token},
        "cache": distill.cache and science(distill.cache),
        "temperature": degrees.get(name, 1.0) if isinstance(degrees, dict) else degrees,
    }


def beside(config: Config, which: Student) -> list[Llm]:
    """The language models that run beside a student, which have no units: nothing of theirs is cached."""
    if config.task.kind != "causal_lm" or config.distill_of(which).cache:
        return []
    return [one for one in config.teachers if isinstance(one, Llm)]


def said_in(config: Config, which: External) -> list[tuple[str, str]]:
    """The files an external teacher's word stands in, by the part whose rows it is about."""
    task = config.task
    transfer = task.transfer.data if task.transfer else None
    parts = [("train", task.train), ("test", task.test), ("transfer", transfer)]
    return [(part, which.path or source) for part, source in parts if source]


def source(config: Config, name: str, fold: int) -> Recipe:
    """The unit of the teacher, or of the earlier student, of that name."""
    for which in config.teachers:
        if which.name == name:
            return teacher(config, which, fold)
    return student(config, next(one for one in config.students if one.name == name), "student", fold)


def read_from(config: Config, fold: int, distill: Distill) -> list[int]:
    """The folds whose teachers' logits this fold's student reads."""
    others = [other for other in range(config.folds.count) if other != fold]
    if distill.view == "oof":
        return others
    return [fold, *others] if distill.weighting == "fitted" else [fold]


def student(config: Config, which: Student, kind: str, fold: int) -> Recipe:
    """One fold's student, or its baseline, which has no teachers in its settings nor its inputs."""
    distill = config.distill_of(which)
    settings: dict[str, Any] = {"kind": kind, "fold": fold, "student": model_settings(which)}
    settings |= {"text": text_settings(config, which), "precision": config.precision, "seed": config.seed}
    settings["views"] = student_views(config, which)
    settings["start"] = seed_of(config, which)  # draws a head that the checkpoint lacks
    inputs = {**rows(config), **base(config, which)[1]}
    name = which.name if kind == "student" else f"{which.name}-baseline"
    if kind == "baseline":
        phases = [science(phase) for phase in baseline_phases(distill)]
        settings["trainings"] = [{key: phase[key] for key in phase if key in TRAINING} for phase in phases]
    else:
        settings |= {"distill": science(distill), "teachers": config.teachers_of(which)}
        idle = [] if distill.method == "sequence" else ["cache", "on_policy"]
        for key in ("baseline", "baseline_epochs", *idle):  # these change nothing in this student
            settings["distill"].pop(key)
        online = beside(config, which)
        sources = [
            source(config, name, other)
            for name in config.teachers_of(which)
            for other in read_from(config, fold, distill)
            if not online
        ]
        inputs |= finished(config, *sources)
        settings |= {"online": [model_settings(one) for one in online]} if online else {}
        inputs |= {key: value for one in online for key, value in base(config, one)[1].items()}
        if distill.method == "mutual":
            settings["peers"] = [
                {**model_settings(peer), **text_settings(config, peer)} for peer in config.peers
            ]
            inputs |= {key: value for peer in config.peers for key, value in base(config, peer)[1].items()}
    return Recipe(Path(config.run) / DISTILL / name / f"fold{fold}", DISTILL, settings, inputs)


def baseline_phases(distill: Distill) -> list[Distill]:
    """A baseline trains as the student does, phase by phase, if not asked to train for another while."""
    if distill.baseline_epochs is None:
        return distill.in_phases()
    return [
        phase.model_copy(update={"epochs": distill.baseline_epochs}) for phase in distill.in_phases()[-1:]
    ]


def student_views(config: Config, which: Student) -> list[str]:
    """Which logits a student leaves: those it is judged by, and those that a later one learns from."""
    if config.task.kind == "causal_lm":
        return []
    followed = any(which.name in config.teachers_of(one) for one in config.students)
    return [*config.views, "test", "transfer"] if followed else ["oof", "test"]


def kinds_of(config: Config, which: Student) -> list[str]:
    """A baseline shows what teachers are worth to the student that is shipped."""
    shown = config.distill_of(which).baseline and which is config.student
    return ["student", "baseline"] if shown else ["student"]


def students(config: Config, kind: str = "student", which: Student | None = None) -> list[Recipe]:
    """All folds of one student, by default of the one that is shipped."""
    return [student(config, which or config.student, kind, fold) for fold in range(config.folds.count)]


def merged(config: Config) -> Recipe:
    settings = {"merge": science(config.merge), "student": model_settings(config.student)}
    settings["description"] = description.of_config(config)  # stands in its directory
    inputs = {**base(config, config.student)[1], **finished(config, *students(config))}
    inputs |= rows(config)  # their labels, and the folds' logits, are what calibrates
    return Recipe(Path(config.run) / MERGE, MERGE, settings, inputs)


def quantized(config: Config) -> Recipe:
    assert config.quantize
    # the seed draws the rows that calibrate
    settings = {"seed": config.seed, "quantize": science(config.quantize)}
    settings |= {"text": text_settings(config, config.student)}
    inputs = {**rows(config), **finished(config, merged(config))}
    return Recipe(Path(config.run) / QUANTIZE, QUANTIZE, settings, inputs)


def judged(config: Config) -> dict[str, list[Recipe]]:
    """Whose folds left logits that are judged; the student last, after its baseline."""
    folds = range(config.folds.count)
    leave = [which for which in config.teachers if which not in beside(config, config.student)]
    found = {which.name: [teacher(config, which, fold) for fold in folds] for which in leave}
    found |= {which.name: students(config, which=which) for which in config.students[:-1]}
    if config.distill_of(config.student).baseline:
        found["baseline"] = students(config, "baseline")
    return {**found, "student": students(config)}


def judging_settings(config: Config) -> dict[str, Any]:
    settings = {"evaluate": science(config.evaluate), "text": text_settings(config, config.student)}
    return {**settings, "student": model_settings(config.student)}


def evaluated(config: Config) -> Recipe:
    made = [recipe for recipes in judged(config).values() for recipe in recipes]
    artifact = quantized(config) if config.quantize else merged(config)
    inputs = {**rows(config), **finished(config, *made, artifact)}
    return Recipe(Path(config.run) / EVALUATE, EVALUATE, judging_settings(config), inputs)
