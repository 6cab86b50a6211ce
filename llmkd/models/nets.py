"""Small nets over numbers, categories, time steps and pixels, as ordinary transformers models.

`register` makes them known to AutoConfig and AutoModelForSequenceClassification, so that whatever saves,
loads, trains or merges a transformers model does so with these too. Their inputs are those of
`llmkd.features.examples`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from llmkd import features
from llmkd.errors import ModelError
from llmkd.models.layers import Block, Row, begin, stack

HEADS = ("hard", "soft")
INPUTS = ("pixels", "numbers", "categories", "steps", "series")  # told by the rows, never set


@strict
class MlpConfig(PreTrainedConfig):
    """pixels: of an image. hidden_sizes: units of each hidden layer."""

    model_type = "llmkd-mlp"

    pixels: int = 784
    hidden_sizes: list[int] = field(default_factory=lambda: [1200, 1200])
    dropout: float | int = 0.0
    input_dropout: float | int = 0.0


@strict
class TabularConfig(PreTrainedConfig):
    """numbers, steps, series: inputs of a row; categories: values of each category, unknown among them.

    embedding: width of a category's vector. frequencies: waves beside each number, 0 for none (`Waves`);
    spread: of the first of them, in periods a standard deviation, larger where the target jumps.
    heads: 1, or 2 for a second head that learns soft labels; take: whose logits a row gets, hard, soft,
    or mean for those of the mean probabilities (the default of two heads).
    """

    model_type = "llmkd-tabular"

    numbers: int = 0
    categories: list[int] = field(default_factory=list)
    steps: int = 0
    series: int = 0
    embedding: int = 8
    frequencies: int = 0
    spread: float | int = 1.0
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 256])
    dropout: float | int = 0.1
    heads: int = 1
    take: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.take = self.take or ("mean" if self.heads == 2 else "hard")
        takes = (*HEADS, "mean") if self.heads == 2 else HEADS[:1]
        if self.heads not in (1, 2) or self.take not in takes:
            raise ValueError(
                f"heads {self.heads}, take {self.take!r}: set heads to 1 or 2, take to one of {takes}"
            )
        super().__post_init__(**kwargs)


@strict
class TabularTransformerConfig(PreTrainedConfig):
    """numbers, categories, steps, series and embedding as in TabularConfig; a token a step and one a row."""

    model_type = "llmkd-tabular-transformer"

    numbers: int = 0
    categories: list[int] = field(default_factory=list)
    steps: int = 0
    series: int = 0
    embedding: int = 8
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 128
    dropout: float | int = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads"
            )
        super().__post_init__(**kwargs)


class MlpForSequenceClassification(PreTrainedModel):
    config_class = MlpConfig
    base_model_prefix = "body"
    main_input_name = "pixels"

    def __init__(self, config: MlpConfig) -> None:
        super().__init__(config)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.body = stack(config.pixels, config.hidden_sizes, config.dropout, norm=False)
        self.classifier = nn.Linear([config.pixels, *config.hidden_sizes][-1], config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        begin(module)

    def forward(self, pixels: Tensor) -> SequenceClassifierOutput:
        """pixels (B, H, W) in [0, 1] -> logits (B, C)"""
        hidden = self.body(self.input_dropout(pixels.flatten(1)))  # (B, hidden_sizes[-1])
        return SequenceClassifierOutput(logits=self.classifier(hidden))


class TabularForSequenceClassification(PreTrainedModel):
    config_class = TabularConfig
    base_model_prefix = "body"
    main_input_name = "numbers"

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.row = Row(
            config.numbers + config.steps * config.series,
            config.categories,
            config.embedding,
            config.frequencies,
            config.spread,
        )
        self.body = stack(self.row.width, config.hidden_sizes, config.dropout, norm=True)
        width = [self.row.width, *config.hidden_sizes][-1]
        names = HEADS[: config.heads]
        self.classifier = nn.ModuleDict({name: nn.Linear(width, config.num_labels) for name in names})  # type: ignore[arg-type]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        begin(module)

    def head_logits(
        self, numbers: Tensor | None = None, categories: Tensor | None = None, steps: Tensor | None = None
    ) -> dict[str, Tensor]:
        """numbers (B, F), categories (B, K), steps (B, S, D) -> each head's logits (B, C), by its name."""
        flat = [values.flatten(1) for values in (numbers, steps) if values is not None]
        hidden = self.body(self.row(torch.cat(flat, 1) if flat else None, categories))
        return {name: head(hidden) for name, head in self.classifier.items()}

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """The inputs of `head_logits` -> logits (B, C) of the head that `take` names, or of their mean."""
        logits = self.head_logits(**inputs)
        if self.config.take != "mean":
            return SequenceClassifierOutput(logits=logits[self.config.take])
        each = torch.stack([head.float().log_softmax(-1) for head in logits.values()])  # (heads, B, C)
        return SequenceClassifierOutput(logits=each.logsumexp(0) - math.log(len(each)))


class TabularTransformerForSequenceClassification(PreTrainedModel):
    config_class = TabularTransformerConfig
    base_model_prefix = "body"
    main_input_name = "steps"

    def __init__(self, config: TabularTransformerConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        sizes = (width, config.num_attention_heads, config.intermediate_size, config.dropout)
        self.row = Row(config.numbers, config.categories, config.embedding)
        self.of_row = nn.Linear(self.row.width, width) if self.row.width else None
        self.of_step = nn.Linear(config.series, width)
        self.positions = nn.Embedding(config.steps, width)
        self.body = nn.Sequential(*(Block(*sizes) for _ in range(config.num_hidden_layers)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        begin(module)

    def forward(
        self, steps: Tensor, numbers: Tensor | None = None, categories: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """steps (B, S, D), numbers (B, F), categories (B, K) -> logits (B, C), of the tokens' mean"""
        tokens = self.of_step(steps) + self.positions.weight  # (B, S, H)
        if self.of_row is not None:
            row = self.of_row(self.row(numbers, categories))  # (B, H)
            tokens = torch.cat([row.unsqueeze(1), tokens], 1)  # (B, 1 + S, H)
        hidden = self.norm(self.body(tokens)).mean(1)  # (B, H)
        return SequenceClassifierOutput(logits=self.classifier(hidden))


NETS: dict[str, tuple[Any, Any]] = {
    config.model_type: (config, model)
    for config, model in (
        (MlpConfig, MlpForSequenceClassification),
        (TabularConfig, TabularForSequenceClassification),
        (TabularTransformerConfig, TabularTransformerForSequenceClassification),
    )
}


def register() -> None:
    """Make the nets known to transformers' Auto classes; a second call changes nothing."""
    for name, (config, model) in NETS.items():
        AutoConfig.register(name, config, exist_ok=True)
        AutoModelForSequenceClassification.register(config, model, exist_ok=True)


def init_net(
    architecture: str,
    settings: Mapping[str, Any],
    spec: features.Spec,
    directory: Path,
    labels: Sequence[str],
    seed: int,
) -> None:
    """A net of random weights whose inputs are those of `spec`, saved in `directory` beside features.json.

    settings: what may be chosen of its config; the inputs' sizes come from the spec. Raises ModelError for an
    architecture, a setting or a spec that do not go together.
    """
    kind = _kind(architecture, settings, spec)
    sizes = features.sizes(spec)
    names = dict(enumerate(labels))
    try:
        config = kind(
            **{**settings, **sizes}, id2label=names, label2id={name: i for i, name in names.items()}
        )
        set_seed(seed)
        model = NETS[architecture][1](config)
    except (StrictDataclassError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"init: {architecture} {dict(settings)}: {reason}") from error
    model.save_pretrained(directory)
    features.save(spec, directory)


def _kind(architecture: str, settings: Mapping[str, Any], spec: features.Spec) -> Any:
    """The config class of `architecture`, once it is sure that settings and spec are its own."""
    if architecture not in NETS:
        raise ModelError(f"init: no net {architecture!r}; there are {', '.join(NETS)}")
    kind = NETS[architecture][0]
    known = [name for name in kind.__annotations__ if name not in (*INPUTS, "model_type")]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ModelError(f"init: {architecture} has no setting {unknown[0]!r}; it has {', '.join(known)}")
    if (architecture == "llmkd-mlp") != (spec["kind"] == "image"):
        raise ModelError(f"init: {architecture} does not read {spec['kind']} rows; choose another net")
    if architecture == "llmkd-tabular-transformer" and not spec["steps"]:
        raise ModelError(f"init: {architecture} reads time steps; name some in task.features.steps")
    return kind
