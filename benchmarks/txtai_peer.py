"""A classifier taught by one teacher that runs beside it: llmkd's online method against txtai's HFTrainer.

    python benchmarks/txtai_peer.py [--data imdb.parquet] [--rounds 3] [--environments DIRECTORY]

Teacher and student are Gemma2s of 7M parameters, trained in full, steps of 64 rows from batches of 8,
(CE + KL) / 2: txtai's `teacher=` with distillation=(1, 0.5). txtai takes texts and tokenizes them, ours are
tokenized in the seconds too. Each way is a process of its own, txtai's in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import add_flag, peer, variables, versions
from side import Row, alone, clock, compare, in_turn, middle, parser, ratios
from student import LABELS, SIZES, TOY, classifier, texts_of

PLACE = "LLMKD_BENCHMARK_MODELS"


def main() -> None:
    found = parser(__doc__, precise=True)
    found.add_argument("--data", type=Path)
    for name, default in {"count": 128, "step-rows": 64, "max-tokens": 512}.items():
        found.add_argument(f"--{name}", type=int, default=default)
    add_flag(found)
    asked = found.parse_args()
    if asked.quick:
        asked.count, asked.step_rows, asked.max_tokens, asked.rounds = 32, 16, 48, 1
    torch.set_num_threads(asked.threads)
    if asked.way:
        return print(json.dumps(timed(asked, Path(os.environ[PLACE]))))
    if asked.quick and not asked.environments:
        return print("txtai: left out of toy sizes; name --environments to install it there")
    with peer(asked, "txtai") as python, tempfile.TemporaryDirectory() as directory:
        if python is None:
            return
        print(versions(python, "txtai", "transformers", "torch"))
        os.environ[PLACE] = directory
        make(asked, Path(directory))
        compare(asked, lambda: measure(asked, python))


def make(asked: argparse.Namespace, directory: Path) -> None:
    """Both models, their tokenizer and the rows."""
    from llmkd.models.load import train_tokenizer

    wide = {**SIZES, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    sizes = TOY if asked.quick else wide
    texts = texts_of(asked.data, asked.max_tokens, asked.count)
    tokenizer = train_tokenizer(texts, sizes["vocab_size"])
    tokenizer.model_max_length = asked.max_tokens
    labels = np.random.default_rng(1).integers(0, len(LABELS), len(texts)).tolist()
    for name in ("student", "teacher"):
        model = classifier(sizes, "fp32")
        if name == "teacher":
            torch.nn.init.normal_(model.score.weight, std=0.3)
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    given = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    (directory / "rows.json").write_text(json.dumps(given))


def measure(asked: argparse.Namespace, python: str) -> list[Row]:
    found = in_turn({"ours": alone("ours"), "txtai": alone("txtai", python, variables({}))}, asked.rounds)
    sides = [f"{middle(found, way, 'rows_a_second'):.2f} rows/s" for way in found]
    note = f"mean loss {middle(found, 'ours', 'loss'):.4f}, {middle(found, 'txtai', 'loss'):.4f}"
    each = ratios(found, "ours", "txtai", "rows_a_second")
    return [
        Row(f"training, a teacher beside, {asked.precision}", "txtai HFTrainer", each, ">= 2", *sides, note)
    ]


def timed(asked: argparse.Namespace, place: Path) -> dict[str, float]:
    """One way, in this process, every kernel and import used once before."""
    way, given = {"ours": ours, "txtai": theirs}[asked.way], json.loads((place / "rows.json").read_text())
    for rows in (given[:8], given):
        student, teacher, tokenizer = loaded(place)
        began = clock(asked)
        with tempfile.TemporaryDirectory() as directory:
            loss = way(student, teacher, tokenizer, asked, rows, directory)
    return {"rows_a_second": len(given) / (clock(asked) - began), "loss": loss}


def loaded(place: Path) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    load = AutoModelForSequenceClassification.from_pretrained
    models = (load(place / name, dtype=torch.float32) for name in ("student", "teacher"))
    return *models, AutoTokenizer.from_pretrained(place / "student")


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
    objective = Objective({"ce": 1, "kl": 1}, ["one"], [1.0], [1.0])
    method = Online(student, objective, {"one": teacher}, asked.precision)
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
        "bf16": asked.precision == "bf16",
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
