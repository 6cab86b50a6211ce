"""Filling the cache of a teacher of five folds: forwards, loads of the base, seconds.

    python benchmarks/teacher_logits.py [--data prefs.parquet] [--count 200] [--rounds 3]

Ours, as stage 02 does it once a fold is trained: the base loaded once, each fold's adapter put in, its
logits on the rows of the views asked for (`oof`, or `in_sample` and `oof`), in batches of equal length. The
reference's way: for each fold its base loaded anew, its logits on its own training rows, batches of 8
sorted by length. Forwards and loads are counted where they happen. One adapter stands for all folds, so
that both sides' logits can be compared.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side import Row, clock, compare, in_turn, middle, parser, ratios
from student import DTYPES, LABELS, SIZES, TOY, classifier, examples, our_lora, plain_lora, token_rows

FOLDS, TOKENS = 5, 4096


def main() -> None:
    found = parser(__doc__, precise=True)
    found.add_argument("--data", type=Path)
    found.add_argument("--count", type=int, default=200, help="rows")
    found.add_argument("--max-tokens", type=int, default=512)
    asked = found.parse_args()
    if asked.quick:
        asked.count, asked.max_tokens, asked.rounds = 20, 48, 1
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as directory:
        compare(asked, lambda: measure(asked, Path(directory)))


def measure(asked: argparse.Namespace, directory: Path) -> list[Row]:
    from llmkd.models.load import train_tokenizer

    sizes = TOY if asked.quick else SIZES
    classifier(sizes, asked.precision).save_pretrained(directory / "base")
    train_tokenizer(["some words"], 300).save_pretrained(directory / "base")
    data = examples(token_rows(asked.data, asked.max_tokens, sizes["vocab_size"], asked.count))
    ways = {
        "oof": lambda: ours(asked, directory, data, ["oof"]),
        "both": lambda: ours(asked, directory, data, ["oof", "in_sample"]),
        "reference": lambda: reference(asked, directory, data),
    }
    ours(asked, directory, replace(data, ids=data.ids[:FOLDS]), ["oof"])  # every kernel and import once
    found = in_turn(ways, asked.rounds)
    rows = []
    for way, goal in {"oof": "<= 0.25", "both": "<= 1.25"}.items():
        mean = [middle(found, one, "mean") for one in (way, "reference")]
        for name, unit in {"forwards": "rows", "loads": "loads", "seconds": "s"}.items():
            asks = {"forwards": goal, "loads": "<= 0.2", "seconds": goal}[name]
            sides = [f"{middle(found, one, name):.4g} {unit}" for one in (way, "reference")]
            note = f"mean logit {mean[0]:.4f}, {mean[1]:.4f}" if name == "seconds" else ""
            what = f"cache of 5 folds, {asked.precision}, views {way}: {name}"
            each = ratios(found, way, "reference", name)
            rows.append(Row(what, "reference's way", each, asks, *sides, note))
    return rows


def ours(asked: argparse.Namespace, directory: Path, data: Any, views: list[str]) -> dict[str, float]:
    from llmkd import logits
    from llmkd.models.load import load_classifier
    from llmkd.models.lora import load_trainable, trainable_state
    from llmkd.train import predict

    with counted() as seen:
        began, total = clock(asked), []
        base = load_classifier(str(directory / "base"), LABELS, load_in=asked.precision, pad_id=0)
        model = our_lora(base)
        start = trainable_state(model)
        for fold in range(FOLDS):
            load_trainable(model, start)
            cached = {}
            for view, at in views_of(len(data.ids), fold).items():
                if view in views:
                    found = predict(model, data, at, TOKENS, asked.precision)
                    cached[view] = ([data.ids[row] for row in at], found)
                    total.append(found)
            logits.write(directory / f"{fold}.parquet", cached, teacher="one", labels=LABELS)
        return {**seen, "seconds": clock(asked) - began, "mean": float(np.abs(np.concatenate(total)).mean())}


def reference(asked: argparse.Namespace, directory: Path, data: Any) -> dict[str, float]:
    from transformers import AutoModelForSequenceClassification

    dtype, bf16 = DTYPES[asked.precision], asked.precision == "bf16"
    with counted() as seen, torch.no_grad():
        began, total = clock(asked), []
        for fold in range(FOLDS):
            path = directory / "base"
            base = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
            model = plain_lora(base).eval()
            rows = views_of(len(data.ids), fold)["in_sample"]
            rows = rows[np.argsort(-data.lengths[rows], kind="stable")]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                for begin in range(0, len(rows), 8):
                    total.append(model(**data.inputs(rows[begin : begin + 8])).logits.float().numpy())
        return {**seen, "seconds": clock(asked) - began, "mean": float(np.abs(np.concatenate(total)).mean())}


def views_of(count: int, fold: int) -> dict[str, np.ndarray]:
    held = np.arange(count) % FOLDS == fold
    return {"oof": np.flatnonzero(held), "in_sample": np.flatnonzero(~held)}


@contextmanager
def counted() -> Any:
    """{forwards: rows that passed through a backbone, loads: calls of from_pretrained} while it is open."""
    from transformers import Gemma2Model, PreTrainedModel

    seen = {"forwards": 0, "loads": 0}
    forward, load = Gemma2Model.forward, PreTrainedModel.__dict__["from_pretrained"]

    def counting(self: Any, input_ids: Any = None, **more: Any) -> Any:
        seen["forwards"] += len(input_ids)
        return forward(self, input_ids=input_ids, **more)

    def loading(cls: Any, *args: Any, **more: Any) -> Any:
        seen["loads"] += 1
        return load.__func__(cls, *args, **more)

    Gemma2Model.forward, PreTrainedModel.from_pretrained = counting, classmethod(loading)
    try:
        yield seen
    finally:
        Gemma2Model.forward, PreTrainedModel.from_pretrained = forward, load


if __name__ == "__main__":
    main()
