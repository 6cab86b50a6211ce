"""Whole steps of sequence distillation at growing vocabularies: tokens a second and peak memory.

    python benchmarks/sequence_step.py [--vocab 32000 128000] [--rounds 3] [--environments DIRECTORY]

A Llama (4 layers of 256, its head tied) learns the next-token distributions of a wider one, trained in full:
forward KL at T = 1 on every next token, AdamW, bf16 over float32 weights, the teacher held in bf16 (with
--precision fp32 all in float32). Ours: llmkd.methods.sequence with the teacher beside the student, and with
its 64 likeliest words from a cache, which is another loss. Against a stock HF Trainer on whole logits, and,
in an environment of its own, TRL's DistillationTrainer (chunked too) given the rows for completions, and its
GKDTrainer on whole logits. Seconds are of all steps but the first; memory is the process's peak over its
imports (VmHWM, Linux). A way that would not fit into memory is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import sequence_peers
import torch
from environment import add_flag, peer, variables, versions
from side import (
    Found,
    Row,
    alone,
    available,
    clock,
    compare,
    in_turn,
    middle,
    parser,
    peak,
    ratios,
    reset_peak,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

PLACE = "LLMKD_BENCHMARK_MODELS"
OURS = {"online": "ours, teacher beside", "cached": "ours, 64 words cached"}
HERE = {"plain": "HF Trainer, whole logits"}
TRL = {"trl": "TRL DistillationTrainer", "gkd": "TRL GKDTrainer, whole logits"}
WHOLE = ("plain", "gkd")
HIDDEN = {"student": 256, "teacher": 512}
COPIES = 8  # of the whole logits in float32, at the peak of a plain step


def main() -> None:
    found = parser(__doc__, precise=True)
    found.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_000])
    for name, default in {"batch": 2, "length": 256, "steps": 5}.items():
        found.add_argument(f"--{name}", type=int, default=default)
    found.add_argument("--lr", type=float, default=1e-4)
    add_flag(found)
    asked = found.parse_args()
    if asked.quick:
        asked.vocab, asked.length, asked.steps, asked.rounds = [300], 16, 2, 1
    torch.set_num_threads(asked.threads)
    if asked.way:
        return print(json.dumps(step(asked, Path(os.environ[PLACE]))))
    with nullcontext() if asked.quick and not asked.environments else peer(asked, "trl") as python:
        if python:
            print(versions(python, "trl", "transformers", "torch"))
        compare(asked, lambda: [row for vocab in asked.vocab for row in measure(asked, vocab, python)])


def measure(asked: argparse.Namespace, vocab: int, python: str | None) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        os.environ[PLACE] = directory
        make(asked, Path(directory), vocab)
        ways = {way: alone(way) for way in (*OURS, *HERE)}
        if python:
            ways |= {way: alone(way, python, variables({})) for way in TRL}
        for way in [way for way in WHOLE if way in ways and needed(asked, vocab) > available()]:
            print(f"  {way} at {vocab} words: needs some {needed(asked, vocab) / 1e9:.0f} GB, left out")
            del ways[way]
        print(f"  {vocab} words", flush=True)
        found = in_turn(ways, asked.rounds)
    return [row for way in found if way not in OURS for row in rows_of(asked, found, way, vocab)]


def rows_of(asked: argparse.Namespace, found: Found, peer_way: str, vocab: int) -> list[Row]:
    rows = []
    goals = {"tokens_a_second": ">= 1", "mb": "<= 1"}
    for way in OURS:
        for name, unit in {"tokens_a_second": "tokens/s", "mb": "MB"}.items():
            sides = [f"{middle(found, one, name):.4g} {unit}" for one in (way, peer_way)]
            note = "mean loss " + ", ".join(f"{middle(found, one, 'loss'):.5f}" for one in (way, peer_way))
            what = f"{OURS[way]}, {vocab} words, {asked.precision}: "
            what += "speed" if unit == "tokens/s" else "peak memory"
            each = ratios(found, way, peer_way, name)
            rows.append(Row(what, {**HERE, **TRL}[peer_way], each, goals[name], *sides, note))
    return rows


def make(asked: argparse.Namespace, directory: Path, vocab: int) -> None:
    """Both models, the rows, and the teacher's cache."""
    from llmkd.models.load import train_tokenizer

    tokenizer = train_tokenizer(["any words will do"], 300)
    for seed, (name, dtype) in enumerate(sequence_peers.dtypes(asked).items()):
        model = llama(vocab, 32 if asked.quick else HIDDEN[name], seed)
        model.to(dtype).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    shape = (asked.batch * asked.steps, asked.length)
    np.save(directory / "rows.npy", np.random.default_rng(0).integers(3, vocab, shape))
    cache(asked, directory, vocab)


def llama(vocab: int, hidden: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": vocab}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "tie_word_embeddings": True}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **special, initializer_range=0.1))


def examples(directory: Path) -> Any:
    from llmkd.batches import token_examples

    rows = np.load(directory / "rows.npy")
    count, length = rows.shape
    ids, offsets = [f"row{i}" for i in range(count)], np.arange(count + 1) * length
    weights = np.full(count, float(length - 1))  # its targets
    return token_examples(ids, rows.astype(np.int32).ravel(), offsets, np.full(count, -1), 0, weights)


def cache(asked: argparse.Namespace, directory: Path, vocab: int) -> None:
    from llmkd.capture import cache_teacher

    teacher, layout, key = layout_and_key(asked, directory, vocab)
    rows = examples(directory)
    how = {"batch_tokens": 512, "precision": asked.precision}
    cache_teacher(teacher, rows, directory / "cache", layout, key, **how)


def layout_and_key(asked: argparse.Namespace, directory: Path, vocab: int) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmkd.layout import Layout
    from llmkd.shards import cache_key

    layout = Layout("topk", 64, vocab, 16)
    dtype = sequence_peers.dtypes(asked)["teacher"]
    teacher = AutoModelForCausalLM.from_pretrained(directory / "teacher", dtype=dtype)
    return teacher, layout, cache_key(layout, "teacher", AutoTokenizer.from_pretrained(directory / "teacher"))


def step(asked: argparse.Namespace, directory: Path) -> dict[str, float]:
    """One way, in this process."""
    train = {"online": ours, "cached": ours}.get(asked.way) or sequence_peers.prepared(asked.way)
    if asked.way in OURS:
        import llmkd.train  # noqa: F401  imported before memory is counted, on all sides
    ends: list[float] = []
    register_optimizer_step_post_hook(lambda *_: ends.append(clock(asked)))
    before = reset_peak()
    loss = train(asked, directory)
    tokens = asked.batch * (asked.length - 1) * (len(ends) - 1)
    return {"tokens_a_second": tokens / (ends[-1] - ends[0]), "mb": peak() - before, "loss": loss}


def ours(asked: argparse.Namespace, directory: Path) -> float:
    from transformers import AutoModelForCausalLM

    from llmkd.methods.sequence import Sequence
    from llmkd.objective import Objective
    from llmkd.shards import open_cache, row_digests, with_cache
    from llmkd.train import arguments, fit

    student = AutoModelForCausalLM.from_pretrained(directory / "student", dtype=torch.float32)
    rows, vocab, beside = examples(directory), student.config.vocab_size, {}
    teacher, _, key = layout_and_key(asked, directory, vocab)
    if asked.way == "online":
        beside = {"teacher": teacher}
    else:
        del teacher
        digests = row_digests(rows, np.arange(len(rows.ids)))
        rows = with_cache(rows, "teacher", open_cache(directory / "cache", rows.ids, key, digests))
    objective = Objective({"kl": 1.0}, ["teacher"], [1.0], [1.0])
    method = Sequence(student, objective, beside, vocab=vocab, precision=asked.precision)
    training = arguments(directory / "out", epochs=1, learning_rate=asked.lr, betas=(0.9, 0.999))
    budget = asked.batch * asked.length
    history = fit(
        method, rows, np.arange(len(rows.ids)), training, batch_rows=asked.batch, batch_tokens=budget
    )
    return float(np.mean([entry["loss"] for entry in history["loss"]]))


def needed(asked: argparse.Namespace, vocab: int) -> float:
    return COPIES * 4.0 * asked.batch * asked.length * vocab


if __name__ == "__main__":
    main()
