"""Judging rows by an artifact, both orders of each averaged: rows a second and memory.

    python benchmarks/inference.py [--data prefs.parquet] [--count 200] [--rounds 3] [--packed]

A Gemma2 of 25M parameters, merged and saved in bf16, and in 8 bits by llmkd.quantize; all compute in one
precision. Ours: load_artifact and llmkd.train.predict over batches of equal length, as stage 06 does it. The
reference's loop: transformers alone, rows sorted by length, batches of 8 padded to their longest. --packed:
that loop over the 8-bit artifact too, through transformers' own GPTQ layers. Each way is a process of its
own; memory is the peak of the whole process (VmHWM, Linux) over what it holds once the libraries are
imported; loading is not in the seconds.
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
from side import Row, alone, clock, compare, in_turn, middle, parser, peak, ratios, reset_peak
from student import DTYPES, SIZES, TOY, classifier, examples, token_rows

WAYS = {"ours8": "ours, 8 bits", "ours": "ours, merged", "loop": "reference's loop, merged"}
PACKED = {"loop8": "reference's loop, 8 bits packed"}
PLACE = "LLMKD_BENCHMARK_MODELS"


def main() -> None:
    found = parser(__doc__, precise=True)
    found.add_argument("--data", type=Path)
    found.add_argument("--count", type=int, default=200, help="rows; each is read in both orders")
    found.add_argument("--max-tokens", type=int, default=1024)
    found.add_argument("--packed", action="store_true")
    asked = found.parse_args()
    if asked.quick:
        asked.count, asked.max_tokens, asked.rounds = 16, 48, 1
    torch.set_num_threads(asked.threads)
    if asked.way:
        return print(json.dumps(judge(asked, Path(os.environ[PLACE]))))
    with tempfile.TemporaryDirectory() as directory:
        os.environ[PLACE] = directory
        make(asked, Path(directory))
        compare(asked, lambda: measure(asked))


def make(asked: argparse.Namespace, directory: Path) -> None:
    from llmkd.models.load import train_tokenizer
    from llmkd.quantize import quantize_gptq

    classifier(TOY if asked.quick else SIZES, "fp32").bfloat16().save_pretrained(directory / "merged")
    train_tokenizer(["any words will do"], 300).save_pretrained(directory / "merged")
    calibration = [row.tolist() for row in token_rows(None, 64, 300, 8)]
    quantize_gptq(
        directory / "merged", directory / "8bit", calibration, group_size=32 if asked.quick else 128
    )


def measure(asked: argparse.Namespace) -> list[Row]:
    ways = {**WAYS, **(PACKED if asked.packed else {})}
    found = in_turn({way: alone(way) for way in ways}, asked.rounds)
    asks = [("ours8", "loop", ">= 2", "<= 1"), ("ours", "loop", ">= 2", "<= 1")]
    asks.append(("ours8", "ours", ">= 1", ""))
    asks += [("ours8", way, ">= 2", "<= 1") for way in PACKED if asked.packed]
    rows = []
    for way, peer, speed, memory in asks:
        note = f"mean P(A) {middle(found, way, 'mean'):.5f}, {middle(found, peer, 'mean'):.5f}"
        for name, unit, goal in (("rows_a_second", "rows/s", speed), ("mb", "MB", memory)):
            sides = [f"{middle(found, one, name):.4g} {unit}" for one in (way, peer)]
            what = f"{ways[way]}, {asked.precision}: {'speed' if unit == 'rows/s' else 'peak memory'}"
            rows.append(Row(what, ways[peer], ratios(found, way, peer, name), goal, *sides, note))
    return rows


def judge(asked: argparse.Namespace, directory: Path) -> dict[str, float]:
    import llmkd.train  # noqa: F401  imported before memory is counted, on both sides
    from llmkd.evaluate import both_orders

    vocabulary = (TOY if asked.quick else SIZES)["vocab_size"]
    given = token_rows(asked.data, asked.max_tokens, vocabulary, asked.count)
    data = examples([*given, *(np.roll(row, len(row) // 2) for row in given)])  # stands for the other order
    before = reset_peak()
    run = load_ours if asked.way.startswith("ours") else load_plain
    path = directory / ("8bit" if asked.way.endswith("8") else "merged")
    logits_of = run(path, data, DTYPES[asked.precision])
    logits_of(np.arange(4))  # every kernel once
    began = clock(asked)
    logits = logits_of(np.arange(len(data.ids)))
    seconds = clock(asked) - began
    mean = both_orders(logits[: len(given)], logits[len(given) :], [1, 0, 2])[:, 0].mean()
    return {"rows_a_second": len(data.ids) / seconds, "mb": peak() - before, "mean": float(mean)}


def load_ours(path: Path, data: Any, dtype: torch.dtype) -> Any:
    from llmkd.models.artifact import load_artifact
    from llmkd.train import predict

    model, _ = load_artifact(path, dtype=dtype)
    return lambda rows: predict(model, data, rows, 4096)


def load_plain(path: Path, data: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype).eval()

    def logits_of(rows: np.ndarray) -> np.ndarray:
        found = np.zeros((len(rows), 3), np.float32)
        order = np.argsort(-data.lengths[rows], kind="stable")
        with torch.no_grad():
            for begin in range(0, len(rows), 8):
                at = order[begin : begin + 8]
                found[at] = model(**data.inputs(rows[at])).logits.float().numpy()
        return found

    return logits_of


if __name__ == "__main__":
    main()
