"""How anything is trained: what teachers, `pretrain:` and `distill:` share; adapters; `pretrain:`."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from llmkd.schema_base import MACHINE, Closed


def _existing_file(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError("no such file")
    try:
        json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError("not JSON") from None
    return path


Beta = Annotated[float, Field(ge=0, lt=1)]
File = Annotated[str, AfterValidator(_existing_file)]


class Lora(Closed):
    """An adapter instead of full fine-tuning; its update is alpha/r · B·A."""

    r: int = Field(64, ge=1, description="rank")
    alpha: float = Field(128, gt=0, description="scale, over r")
    dropout: float = Field(0.05, ge=0, lt=1, description="share of an adapter's inputs left out in training")
    targets: str | list[str] = Field("all-linear", description="modules with an adapter, as peft names them")


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
    data: str = Field(
        description="a source, as task.train; rows shared with test go, of supervised ones train's too"
    )
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
