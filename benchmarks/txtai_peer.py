"""A classifier taught by one teacher that runs beside it: llmkd's online method against txtai's HFTrainer.

    python benchmarks/txtai_peer.py [--txtai DIRECTORY] [--data imdb.parquet] [--rounds 3]

Teacher and student are Gemma2s of 7M parameters, trained in full, steps of 64 rows from batches of 8, bf16,
(CE + KL) / 2: txtai's `teacher=` with distillation=(1, 0.5). txtai takes texts and tokenizes them, ours are
tokenized in the seconds too. txtai may stand in a directory of its own: pip install --no-deps --target
DIRECTORY txtai faiss-cpu msgpack
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side import Row, clock, compare, in_turn, middle, parser, ratios
from student import LABELS, SIZES, TOY, classifier, texts_of


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--data", type=Path)
    found.add_argument("--txtai", help="a directory with txtai in it")
    for name, default in {"count": 128, "step-rows": 64, "max-tokens": 512}.items():
        found.add_argument(f"--{name}", type=int, default=default)
    asked = found.parse_args()
    if asked.quick:
        asked.count, asked.step_rows, asked.max_tokens, asked.rounds = 32, 16, 48, 1
    if asked.txtai:
        sys.path.append(asked.txtai)
    try:
        import txtai.pipeline  # noqa: F401
    except ImportError as error:
        return print(f"txtai: not installed ({error}); see --help")
    torch.set_num_threads(asked.threads)
    compare(asked, lambda: measure(asked))


def measure(asked: argparse.Namespace) -> list[Row]:
    from llmkd.models.load import train_tokenizer

    wide = {**SIZES, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    sizes = TOY if asked.quick else wide
    texts = texts_of(asked.data, asked.max_tokens, asked.count)
    tokenizer = train_tokenizer(texts, sizes["vocab_size"])
    tokenizer.model_max_length = asked.max_tokens
    labels = np.random.default_rng(1).integers(0, len(LABELS), len(texts)).tolist()
    student, teacher = classifier(sizes, "fp32"), classifier(sizes, "fp32")
    torch.nn.init.normal_(teacher.score.weight, std=0.3)
    given = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    ways: Any = {
        name: partial(timed, way, student, teacher, tokenizer, asked, given)
        for name, way in {"ours": ours, "txtai": theirs}.items()
    }
    for way in ways.values():  # every kernel and import once
        way(only=8)
    found = in_turn(ways, asked.rounds)
    sides = [f"{middle(found, way, 'rows_a_second'):.2f} rows/s" for way in found]
    note = f"mean loss {middle(found, 'ours', 'loss'):.4f}, {middle(found, 'txtai', 'loss'):.4f}"
    each = ratios(found, "ours", "txtai", "rows_a_second")
    return [Row("training, a teacher beside", "txtai HFTrainer", each, ">= 2", *sides, note)]


def timed(
    way: Any, student: Any, teacher: Any, tokenizer: Any, asked: Any, given: Any, only: int | None = None
) -> dict[str, float]:
    models, rows = (copy.deepcopy(student), copy.deepcopy(teacher)), given[:only]
    began = clock(asked)
    with tempfile.TemporaryDirectory() as directory:
        loss = way(*models, tokenizer, asked, rows, directory)
    return {"rows_a_second": len(rows) / (clock(asked) - began), "loss": loss}


def ours(student: Any, teacher: Any, tokenizer: Any, asked: Any, given: Any, directory: str) -> float:
    from llmkd.batches import token_examples
    from llmkd.methods.online import Online
    from llmkd.objective import Objective
    from llmkd.train import arguments, fit

    texts = [row["text"] for row in given]
    ids = tokenizer(texts, truncation=True, max_length=asked.max_tokens)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int64)
    labels = np.asarray([row["label"] for row in given])
    tokens, names = np.concatenate(ids).astype(np.int32), [f"row{i}" for i in range(len(ids))]
    data = token_examples(names, tokens, offsets, labels, 0)
    method = Online(student, Objective({"ce": 1, "kl": 1}, ["one"], [1.0], [1.0]), {"one": teacher}, "bf16")
    training = arguments(Path(directory), epochs=1, learning_rate=5e-5)
    history = fit(method, data, np.arange(len(ids)), training, batch_rows=asked.step_rows, batch_tokens=4096)
    return float(np.mean([entry["loss"] for entry in history["loss"]]))


def theirs(student: Any, teacher: Any, tokenizer: Any, asked: Any, given: Any, directory: str) -> float:
    from transformers import Trainer
    from txtai.pipeline import HFTrainer

    settings: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": max(1, min(asked.step_rows, len(given)) // 8),
        "learning_rate": 5e-5,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "cosine",
        "bf16": True,
        "disable_tqdm": True,
        "output_dir": directory,
        "save_strategy": "no",
    }
    logged: list[float] = []
    log = Trainer.log
    Trainer.log = lambda self, logs, *more: logged.append(logs.get("train_loss"))  # its own last word
    try:
        models = {"teacher": (teacher, tokenizer), "distillation": (1.0, 0.5)}
        HFTrainer()((student, tokenizer), given, maxlength=asked.max_tokens, **models, **settings)
    finally:
        Trainer.log = log
    return float(logged[-1]) / settings["gradient_accumulation_steps"]  # txtai adds them up


if __name__ == "__main__":
    main()
