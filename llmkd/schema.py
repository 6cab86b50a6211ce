"""What a run's YAML may say: typed, closed sections with their defaults. How it is read: `llmkd.config`."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PrivateAttr,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llmkd.crosschecks import crosschecks
from llmkd.losses import LOSSES, parameter_faults


def _safe_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ValueError("use letters, digits, '.', '_' and '-' only, as names become folders")
    return name


def _existing_file(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError("no such file")
    try:
        json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError("not JSON") from None
    return path


Name = Annotated[str, AfterValidator(_safe_name)]
Beta = Annotated[float, Field(ge=0, lt=1)]
File = Annotated[str, AfterValidator(_existing_file)]
View = Literal["in_sample", "oof"]
Part = Literal["train", "transfer", "test"]
# Fields about the machine, not the science: they never enter a fingerprint, so a run may change machines.
MACHINE: dict[str, JsonValue] = {"machine": True}
TERMS = {"ce": 1.0, "kl": 1.0, "cosine": 1.0}  # the reference recipe's, each of weight 1
SEQUENCE_TERMS = {"ce": 1.0, "kl": 1.0}  # of next tokens
NET = "llmkd-"  # how the package's own architectures begin
TOKENS = "llmkd-hashed"  # the one of them that reads text


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Features(Closed):
    """The columns of a tabular row. A step series names its columns in the order of time."""

    numeric: list[str] = Field(default_factory=list, description="columns of numbers; a gap is a value too")
    categorical: list[str] = Field(default_factory=list, description="columns of categories")
    steps: dict[str, list[str]] = Field(
        default_factory=dict, description="series name -> its columns, oldest first"
    )

    @property
    def columns(self) -> list[str]:
        return [*self.numeric, *self.categorical, *(name for names in self.steps.values() for name in names)]


class Image(Closed):
    """Raw bytes, one a pixel, row by row."""

    column: str = Field("image", description="the column that holds the bytes")
    shape: tuple[int, int] = Field(description="height and width in pixels")
    shift: int = Field(0, ge=0, description="pixels by which training images are moved at random")


class Transfer(Closed):
    """Further rows for soft labels; a label that they may have is not read. A bare path is `data:` alone."""

    data: str = Field(description="a file, a glob, hub:... or arena:..., as task.train")
    columns: dict[str, str] | None = Field(None, description="where they differ from task.columns")
    sentences: tuple[int, int] | None = Field(None, description="cut texts into sentences of so many words")
    rows: int | None = Field(None, ge=1, description="use the first this many rows only")

    @model_validator(mode="before")
    @classmethod
    def _path(cls, data: Any) -> Any:
        return {"data": data} if isinstance(data, str) else data


class Task(Closed):
    """What a row is and where the rows come from."""

    kind: Literal["preference", "classification", "tabular", "image", "causal_lm"] = Field(
        description="two answers to judge, a text, columns, pixels, or next tokens"
    )
    train: str = Field(description=".csv, .jsonl or .parquet, a glob of them, hub:owner/name:config:split")
    test: str | None = Field(None, description="rows that judge and enter no fold; stage 06 needs them")
    rows: int | None = Field(None, ge=1, description="use the first this many training rows only")
    transfer: Transfer | None = Field(None, description="further rows for soft labels alone")
    columns: dict[str, str] = Field(default_factory=dict, description="task field -> column in the file")
    label: str | list[str] | None = Field("label", description="a column, or one-hot columns in label order")
    labels: list[str] | None = Field(None, min_length=2, description="class names in order")
    label_values: dict[str, int] | None = Field(None, description="value in the file -> class number")
    id: str | None = Field(None, description="a column of unique ids; rows are numbered without one")
    extra: list[str] = Field(default_factory=list, description="further columns that the template may use")
    features: Features | None = Field(None, description="of tabular rows")
    image: Image | None = Field(None, description="of image rows")
    turns: Literal["text", "json"] = Field("text", description="json: a field is a JSON list of turns")
    empty: Literal["error", "drop"] = Field("error", description="what befalls rows without content")
    leaks: Literal["drop", "report", "error"] = Field(
        "drop", description="what befalls training rows that share content or group with a test row"
    )
    swap: bool = Field(False, description="of pairs: learn from both orders of every training row")
    max_tokens: int = Field(1024, ge=8, description="context budget; the longer answer is cut first")
    max_words: dict[str, int] | None = Field(None, description="field -> words kept before tokenizing")
    template: str | None = Field(
        None, description="row -> text, e.g. '{prompt}\\n{response_a}'; has a default"
    )
    mask_prompt: bool = Field(True, description="of chats, only what the assistant says is learnt")
    pack: bool = Field(
        False, description="texts into blocks of max_tokens, in which they do not see one another"
    )


class Folds(Closed):
    """Training rows in parts: each fold's models learn from all the others and are scored on it."""

    count: int = Field(5, ge=1, description="1: one model on all rows, no development rows")
    group: str | None = Field(None, description="rows that share this field stay in one fold")
    stratify: bool = Field(True, description="equal shares of each class in every fold")


class Lora(Closed):
    """An adapter instead of full fine-tuning; its update is alpha/r · B·A."""

    r: int = Field(64, ge=1, description="rank")
    alpha: float = Field(128, gt=0, description="scale, over r")
    dropout: float = Field(0.05, ge=0, lt=1, description="share of an adapter's inputs left out in training")
    targets: str | list[str] = Field("all-linear", description="modules with an adapter, as peft names them")


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


class Training(Closed):
    """How anything is trained: these keys stand in each teacher that is a network, in each phase of pretrain:
    and in distill:. Defaults are the reference recipe's for its teachers."""

    epochs: float = Field(1, gt=0, description="passes over the rows; may be a fraction")
    learning_rate: float = Field(1e-5, gt=0, description="peak, of AdamW")
    batch_rows: int = Field(64, ge=1, description="rows of one optimizer step, over all ranks")
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="the learning rate after the warm-up"
    )
    warmup: float = Field(0, ge=0, description="steps; below 1, a share of all steps")
    weight_decay: float = Field(0, ge=0, description="AdamW's, decoupled")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: not clipped")
    evaluations: int = Field(1, ge=1, description="development evaluations an epoch; the best one is kept")
    batch_tokens: int = Field(
        16384, ge=8, description="tokens of one micro-batch, padding included", json_schema_extra=MACHINE
    )
    deepspeed: File | None = Field(
        None, description="a DeepSpeed JSON, e.g. configs/deepspeed/zero2.json", json_schema_extra=MACHINE
    )
    gradient_checkpointing: bool = Field(
        False, description="less memory for more time", json_schema_extra=MACHINE
    )
    checkpoint_minutes: float = Field(
        10, ge=0, description="after which a training is saved; 0: every step", json_schema_extra=MACHINE
    )
    on_nan: Literal["stop", "skip"] = Field("stop", description="where a loss or gradient is not finite")

    def training(self) -> dict[str, Any]:
        """The training's own fields, as keyword arguments of `llmkd.train`."""
        return {name: getattr(self, name) for name in Training.model_fields}


class Pretrain(Training):
    """One phase of continued pretraining."""

    objective: Literal["causal_lm", "supervised"] = Field(
        "supervised", description="labelled rows of the task's kind, or next tokens of plain texts"
    )
    data: str = Field(description="a source, as task.train; rows shared with the test part go")
    models: list[str] | None = Field(None, description="names of the models it is for; all by default")
    columns: dict[str, str] = Field(default_factory=dict, description="task field -> column in this file")
    label: str | list[str] | None = Field("label", description="a column, or one-hot columns in label order")
    label_values: dict[str, int] | None = Field(None, description="value in this file -> class number")
    max_tokens: int | None = Field(None, ge=8, description="context budget; the model's own by default")
    rows: int | None = Field(None, ge=1, description="use the first this many rows only")
    lora: Lora | None = Field(None, description="train an adapter and merge it; in full by default")
    load_in: Literal["auto", "fp32", "bf16", "nf4", "int8"] = Field(
        "auto", description="base weights; nf4 and int8 need lora:"
    )

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.lora is None and self.load_in in ("nf4", "int8"):
            raise ValueError(f"a base in {self.load_in} cannot be trained in full: add lora: {{}}")
        return self


class Llm(Model, Training):
    """A model fine-tuned fold by fold: an LLM, or one of the package's nets."""

    kind: Literal["llm"] = Field("llm", description="a network")


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


def _terms(fields: dict[str, Any]) -> dict[str, float]:
    """The terms of a `distill:` section that names none, by the fields that stand before them."""
    return dict(SEQUENCE_TERMS if fields.get("method") == "sequence" else TERMS)


class FeaturePair(Closed):
    """Hidden states to match: layer i is the output of layer i, 0 the embeddings."""

    teacher: str = Field(description="its name")
    teacher_layer: int = Field(ge=0, description="whose output is matched")
    student_layer: int = Field(ge=0, description="whose output learns it")


class Phase(Closed):
    """What differs from `distill:` in one of several trainings in a row, each from the last one's weights."""

    rows: list[Part] | None = Field(None, min_length=1, description="parts it learns from")
    terms: dict[str, float] | None = Field(None, description="weights; those not named stay")
    epochs: float | None = Field(None, gt=0, description="passes over its rows")
    learning_rate: float | None = Field(None, gt=0, description="peak")
    batch_rows: int | None = Field(None, ge=1, description="rows of one optimizer step")
    warmup: float | None = Field(None, ge=0, description="steps; below 1, a share of its steps")


class TokenCache(Closed):
    """Of a teacher's distribution over the next token, what stage 02 keeps."""

    how: Literal["sampled", "topk"] = Field("sampled", description="drawn without bias, or the likeliest")
    k: int = Field(21, ge=1, description="words a token; sampled, as many more as its bytes hold")
    bits: Literal[8, 16, 32] = Field(8, description="of a probability")


class Distill(Training):
    """(w_ce CE + sum_i w_i (w_kl KL_i + w_cos cos_i)) / sum of the weights."""

    method: Literal["cached", "online", "feature", "self_distillation", "mutual", "sequence"] = Field(
        "cached", description="how a student learns; docs/methods.md"
    )
    view: View = Field(
        "in_sample", description="logits of the fold's own teacher, or of those that did not see the row"
    )
    rows: list[Part] = Field(["train", "transfer"], min_length=1, description="parts it learns from")
    terms: dict[str, float] = Field(
        default_factory=lambda data: _terms(data),
        description="weight of each loss; those not named keep 1 of ce, kl and cosine (sequence: ce and kl)",
    )
    params: dict[str, dict[str, float]] = Field(default_factory=dict, description="a term's own arguments")
    temperature: float | dict[str, float] = Field(1.0, description="of soft labels; one, or by teacher")
    teacher_weights: dict[str, float] = Field(default_factory=dict, description="1 where not named")
    weighting: Literal["fixed", "confidence", "entropy", "ce", "fitted"] = Field(
        "fixed", description="teachers' shares: as given, by row, or fitted on out-of-fold logits"
    )
    normalize: bool = Field(True, description="divide the loss by the sum of its weights")
    features: list[FeaturePair] = Field(
        default_factory=list, description="layers that method: feature matches"
    )
    feature_weight: float = Field(1.0, gt=0, description="of hidden states, beside the terms")
    feature_loss: Literal["mse", "cosine"] = Field("mse", description="between hidden states")
    feature_at: Literal["tokens", "pooled"] = Field(
        "tokens", description="every token, for one tokenizer; pooled: a vector a row, for two"
    )
    peer_temperature: float = Field(4.0, gt=0, description="of mutual learning")
    exit_temperature: float = Field(3.0, gt=0, description="of self-distillation")
    cache: TokenCache | None = Field(TokenCache(), description="of a sequence's teachers; null: online")
    on_policy: float = Field(0, ge=0, le=1, description="share of batches in a sequence student's own words")
    phases: list[Phase] = Field(default_factory=list, description="several trainings in turn")
    baseline: bool = Field(False, description="also train the same student on hard labels alone")
    baseline_epochs: float | None = Field(None, gt=0, description="where it is not to train as long")
    epochs: float = Field(2, gt=0, description="passes over the rows; may be a fraction")
    learning_rate: float = Field(5e-5, gt=0, description="peak, of AdamW")

    @field_validator("terms", mode="before")
    @classmethod
    def _over_the_defaults(cls, terms: Any, info: ValidationInfo) -> Any:
        """Terms that are not named keep their weight: `terms: {kl: 2}` is not KL alone."""
        return {**_terms(info.data), **terms} if isinstance(terms, dict) else terms

    @model_validator(mode="after")
    def _known_terms(self) -> Self:
        temperatures = self.temperature.values() if isinstance(self.temperature, dict) else [self.temperature]
        unknown = sorted(set(self.terms) - set(LOSSES))
        idle = sorted(name for name in self.params if not self.terms.get(name))
        checks = {
            f"terms: unknown {unknown}; known are {sorted(LOSSES)}": unknown,
            "terms: weights must be 0 or more": min(self.terms.values()) < 0,
            "terms: weights must not all be 0": not any(self.terms.values()),
            "temperature: must be above 0": min(temperatures, default=1) <= 0,
            "teacher_weights: must be 0 or more": min(self.teacher_weights.values(), default=0) < 0,
        }
        checks |= dict.fromkeys((f"params: {fault}" for fault in parameter_faults(self.params)), True)
        checks[f"params: {idle} are no terms of a weight above 0"] = idle
        if any(checks.values()):
            raise ValueError("\n".join(message for message, fault in checks.items() if fault))
        return self

    def in_phases(self) -> list["Distill"]:
        """One section a phase; a section without phases is its own only one."""
        asked = [phase.model_dump(exclude_none=True) for phase in self.phases] or [{}]
        own = {name: getattr(self, name) for name in Distill.model_fields if name != "phases"}
        merged = [{**own, **phase, "terms": {**self.terms, **phase.get("terms", {})}} for phase in asked]
        return [Distill.model_validate(section) for section in merged]


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
