"""GPTQ of a classifier in 8 bits: llmkd.quantize against optimum's GPTQQuantizer called directly.

    python benchmarks/quantization.py [--calibration 128] [--rounds 3]

Both load the same merged bf16 Gemma2 of 25M parameters, calibrate on the same rows, and write the 8-bit
model (groups of 128, symmetric). Each way is a process of its own; the seconds are of all that, imports
aside; memory is the process's peak over what it held before (VmHWM, Linux). Ours also checks its output:
that what was to be kept did not change, and each layer's error. optimum's way packs with the same packer
(see llmkd.gptq), as the one that it would compile first costs about 25 seconds more.
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
from student import SIZES, TOY, classifier, token_rows

PLACE = "LLMKD_BENCHMARK_MODELS"


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--calibration", type=int, default=128, help="rows")
    asked = found.parse_args()
    if asked.quick:
        asked.calibration, asked.rounds = 8, 1
    torch.set_num_threads(asked.threads)
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    if asked.way:
        return print(json.dumps(measured(asked, Path(os.environ[PLACE]))))
    from llmkd.models.load import train_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        os.environ[PLACE] = directory
        classifier(TOY if asked.quick else SIZES, "fp32").bfloat16().save_pretrained(
            Path(directory) / "merged"
        )
        train_tokenizer(["any words will do"], 300).save_pretrained(Path(directory) / "merged")
        compare(asked, lambda: measure(asked))


def measure(asked: argparse.Namespace) -> list[Row]:
    found = in_turn({way: alone(way) for way in ("ours", "optimum")}, asked.rounds)
    errors = [middle(found, way, "error") for way in found]
    rows = []
    for name, unit in {"seconds": "s", "mb": "MB"}.items():
        sides = [f"{middle(found, way, name):.4g} {unit}" for way in found]
        note = f"mean logit error {errors[0]:.4f}, {errors[1]:.4f}"
        each = ratios(found, "ours", "optimum", name)
        what = f"GPTQ, {asked.calibration} rows: {'time' if unit == 's' else 'peak memory'}"
        rows.append(Row(what, "optimum directly", each, "<= 1.1", *sides, note))
    return rows


def measured(asked: argparse.Namespace, directory: Path) -> dict[str, float]:
    import llmkd.quantize  # noqa: F401
    from llmkd.gptq import import_quietly

    import_quietly()
    sizes, group = (TOY, 32) if asked.quick else (SIZES, 128)
    calibration = [row.tolist() for row in token_rows(None, 256, sizes["vocab_size"], asked.calibration)]
    before, began = reset_peak(), clock(asked)
    out = directory / asked.way
    (ours if asked.way == "ours" else theirs)(directory / "merged", out, calibration, group)
    return {"seconds": clock(asked) - began, "mb": peak() - before, "error": error(directory / "merged", out)}


def ours(path: Path, out: Path, calibration: list[list[int]], group: int) -> None:
    from llmkd.quantize import quantize_gptq

    quantize_gptq(path, out, calibration, group_size=group)


def theirs(path: Path, out: Path, calibration: list[list[int]], group: int) -> None:
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = [{"input_ids": [row], "attention_mask": [[1] * len(row)]} for row in calibration]
    quantizer = GPTQQuantizer(
        bits=8,
        dataset=rows,
        group_size=group,
        sym=True,
        act_group_aware=True,
        block_name_to_quantize="model.layers",
    )
    quantizer.quantize_model(model, tokenizer)
    quantizer.save(model, str(out))
    tokenizer.save_pretrained(out)


def error(path: Path, out: Path) -> float:
    """Mean absolute difference of the logits that the float model and the packed one give."""
    from llmkd.models.artifact import load_artifact
    from llmkd.models.pooling import class_logits

    ids = torch.from_numpy(np.random.default_rng(5).integers(3, 300, (4, 64)))
    logits: list[Any] = []
    with torch.no_grad():
        for one in (path, out):
            model, _ = load_artifact(one, dtype=torch.float32)
            logits.append(class_logits(model, input_ids=ids, attention_mask=torch.ones_like(ids)))
    return float((logits[0] - logits[1]).abs().mean())


if __name__ == "__main__":
    main()
