"""The student that the benchmarks train, and rows of real or made-up lengths for it to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LABELS = ["a", "b", "tie"]
LORA = {"r": 64, "alpha": 128}
DROPOUT = 0.05  # of an adapter's input, as in the reference recipe
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 12_000}  # 24.9M parameters
TOY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOY |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
TEXT = "prompt", "response_a", "response_b"


def classifier(sizes: dict[str, int], precision: str, positions: int = 2048) -> Any:
    """A Gemma2 of random weights, its frozen part held in `precision`, its head in float32."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2",
        **sizes,
        max_position_embeddings=positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.05,
        num_labels=len(LABELS),
    )
    model = AutoModelForSequenceClassification.from_config(config)
    if precision == "bf16":
        model.model.bfloat16()
    return model


def plain_lora(model: Any, dropout: float = 0.0) -> nn.Module:
    """The adapter as one adds it with peft alone."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        lora_dropout=dropout,
        target_modules="all-linear",
        modules_to_save=["score"],
        exclude_modules="score",
        task_type=TaskType.SEQ_CLS,
    )
    return get_peft_model(model, config)


def our_lora(model: Any, dropout: float = 0.0) -> nn.Module:
    from llmkd.models.lora import add_lora

    return add_lora(model, **LORA, dropout=dropout)


def both_models(
    sizes: dict[str, int], precision: str, dropout: float
) -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
    """A plain one, ours, and the weights that both start from."""
    theirs, ours = (add(classifier(sizes, precision), dropout) for add in (plain_lora, our_lora))
    print(f"{sum(value.numel() for value in theirs.parameters()) / 1e6:.1f}M parameters, adapter included")
    start = {name: value.detach().clone() for name, value in theirs.named_parameters() if value.requires_grad}
    return theirs, ours, start


def token_rows(data: Path | None, max_tokens: int, vocabulary: int, count: int) -> list[np.ndarray]:
    """Token ids, row by row: of a file's texts by a tokenizer trained on them, or made up."""
    if data is None:
        random = np.random.default_rng(0)
        return [random.integers(3, vocabulary, length) for length in long_tailed(max_tokens, count)]
    from llmkd.models.load import train_tokenizer

    texts = texts_of(data, max_tokens, count)
    tokenizer = train_tokenizer(texts[:2000], vocabulary)
    return [np.asarray(ids) for ids in tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]]


def texts_of(data: Path | None, max_tokens: int, count: int) -> list[str]:
    """A file's texts (of pairs, prompt and answers together) in random order, or made-up words."""
    if data is None:
        return [" ".join(f"w{i % 97}" for i in range(length)) for length in long_tailed(max_tokens, count)]
    import pyarrow.parquet as pq

    table = pq.read_table(data)
    columns = [name for name in TEXT if name in table.column_names] or ["text"]
    texts = ["\n".join(parts) for parts in zip(*(table[name].to_pylist() for name in columns), strict=True)]
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:count]]


def long_tailed(most: int, count: int) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(np.log(most / 4), 0.8, count)
    return np.clip(lengths, 8, most).astype(int)


def examples(rows: list[np.ndarray], teachers: int = 2) -> Any:
    """The rows as the engine takes them, with random labels and teachers' logits."""
    from llmkd.batches import token_examples

    random = np.random.default_rng(1)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    labels = random.integers(0, len(LABELS), len(rows))
    ids = [f"row{i}" for i in range(len(rows))]
    made = token_examples(ids, np.concatenate(rows).astype(np.int32), offsets, labels, 0)
    return made.with_teachers(random.normal(0, 1, (len(rows), teachers, len(LABELS))).astype(np.float32))


def lengths_in_words(lengths: np.ndarray) -> str:
    tenth, half, most = np.percentile(lengths, [10, 50, 90]).astype(int)
    return f"{len(lengths)} rows of {lengths.mean():.0f} tokens ({tenth}, {half}, {most} at 10, 50, 90 %)"
