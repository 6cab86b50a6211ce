"""A text encoder of a quarter of a million parameters: hashed embeddings and convolutions.

Nearly all weights of a small text model are its vocabulary's. Here a token's vector is the sum of a few
rows of one short table, chosen by fixed hashes of its id (Bloom embeddings, Serrà and Karatzoglou 2017,
arXiv 1706.03993). `register` makes the model known to AutoConfig and AutoModelForSequenceClassification.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import SequenceClassifierOutput

FACTORS = (2654435761, 2246822519, 3266489917, 668265263)  # odd and large; Knuth's, then xxHash's
WORD = 2**32 - 1


@strict
class HashedConfig(PreTrainedConfig):
    """buckets: rows of the table; hashes: rows a token sums, at most 4; kernel_size: odd."""

    model_type = "llmkd-hashed"

    vocab_size: int = 30522
    buckets: int = 8192
    hashes: int = 2
    embedding_size: int = 24
    hidden_size: int = 64
    num_hidden_layers: int = 1
    intermediate_size: int = 128
    kernel_size: int = 5
    dropout: float | int = 0.1
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None


def _check(config: HashedConfig) -> None:
    if not 1 <= config.hashes <= len(FACTORS):
        raise ValueError(f"hashes is {config.hashes}; use 1 to {len(FACTORS)}")
    if config.kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {config.kernel_size}; use an odd one")


def hashed(ids: Tensor, hashes: int, buckets: int) -> Tensor:
    """Multiplicative hashes of token ids, the same in every process. (B, L) int64 -> (B, L, hashes)"""
    factors = torch.tensor(FACTORS[:hashes], device=ids.device)
    mixed = ((ids.unsqueeze(-1) + 1) * factors) & WORD
    return (mixed * buckets) >> 32


class HashedEmbedding(nn.Module):
    def __init__(self, config: HashedConfig) -> None:
        super().__init__()
        self.hashes, self.buckets = config.hashes, config.buckets
        self.table = nn.Embedding(config.buckets, config.embedding_size)
        self.project = nn.Linear(config.embedding_size, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(hashed(ids, self.hashes, self.buckets))  # (B, L, hashes, E)
        return self.project(rows.sum(2))  # type: ignore[no-any-return]  # (B, L, H)


class Block(nn.Module):
    """A depthwise convolution and a feed-forward layer, each beside a residual path."""

    def __init__(self, config: HashedConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.before_convolution, self.before_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.convolution = nn.Conv1d(
            width, width, config.kernel_size, padding=config.kernel_size // 2, groups=width
        )
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        """hidden (B, L, H), real (B, L) bool -> (B, L, H)"""
        masked = self.before_convolution(hidden) * real.unsqueeze(
            -1
        )  # neighbours that are padding count as nothing
        hidden = hidden + self.dropout(self.convolution(masked.mT).mT)
        return hidden + self.dropout(self.down(gelu(self.up(self.before_layers(hidden)))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Token ids to one vector a row: the mean by learnt attention, beside the maximum."""

    def __init__(self, config: HashedConfig) -> None:
        super().__init__()
        self.embedding = HashedEmbedding(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.weigh = nn.Linear(config.hidden_size, 1)

    def forward(self, ids: Tensor, real: Tensor) -> Tensor:
        """ids (B, L), real (B, L) bool -> (B, 2H)"""
        hidden = self.embedding(ids)  # (B, L, H)
        for layer in self.layers:
            hidden = layer(hidden, real)
        hidden = self.norm(hidden)
        away = ~real.unsqueeze(-1)  # (B, L, 1)
        weight = self.weigh(hidden).float().masked_fill(away, -torch.inf).softmax(1).to(hidden.dtype)
        return torch.cat([(weight * hidden).sum(1), hidden.masked_fill(away, -torch.inf).amax(1)], -1)


class HashedForSequenceClassification(PreTrainedModel):
    config_class = HashedConfig
    base_model_prefix = "encoder"

    def __init__(self, config: HashedConfig) -> None:
        super().__init__(config)
        _check(config)
        self.encoder = Encoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(2 * config.hidden_size, int(config.num_labels or 2))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Xavier's for linear layers, unit variance for a token's vector; N(0, 0.02) starves small nets."""
        if isinstance(module, HashedEmbedding):
            initialization.normal_(module.table.weight, std=module.hashes**-0.5)
        elif isinstance(module, nn.Linear):
            initialization.xavier_uniform_(module.weight)
            initialization.zeros_(module.bias)
        elif not isinstance(module, nn.Embedding):
            super()._init_weights(module)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """input_ids, attention_mask (B, L) -> logits (B, C)"""
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(self.encoder(input_ids, real))))


def register() -> None:
    AutoConfig.register(HashedConfig.model_type, HashedConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(HashedConfig, HashedForSequenceClassification, exist_ok=True)
