"""Who teaches and who learns: networks, trees and files in `teachers:`, `students:` and `peers:`."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, JsonValue, Tag, model_validator

from llmkd.schema_base import Closed
from llmkd.schema_training import Lora, Training

NET = "llmkd-"  # how the package's own architectures begin
TOKENS = "llmkd-hashed"  # the one of them that reads text


def _safe_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ValueError("use letters, digits, '.', '_' and '-' only, as names become folders")
    return name


Name = Annotated[str, AfterValidator(_safe_name)]


class TrainTokenizer(Closed):
    vocab_size: int = Field(1024, ge=300, description="byte-level BPE, trained on the run's own texts")


class Init(Closed):
    """A model from a tiny config instead of a checkpoint, with random weights."""

    architecture: str = Field(description="a transformers model type (llama, bert, ...) or llmkd-mlp, ...")
    config: dict[str, Any] = Field(default_factory=dict, description="the architecture's own settings")
    tokenizer: str | TrainTokenizer = Field(
        TrainTokenizer(), description="a hub id or directory, or {vocab_size: ...} to train one"
    )


class Model(Closed):
    """A network: teacher, student or peer. A teacher's own training is said beside these keys."""

    name: Name = Field(description="names its folder; letters, digits, '.', '_' and '-'")
    model: str | None = Field(None, description="a hub id or a directory")
    layers: list[int] | None = Field(None, min_length=1, description="keep only these layers of the model")
    init: Init | None = Field(None, description="instead of model: random weights of a tiny config")
    load_in: Literal["auto", "fp32", "bf16", "nf4", "int8"] = Field(
        "auto", description="base weights; auto: precision under an adapter, fp32 in full; nf4 is QLoRA"
    )
    lora: Lora | None = Field(Lora(), description="null: train all weights")
    max_tokens: int | None = Field(None, ge=8, description="this model's own context budget")
    shift: int | None = Field(None, ge=0, description="task.image.shift, for its own training images")
    pad_token: str | None = Field(None, description="for a tokenizer without one")
    attention: str | None = Field(None, description="eager, sdpa, ...; the model's own by default")
    trust_remote_code: bool = Field(
        False, description="run the Python code that comes with the checkpoint; read it first"
    )

    @model_validator(mode="before")
    @classmethod
    def _nets_in_full(cls, data: Any) -> Any:
        """The package's own small nets are trained in full unless an adapter is asked for."""
        init = data.get("init") if isinstance(data, dict) else None
        own = isinstance(init, dict) and str(init.get("architecture", "")).startswith(NET)
        return {"lora": None, **data} if own else data

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.init is None):
            raise ValueError("give exactly one of model: (a checkpoint) and init: (a tiny config)")
        if self.lora is None and self.load_in in ("nf4", "int8"):
            raise ValueError(f"a base in {self.load_in} cannot be trained in full: add lora: {{}}")
        if self.layers and self.model is None:
            raise ValueError("layers: are kept of a checkpoint; with init: set its number in init.config")
        return self

    @property
    def is_net(self) -> bool:
        """Whether it reads features or pixels, and has no tokenizer."""
        kind = self.init.architecture if self.init else ""
        return kind.startswith(NET) and kind != TOKENS


class Llm(Model, Training):
    """A model fine-tuned fold by fold: an LLM, or one of the package's nets."""

    kind: Literal["llm"] = Field("llm", description="a network")
    average_shifts: int = Field(
        0, ge=0, description="an image's logits: their mean over all shifts by up to so many pixels"
    )


class Lightgbm(Closed):
    """Gradient-boosted trees over a tabular row's features, or over a text row's computed fields."""

    kind: Literal["lightgbm"] = Field(description="boosted trees")
    name: Name = Field(description="names its folder")
    fields: list[str] | None = Field(None, min_length=1, description="what they read; all by default")
    params: dict[str, JsonValue] = Field(default_factory=dict, description="LightGBM's own")
    rounds: int = Field(2000, ge=1, description="trees, at most")
    early_stopping: int = Field(100, ge=1, description="rounds without a better development log loss")


class External(Closed):
    """What any other tool said: logits, probabilities or bare verdicts by id."""

    kind: Literal["file"] = Field(description="what stands in a file")
    name: Name = Field(description="names its folder")
    path: str | None = Field(None, description="by default the columns stand in the task's own files")
    id: str = Field("id", description="the column of ids in path")
    logits: list[str] | None = Field(None, min_length=1, description="columns in label order, or one list")
    probabilities: list[str] | None = Field(None, min_length=1, description="columns likewise")
    verdict: str | None = Field(None, description="a column of class names or numbers")
    verdict_values: dict[str, int] | None = Field(None, description="value in the file -> class number")
    smoothing: float = Field(0.1, gt=0, lt=1, description="what a verdict leaves to the other classes")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(value is not None for value in (self.logits, self.probabilities, self.verdict)) != 1:
            raise ValueError("give exactly one of logits:, probabilities: and verdict:")
        return self


def _kind(teacher: Any) -> Any:
    return (
        teacher.get("kind", "llm") if isinstance(teacher, dict) else getattr(teacher, "kind", type(teacher))
    )


Teacher = Annotated[
    Annotated[Llm, Tag("llm")] | Annotated[Lightgbm, Tag("lightgbm")] | Annotated[External, Tag("file")],
    Discriminator(_kind),
]


class Student(Model):
    """A network that learns from teachers; its training is said in distill:."""

    teachers: list[str] | None = Field(
        None, description="whose logits it reads: all teachers by default, in a chain the student before it"
    )
    distill: dict[str, Any] = Field(default_factory=dict, description="what differs from distill: for it")
