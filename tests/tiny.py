"""Tiny models, rows and runs that several test files build on."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
CONFIG = Path(__file__).with_name("tiny.yaml")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
DECODER = {**SIZES, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "qwen2": DECODER,
    "gemma2": {**DECODER, "head_dim": 16, "sliding_window": 64},
    "bert": SIZES,
}
LABELS = ["a", "b", "tie"]


def stage(name: str, *arguments: str, config: Path = CONFIG) -> int:
    """Run a stage's script in this process, as its command line would. Returns the exit code."""
    before, sys.argv = sys.argv, [name, "--config", str(config), *arguments]
    try:
        runpy.run_path(str(ROOT / "stages" / f"{name}.py"), run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = before
    return 0


def snapshot(directory: Path, *, partial: bool = False) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and bytes; half-written units and the digests' cache are left out."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in files
        if (partial or ".partial/" not in str(path)) and "/.verified/" not in str(path)
    }


def classifier(architecture: str = "llama", seed: int = 0, **settings: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**CONFIGS[architecture], "num_labels": 3, **settings})
    return AutoModelForSequenceClassification.from_config(config)


def causal_lm(architecture: str = "llama", seed: int = 0, **settings: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **{**CONFIGS[architecture], **settings})
    )


def tokenizer(
    texts: Sequence[str] = ("some words to learn", "and a few more of them"), size: int = 300
) -> Any:
    from llmkd.models.load import train_tokenizer

    return train_tokenizer(texts, size)


def examples(count: int = 24, seed: int = 0, **more: Any) -> Any:
    """Random rows of 3 to 20 tokens whose label is told by their second token."""
    from llmkd.batches import token_examples

    random = np.random.default_rng(seed)
    lengths = random.integers(3, 21, count)
    tokens = random.integers(3, 64, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = (tokens[offsets[:-1] + 1] % 3).astype(np.int64)
    return token_examples([f"row{i}" for i in range(count)], tokens, offsets, labels, 0, **more)


def training(directory: Path, **more: Any) -> Any:
    from llmkd.train import arguments

    return arguments(directory, **{"epochs": 1, "learning_rate": 1e-3, **more})
