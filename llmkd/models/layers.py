"""What the small nets are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import initialization

EMBEDDING_SPREAD = 0.3  # standard deviation of a category's vector, below that of a number, which is 1


def begin(module: nn.Module) -> None:
    """Random weights: He et al. 2015 (arXiv 1502.01852), as transformers' own N(0, 0.02) starves an MLP."""
    if isinstance(module, nn.Linear):
        initialization.kaiming_normal_(module.weight, nonlinearity="relu")
        initialization.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        initialization.normal_(module.weight, std=EMBEDDING_SPREAD)
    elif isinstance(module, Waves):
        initialization.normal_(module.frequencies, std=module.spread)
    elif isinstance(module, nn.LayerNorm):
        initialization.ones_(module.weight)
        initialization.zeros_(module.bias)


class Row(nn.Module):
    """Numbers, their waves and embedded categories side by side: (B, F), (B, K) -> (B, width)"""

    def __init__(
        self,
        numbers: int,
        categories: Sequence[int],
        embedding: int,
        frequencies: int = 0,
        spread: float = 1.0,
    ) -> None:
        super().__init__()
        self.starts = [sum(categories[:i]) for i in range(len(categories))]  # in the one table of vectors
        self.embedding = nn.Embedding(sum(categories), embedding) if categories else None
        self.waves = Waves(numbers, frequencies, spread) if frequencies else None
        self.width = numbers * (1 + 2 * frequencies) + embedding * len(categories)

    def forward(self, numbers: Tensor | None, categories: Tensor | None) -> Tensor:
        parts = []
        if numbers is not None:
            parts += [numbers] if self.waves is None else [numbers, self.waves(numbers)]
        if self.embedding is not None and categories is not None:
            places = categories + categories.new_tensor(self.starts)  # (B, K)
            parts.append(self.embedding(places).flatten(1))
        return torch.cat(parts, 1)


class Waves(nn.Module):
    """Sines and cosines of learnt frequencies: (B, F) -> (B, 2 · F · frequencies)

    Gorishniy et al. 2022, arXiv 2203.05556, equation 2: a smooth net cannot follow a feature's steps.
    """

    def __init__(self, numbers: int, frequencies: int, spread: float) -> None:
        super().__init__()
        self.spread = spread  # of the first frequencies, in periods a standard deviation
        self.frequencies = nn.Parameter(torch.empty(numbers, frequencies))

    def forward(self, numbers: Tensor) -> Tensor:
        angles = 2 * math.pi * numbers.unsqueeze(-1) * self.frequencies  # (B, F, frequencies)
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


class Block(nn.Module):
    """A pre-norm transformer layer: (B, S, H) -> (B, S, H)"""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.before_attention(tokens)).chunk(3, -1)  # 3 of (B, S, H)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        found = nn.functional.scaled_dot_product_attention(query, key, value)  # (B, heads, S, H / heads)
        tokens = tokens + self.dropout(self.attended(found.transpose(1, 2).flatten(2)))
        return tokens + self.dropout(self.layers(self.before_layers(tokens)))


def stack(inputs: int, sizes: Sequence[int], dropout: float, *, norm: bool) -> nn.Sequential:
    """Linear, (layer norm,) ReLU and dropout a size; no batch norm, as merged folds share no statistics."""
    layers: list[nn.Module] = []
    for before, size in pairwise([inputs, *sizes]):
        layers += [nn.Linear(before, size), *([nn.LayerNorm(size)] if norm else [])]
        layers += [nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)
