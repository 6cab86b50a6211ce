"""What a run's YAML may say, with its defaults: all sections together. How it is read: `llmkd.config`."""

from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from llmkd.crosschecks import crosschecks
from llmkd.schema_base import MACHINE, Closed
from llmkd.schema_distill import Distill, View
from llmkd.schema_models import Llm, Model, Student, Teacher
from llmkd.schema_task import Task
from llmkd.schema_training import Pretrain


class Folds(Closed):
    """Training rows in parts: each fold's models learn from all the others and are scored on it."""

    count: int = Field(5, ge=1, description="1: one model on all rows, no development rows")
    group: str | None = Field(
        None, description="rows that share this field stay in one fold, as equal rows do; empty is none"
    )
    stratify: bool = Field(True, description="equal shares of each class in every fold")


class Merge(Closed):
    """The folds averaged into one model."""

    how: Literal["delta", "factors"] = Field(
        "delta", description="the exact mean of the folds' weights, or of A and of B as the reference does"
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="of the weights written")


class Quantize(Closed):
    """GPTQ of the merged student; embeddings and head stay in float."""

    bits: Literal[4, 8] = Field(8, description="a weight")
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = Field(
        128, description="weights that share a scale; -1: a row at once"
    )
    calibration_rows: int = Field(128, ge=1, description="training rows, drawn by the seed")
    desc_act: bool = Field(False, description="columns in the order of their activations")


class Evaluate(Closed):
    """The artifact on the test rows."""

    tta: Literal["swap", "none"] = Field("none", description="swap: also the mean of both orders of a pair")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the arithmetic")
    max_tokens: int | None = Field(None, ge=8, description="context budget at inference")
    batch_tokens: int = Field(16384, ge=8, description="tokens of one batch", json_schema_extra=MACHINE)
    continuations: int = Field(4, ge=0, description="test texts that language models go on with")
    new_tokens: int = Field(32, ge=1, description="of a continuation, at most")


class Config(Closed):
    """One run, from labelled rows to a judged 8-bit student."""

    run: str = Field(description="the directory that it is kept in; may be moved")
    seed: int = Field(42, ge=0, lt=2**32, description="of folds, weights, order and dropout")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="bf16 where the machine has it")
    tracking: Literal["tensorboard", "wandb", "mlflow", "none"] = Field(
        "tensorboard", description="where curves go; docs/tracking.md", json_schema_extra=MACHINE
    )
    task: Task = Field(description="what a row is and where rows come from")
    folds: Folds = Field(Folds(), description="how training rows are parted")
    pretrain: list[Pretrain] = Field(default_factory=list, description="phases before fine-tuning, in order")
    teachers: list[Teacher] = Field(default_factory=list, description="networks, trees, or files")
    students: list[Student] = Field(min_length=1, description="a chain; `student:` where there is only one")
    peers: list[Model] = Field(default_factory=list, description="who learns beside a mutual student")
    views: list[View] = Field(["in_sample", "oof"], description="which logits the teachers leave")
    distill: Distill = Field(Distill(), description="how students learn")
    merge: Merge = Field(Merge(), description="stage 04")
    quantize: Quantize | None = Field(
        Quantize(), description="stage 05; null: the merged model is the artifact"
    )
    evaluate: Evaluate = Field(Evaluate(), description="stage 06")

    @model_validator(mode="before")
    @classmethod
    def _one_student(cls, data: Any) -> Any:
        """`student:` is a chain of one."""
        if not isinstance(data, dict) or "student" not in data:
            return data
        if "students" in data:
            raise ValueError("give student: or students:, not both")
        return {**{key: data[key] for key in data if key != "student"}, "students": [data["student"]]}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = list(crosschecks(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    _given: str = PrivateAttr("")

    @property
    def given(self) -> str:
        """The command line's words that led to this config, to repeat in a remedy."""
        return self._given

    @property
    def student(self) -> Student:
        """The one that is merged, quantized and judged: the last of a chain."""
        return self.students[-1]

    @property
    def models(self) -> list[Model]:
        """All that are trained as networks."""
        trained: list[Model] = [teacher for teacher in self.teachers if isinstance(teacher, Llm)]
        return [*trained, *self.students, *self.peers]

    def distill_of(self, student: Student) -> Distill:
        """`distill:` with what this student has of its own."""
        own = self.distill.model_dump(exclude_unset=True)
        merged = {**own, **student.distill}
        for key in ("terms", "params", "teacher_weights"):  # what it does not name, it keeps
            if isinstance(own.get(key), dict) and isinstance(student.distill.get(key), dict):
                merged[key] = {**own[key], **student.distill[key]}
        return Distill.model_validate(merged)

    def teachers_of(self, student: Student) -> list[str]:
        """Names of teachers, or of earlier students, whose logits this student reads."""
        place = self.students.index(student)
        if student.teachers is not None:
            return student.teachers
        return [self.students[place - 1].name] if place else [teacher.name for teacher in self.teachers]
