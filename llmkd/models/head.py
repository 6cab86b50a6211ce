"""A causal LM cut in two: its backbone's hidden states, and the head that makes logits of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.errors import ModelError
from llmkd.models.pooling import autocast, backbone
from llmkd.models.scaled import scaled_by


@dataclass(frozen=True)
class Head:
    """weight (V, H), Gemma's final soft-capping, and the real vocabulary.

    Ids from `vocab` on only pad the weight: they are cut off before a softmax, so they have probability 0.
    """

    weight: Tensor
    softcap: float | None = None
    vocab: int | None = None

    @property
    def size(self) -> int:
        return self.vocab or len(self.weight)

    def raw(self, hidden: Tensor) -> Tensor:
        """Logits before soft-capping: (N, H) -> (N, size)."""
        return hidden @ self.weight[: self.size].T

    def to(self, dtype: torch.dtype) -> Head:
        return self if self.weight.dtype == dtype else replace(self, weight=self.weight.to(dtype))

    def cap(self, raw: Tensor) -> Tensor:
        """softcap · tanh(logits / softcap) (Gemma 2, arXiv 2408.00118, section 2)."""
        return raw if self.softcap is None else (raw / self.softcap).tanh() * self.softcap

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, size)"""
        return self.cap(self.raw(hidden))


def inner(model: Any) -> Any:
    """The causal LM itself, wrapped by PEFT or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def oddity(model: Any) -> str | None:
    """What makes a causal LM's head more than one plain matrix and a cap; None where nothing does."""
    layer, config = inner(model).get_output_embeddings(), inner(model).config.get_text_config()
    if scaled := scaled_by(vars(config)):
        return f"its config sets {scaled}"
    plain = type(layer) is nn.Linear and layer.bias is None
    return None if plain else f"it is a {type(layer).__name__}, or has a bias"


def head_rows(model: Any) -> int:
    """Of the head's weight, also where ZeRO-3 shows a shape of (0,)."""
    weight = inner(model).get_output_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def head_of(model: Any, vocab: int | None = None) -> Head:
    """A causal LM's own head over its first `vocab` words, tied or not, wrapped by PEFT or not.

    Raises ModelError where the head is more than one plain matrix, or has fewer rows than `vocab`.
    """
    config = inner(model).config.get_text_config()
    if what := oddity(model):
        raise ModelError(f"{config.model_type}: the head is no plain matrix ({what}); take another model")
    weight, rows = inner(model).get_output_embeddings().weight, head_rows(model)
    if vocab is not None and rows < vocab:
        raise ModelError(f"{config.model_type}: its head has {rows} rows for {vocab} tokens; resize it")
    return Head(weight, getattr(config, "final_logit_softcapping", None), vocab)


def hidden_states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the head reads: the backbone's last hidden states, (B, L, H)."""
    hidden: Tensor = backbone(model)(**inputs, use_cache=False).last_hidden_state
    return hidden


def target_mask(inputs: Mapping[str, Tensor], marked: Tensor | None = None) -> Tensor:
    """Which positions predict a target, (B, L - 1): a real token before a real one, which
    `marked` (B, L), if given, also names."""
    real = inputs["attention_mask"].bool()  # (B, L)
    wanted = real if marked is None else real & marked
    return wanted[:, 1:] & real[:, :-1]


def predicting_states(model: nn.Module, inputs: Mapping[str, Tensor], real: Tensor, precision: str) -> Tensor:
    """Hidden states at the positions `real` (B, L - 1), row by row, in the dtype to compute in: (N, H)."""
    with autocast(precision, real.device):
        states = hidden_states(model, inputs)[:, :-1][real]
    return states.bfloat16() if precision == "bf16" else states


def with_heads(models: Sequence[Any], hidden: Tensor, body: Callable[[], Any]) -> Any:
    """body(), run inside the call of every model's head module, in place of its product.

    So whatever hangs on the modules happens: ZeRO-3 gathers a head's weight in its hooks.
    """
    if not models:
        return body()
    layer = inner(models[0]).get_output_embeddings()
    with _forward(layer, lambda _: with_heads(models[1:], hidden, body)):
        return layer(hidden)


@contextmanager
def _forward(layer: nn.Module, forward: Callable[[Tensor], Any]) -> Iterator[None]:
    before = layer.__dict__.get("forward")
    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before  # type: ignore[method-assign]
