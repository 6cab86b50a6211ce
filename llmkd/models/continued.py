"""Continued pretraining of one model: as causal language model, or supervised as classifier."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkd import ranks
from llmkd.batches import Examples

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase, TrainingArguments


def pretrain(
    source: str,
    directory: Path,
    *,
    examples: Callable[[PreTrainedTokenizerBase], Examples],
    causal: bool,
    labels: Sequence[str],
    lora: dict[str, Any] | None,
    load_in: str,
    precision: str,
    pad_token: str | None,
    attention: str | None,
    trust_remote_code: bool = False,
    seed: int,
    training: TrainingArguments,
    checkpoints: Path | None = None,
    **batching: Any,
) -> dict[str, Any]:
    """Train the model at `source` on all its examples; leave it whole in directory/model, with its tokenizer.

    Trained in full it is saved as it is; an adapter is merged into a freshly loaded float base.
    Returns the training's history (see `llmkd.train.fit`).
    """
    from transformers import set_seed

    from llmkd.methods.cached import Cached
    from llmkd.methods.next_token import next_token
    from llmkd.models.load import load_causal_lm, load_classifier, load_tokenizer, on_device
    from llmkd.models.lora import add_lora, trainable_state
    from llmkd.objective import HARD
    from llmkd.train import fit, forget_sharding

    trust = {"trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(source, pad_token, **trust)
    held = load_in if load_in != "auto" else precision if lora else "fp32"

    def load(held: str) -> Any:
        if causal:
            network = load_causal_lm(source, load_in=held, attention=attention, **trust)
            set_seed(seed)  # an adapter is drawn next, alike on every rank
            return network
        pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        more = {"load_in": held, "pad_id": pad, "attention": attention, "seed": seed}
        return load_classifier(source, labels, **more, **trust)  # type: ignore[arg-type]

    gc.collect()  # the model, and the optimizer, of a training before this one hang in cycles
    model: nn.Module = load(held)
    if lora:
        model = add_lora(model, causal=causal, **lora)  # type: ignore[arg-type]
    on_device(model, held)
    method: nn.Module = next_token(model, precision) if causal else Cached(model, HARD, precision)
    rows = examples(tokenizer)
    train = np.flatnonzero(rows.labels >= 0) if not causal else np.arange(len(rows.ids))
    history = fit(method, rows, train, training, checkpoints=checkpoints, **batching)
    state = trainable_state(model)
    forget_sharding()  # rank 0 alone loads the base again, and the next model is not this training's
    if ranks.is_main():
        _save(model, state, directory, lambda: load("bf16" if held in ("nf4", "int8", "bf16") else "fp32"))
        tokenizer.save_pretrained(directory / "model")
    ranks.barrier()
    return history


def _save(model: nn.Module, state: dict[str, Tensor], directory: Path, load: Callable[[], Any]) -> None:
    from llmkd.merge import merge_folds
    from llmkd.models.lora import save_trained

    beside = directory / "trained"
    save_trained(model, state, beside)
    if hasattr(model, "peft_config"):
        merged = merge_folds(load(), [beside])
        shutil.rmtree(beside)
        beside = directory / "merged"
        merged.save_pretrained(beside)
    shutil.rmtree(directory / "model", ignore_errors=True)
    beside.rename(directory / "model")
