"""The run's YAML, typed and closed. Sparse: a file holds only what differs from the defaults here."""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from llmkd.errors import ConfigError
from llmkd.losses import LOSSES
from llmkd.tasks import KINDS


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


class _Loader(yaml.SafeLoader):
    """PyYAML takes 1e-6 for a string, as YAML 1.1 wants a dot; here it is a number, also in init.config."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)

Name = Annotated[str, AfterValidator(_safe_name)]
Beta = Annotated[float, Field(ge=0, lt=1)]
File = Annotated[str, AfterValidator(_existing_file)]
# Fields about the machine, not the science: they never enter a fingerprint, so a run may change machines.
MACHINE: dict[str, JsonValue] = {"machine": True}


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Task(Closed):
    """What a row is and where the rows come from."""

    kind: Literal["preference", "classification"]
    train: str
    test: str | None = None
    columns: dict[str, str] = Field(default_factory=dict, description="task field -> column in the file")
    label: str | list[str] | None = Field("label", description="a column, or one-hot columns in label order")
    labels: list[str] | None = Field(None, min_length=2, description="class names in order")
    label_values: dict[str, int] | None = Field(None, description="value in the file -> class number")
    id: str | None = None
    extra: list[str] = Field(default_factory=list, description="further columns that the template may use")
    turns: Literal["text", "json"] = "text"
    empty: Literal["error", "drop"] = "error"
    leaks: Literal["drop", "report", "error"] = "drop"
    swap: bool = False
    max_tokens: int = Field(1024, ge=8)
    max_words: dict[str, int] | None = None
    template: str | None = None


class Folds(Closed):
    count: int = Field(5, ge=1)
    group: str | None = Field(None, description="rows that share this field stay in one fold")
    stratify: bool = True


class Lora(Closed):
    r: int = Field(64, ge=1)
    alpha: float = Field(128, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: str | list[str] = "all-linear"


class TrainTokenizer(Closed):
    vocab_size: int = Field(1024, ge=300, description="byte-level BPE, trained on the run's own texts")


class Init(Closed):
    """A model from a tiny config instead of a checkpoint, with random weights."""

    architecture: str = Field(description="a transformers model type: llama, qwen2, gemma2, bert, ...")
    config: dict[str, Any] = Field(default_factory=dict)
    tokenizer: str | TrainTokenizer = TrainTokenizer()


class Model(Closed):
    name: Name
    model: str | None = Field(None, description="a hub id or a directory")
    init: Init | None = None
    load_in: Literal["auto", "fp32", "bf16", "nf4", "int8"] = "auto"
    lora: Lora | None = Lora()
    max_tokens: int | None = Field(None, ge=8, description="this model's own context budget")
    pad_token: str | None = None
    attention: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.init is None):
            raise ValueError("give exactly one of model: (a checkpoint) and init: (a tiny config)")
        if self.lora is None and self.load_in in ("nf4", "int8"):
            raise ValueError(f"a base in {self.load_in} cannot be trained in full: add lora: {{}}")
        return self


class Training(Closed):
    """Hyperparameters of one training; defaults are the reference recipe's for its teachers."""

    epochs: float = Field(1, gt=0)
    learning_rate: float = Field(1e-5, gt=0)
    batch_rows: int = Field(64, ge=1, description="rows of one optimizer step, over all ranks")
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(0, ge=0, description="steps; below 1, a share of all steps")
    weight_decay: float = Field(0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    clip: float = Field(1.0, ge=0)
    evaluations: int = Field(1, ge=1, description="development evaluations an epoch; the best one is kept")
    batch_tokens: int = Field(16384, ge=8, description="tokens of one micro-batch", json_schema_extra=MACHINE)
    deepspeed: File | None = Field(None, json_schema_extra=MACHINE)
    gradient_checkpointing: bool = Field(False, json_schema_extra=MACHINE)

    def training(self) -> dict[str, Any]:
        """The training's own fields, as keyword arguments of `llmkd.train`."""
        return {name: getattr(self, name) for name in Training.model_fields}


class Pretrain(Training):
    """One phase of continued pretraining."""

    objective: Literal["causal_lm", "supervised"] = "supervised"
    data: str
    models: list[str] | None = Field(None, description="names of the models it is for; all by default")
    columns: dict[str, str] = Field(default_factory=dict)
    label: str | list[str] | None = "label"
    label_values: dict[str, int] | None = None
    max_tokens: int | None = Field(None, ge=8)
    rows: int | None = Field(None, ge=1, description="use the first this many rows only")
    lora: Lora | None = Field(None, description="train an adapter and merge it; in full by default")
    load_in: Literal["auto", "fp32", "bf16", "nf4", "int8"] = "auto"

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.lora is None and self.load_in in ("nf4", "int8"):
            raise ValueError(f"a base in {self.load_in} cannot be trained in full: add lora: {{}}")
        return self


class Teacher(Model, Training):
    kind: Literal["llm"] = "llm"


class Distill(Training):
    """(w_ce CE + sum_i w_i (w_kl KL_i + w_cos cos_i)) / sum of the weights."""

    method: Literal["cached"] = "cached"
    view: Literal["in_sample", "oof"] = "in_sample"
    terms: dict[str, float] = Field(default_factory=lambda: {"ce": 1.0, "kl": 1.0, "cosine": 1.0})
    temperature: float | dict[str, float] = 1.0
    teacher_weights: dict[str, float] = Field(default_factory=dict, description="1 where not named")
    normalize: bool = True
    baseline: bool = Field(False, description="also train the same student on hard labels alone")
    epochs: float = Field(2, gt=0)
    learning_rate: float = Field(5e-5, gt=0)

    @field_validator("terms", mode="before")
    @classmethod
    def _over_the_defaults(cls, terms: Any) -> Any:
        """Terms that are not named keep their weight: `terms: {kl: 2}` is not KL alone."""
        return {"ce": 1.0, "kl": 1.0, "cosine": 1.0, **terms} if isinstance(terms, dict) else terms

    @model_validator(mode="after")
    def _known_terms(self) -> Self:
        temperatures = self.temperature.values() if isinstance(self.temperature, dict) else [self.temperature]
        unknown = sorted(set(self.terms) - set(LOSSES))
        checks = {
            f"terms: unknown {unknown}; known are {sorted(LOSSES)}": unknown,
            "terms: weights must be 0 or more": min(self.terms.values()) < 0,
            "terms: weights must not all be 0": not any(self.terms.values()),
            "temperature: must be above 0": min(temperatures, default=1) <= 0,
            "teacher_weights: must be 0 or more": min(self.teacher_weights.values(), default=0) < 0,
        }
        if any(checks.values()):
            raise ValueError("\n".join(message for message, fault in checks.items() if fault))
        return self


class Merge(Closed):
    how: Literal["delta", "factors"] = "delta"
    dtype: Literal["bf16", "fp32"] = "bf16"


class Quantize(Closed):
    bits: Literal[4, 8] = 8
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = Field(128, description="-1: a row at once")
    calibration_rows: int = Field(128, ge=1)
    desc_act: bool = False


class Evaluate(Closed):
    tta: Literal["swap", "none"] = "none"
    precision: Literal["fp32", "bf16"] = "fp32"
    max_tokens: int | None = Field(None, ge=8, description="context budget at inference")
    batch_tokens: int = Field(16384, ge=8, json_schema_extra=MACHINE)


class Config(Closed):
    run: str
    seed: int = Field(42, ge=0)
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", json_schema_extra=MACHINE)
    task: Task
    folds: Folds = Folds()
    pretrain: list[Pretrain] = Field(default_factory=list)
    teachers: list[Teacher] = Field(min_length=1)
    student: Model
    views: list[Literal["in_sample", "oof"]] = Field(
        ["in_sample", "oof"], description="which logits the teachers leave"
    )
    distill: Distill = Distill()
    merge: Merge = Merge()
    quantize: Quantize | None = Quantize()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = list(_crosschecks(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    _given: str = PrivateAttr("")

    @property
    def given(self) -> str:
        """The command line's words that led to this config, to repeat in a remedy."""
        return self._given

    @property
    def models(self) -> list[Model]:
        return [*self.teachers, self.student]


def _crosschecks(config: Config) -> Iterator[str]:
    """What no single field can know; each problem starts with the field's path."""
    names = [model.name for model in config.models]
    teachers = {teacher.name for teacher in config.teachers}
    if len(set(names)) < len(names):
        yield f"teachers, student: names {names} must differ"
    if config.folds.count == 1 and config.distill.view == "oof":
        yield "distill.view = 'oof': needs folds.count of 2 or more; with one fold every row was trained on"
    needed = "in_sample" if config.folds.count == 1 else config.distill.view
    if needed not in config.views:
        yield f"views = {config.views}: the student reads {needed!r}, so add it"
    if config.folds.count > 1 and needed != "oof" and "oof" not in config.views:
        yield f"views = {config.views}: the teachers are judged out of fold, so add 'oof'"
    for key in ("teacher_weights", "temperature"):
        named = getattr(config.distill, key)
        for name in sorted(set(named) - teachers) if isinstance(named, dict) else ():
            yield f"distill.{key}.{name}: no teacher of that name; there are {sorted(teachers)}"
    weights = [config.distill.teacher_weights.get(name, 1.0) for name in teachers]
    if not config.distill.terms.get("ce") and not any(weights):
        yield "distill.teacher_weights: all 0, and no ce term: nothing would be learnt"
    for i, phase in enumerate(config.pretrain):
        for name in sorted(set(phase.models or ()) - set(names)):
            yield f"pretrain.{i}.models: no model named {name!r}; there are {names}"
    if config.evaluate.tta == "swap" and not config.task.swap:
        yield "evaluate.tta = 'swap': needs task.swap: true"
    if config.task.swap and config.task.kind != "preference":
        yield f"task.swap = True: only preference rows have two orders, not {config.task.kind}"
    if config.task.kind == "classification" and not config.task.labels:
        yield "task.labels: name the classes in order, e.g. [negative, positive]"
    if config.task.labels and len(set(config.task.labels)) < len(config.task.labels):
        yield f"task.labels = {config.task.labels}: names must differ"
    fields = [*KINDS[config.task.kind].FIELDS, *config.task.extra]
    for key in ("columns", "max_words"):
        for name in sorted(set(getattr(config.task, key) or ()) - set(fields)):
            yield f"task.{key}.{name}: no such field; there are {fields}"


def parse(text: str, overrides: Sequence[str] = (), *, source: str = "config") -> Config:
    """A config from YAML text and dotted overrides (`distill.epochs=3`, `teachers.llama.lora.r=8`).

    Raises ConfigError with one line for each problem: source, path, value, remedy.
    """
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected keys and values at the top, found {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems = _all_problems(data, error)
        raise ConfigError("\n".join(f"{source}: {line}" for line in problems)) from None
    config._given = " ".join(["--config", source, *overrides])
    return config


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config at `path`; see `parse`."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such config file; shipped ones are in configs/")
    return parse(Path(path).read_text(encoding="utf-8"), overrides, source=str(path))


def _all_problems(data: dict[str, Any], error: ValidationError) -> list[str]:
    """Also the checks across sections, which pydantic leaves out while any field is faulty: they are
    made with the defaults of the faulty fields, where these have any."""
    found, left = list(_problems(error)), copy.deepcopy(data)
    if [problem["loc"] for problem in error.errors()] == [()]:
        return found
    removed = [_removed(left, problem["loc"]) for problem in error.errors()]
    if all(removed):
        try:
            Config.model_validate(left)
        except ValidationError as more:
            if all(problem["loc"] == () for problem in more.errors()):
                found += _problems(more)
    return found


def _removed(data: Any, place: tuple[str | int, ...]) -> bool:
    """Whether the value at `place` could be taken out, so that its default stands in."""
    for part in place[:-1]:
        data = data.get(part) if isinstance(data, dict) else None
    return bool(place) and isinstance(data, dict) and data.pop(place[-1], None) is not None


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        value = problem["input"]
        shown = "" if isinstance(value, (dict, BaseModel)) else f" = {value!r:.80}"
        for line in message.split("\n"):
            yield f"{where}{shown}: {line}" if where else line


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: write key.subkey=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML") from None
    *parents, last = path.split(".")
    here: Any = data
    for part in parents:
        here = _child(here, part, override)
    if isinstance(here, list):
        here[_position(here, last, override)] = value
    else:
        here[last] = value


def _child(here: Any, part: str, override: str) -> Any:
    child = here[_position(here, part, override)] if isinstance(here, list) else here.setdefault(part, {})
    if child is None and isinstance(here, dict):  # `lora:` left empty in the YAML
        child = here[part] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override {override!r}: {part} holds {child!r}, which has no keys")
    return child


def _position(items: list[Any], part: str, override: str) -> int:
    """A list's item by number, or by its `name`."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise ConfigError(f"override {override!r}: no item {part!r} among {len(items)} ({names})")


def science(section: BaseModel) -> dict[str, Any]:
    """A section without its machine fields: what a fingerprint is made of."""
    data: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("machine"):
            continue
        value = getattr(section, name)
        if isinstance(value, list) and value and isinstance(value[0], BaseModel):
            data[name] = [science(item) for item in value]
        else:
            data[name] = science(value) if isinstance(value, BaseModel) else value
    return data
