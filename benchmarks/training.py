"""Distilling a classifier from two teachers' cached logits: rows a second, ours against what one would write.

    python benchmarks/training.py [--data prefs.parquet] [--rounds 3] [--peers plain2 plain8 trainer]
    python benchmarks/training.py --ranks 4 [--peers plain2 plain2-ranks trainer-ranks]
    python benchmarks/training.py --threads 1        # no rank, no second thread: the recipes alone

A Gemma2 of 25M parameters with LoRA (r 64, dropout 0.05, of which each way draws its own), steps of 64 rows,
(CE + 2 KL + 2 cosine) / 5, AdamW. Every way trains the same rows once, from the same weights. plain2,
plain8: the reference recipe's loop in plain PyTorch and peft, random batches of 2 or 8 padded to their
longest row, accumulated to a step.
trainer: the stock Hugging Face Trainer, DataCollatorWithPadding, batches of 8, with that loss. Ours:
llmkd.train.fit with llmkd.methods.cached, as stage 03 calls it. With --data, the file's texts in the tokens
of a tokenizer trained on them. The rows are whole steps of an epoch over the whole file. --ranks N: ours as
N processes of one thread (torchrun --nproc_per_node N stages/03_distill.py), which share each step's rows,
against the peers as one process of N threads and, named -ranks, as N processes of one thread too: the plain
loop deals out a step's batches and adds the gradients once a step, the Trainer finds the launcher by itself
(trainer-ranks runs only where it is named: 4 of it ran out of 23 GB, over `prefs`).
Ranks are timed from a common barrier to the last one's end: starting, loading and a warm-up come before it.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import plain, stock
from side import Row, clock, compare, in_turn, middle, parser, parts, ratios
from student import DROPOUT, SIZES, TOY, both_models, examples, lengths_in_words, token_rows
from together import together
from torch import nn

from llmkd import libraries, ranks

GOALS = {"plain2": ">= 3", "plain8": ">= 2", "trainer": ">= 2"}
NAMES = {
    "plain2": "plain loop, batches of 2",
    "plain8": "plain loop, batches of 8",
    "trainer": "HF Trainer, 8",
}
APART = "-ranks"  # a peer's name with it: by ranks
DATA = "LLMKD_BENCHMARK_DATA"
WARM = 8  # rows a rank to warm up with, and no fewer than 16


def main() -> None:
    found = parser(__doc__, precise=True)
    found.add_argument("--data", type=Path)
    for name, default in {"steps": 3, "step-rows": 64, "max-tokens": 1024, "batch-tokens": 4096}.items():
        found.add_argument(f"--{name}", type=int, default=default)
    found.add_argument("--lr", type=float, default=5e-5)
    found.add_argument("--dropout", type=float, default=DROPOUT, help="of the adapters' inputs")
    found.add_argument("--ranks", type=int, default=1, help="processes of one thread")
    found.add_argument("--peers", nargs="*", choices=[*NAMES, *(name + APART for name in NAMES)])
    asked = found.parse_args()
    if asked.quick:
        asked.steps, asked.step_rows, asked.max_tokens, asked.rounds = 2, 16, 48, 1
    if asked.peers is None:
        apart = ["plain2" + APART, "plain8" + APART] if asked.ranks > 1 else []
        asked.peers = [*NAMES, *apart]
    if asked.ranks == 1 and any(peer.endswith(APART) for peer in asked.peers):
        sys.exit(f"--peers {' '.join(asked.peers)}: one of them runs by ranks; add --ranks N, N over 1")
    libraries.load()  # as a stage does, before either side trains
    if asked.way:
        torch.set_num_threads(1)
        return print(json.dumps(rank(asked)))
    if asked.ranks > 1:
        asked.threads = asked.ranks
    torch.set_num_threads(asked.threads)
    compare(asked, lambda: measure(asked))


def measure(asked: argparse.Namespace) -> list[Row]:
    rows = chosen(asked)
    data = examples(rows)
    theirs, ours, start = both_models(TOY if asked.quick else SIZES, asked.precision, asked.dropout)
    names = ["ours", *asked.peers]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "data"
        file.write_bytes(pickle.dumps(rows))
        ways: dict[str, Any] = {}
        for name in names:
            if name.endswith(APART) or (name == "ours" and asked.ranks > 1):
                ways[name] = partial(by_ranks, name, asked.ranks, file)
                continue
            train = partial(timed, trainer(name), ours if name == "ours" else theirs, start, asked=asked)
            train(few(data, 1))
            ways[name] = partial(train, data)
        found = in_turn(ways, asked.rounds)
    return [row(found, peer, asked) for peer in asked.peers]


def trainer(name: str) -> Any:
    if name == "ours":
        return fit_ours
    peer = name.removesuffix(APART)
    return partial(stock, micro=8) if peer == "trainer" else partial(plain, micro=int(peer[5:]))


def by_ranks(name: str, many: int, data: Path) -> dict[str, float]:
    """What the slowest found."""
    return min(together(name, many, {DATA: str(data)}), key=lambda one: one["rows_a_second"])


def rank(asked: argparse.Namespace) -> dict[str, float]:
    """In one rank's process."""
    ranks.start()
    data = examples(pickle.loads(Path(os.environ[DATA]).read_bytes()))
    theirs, ours, start = both_models(TOY if asked.quick else SIZES, asked.precision, asked.dropout)
    train = partial(timed, trainer(asked.way), ours if asked.way == "ours" else theirs, start, asked=asked)
    train(few(data, asked.ranks))
    ranks.barrier()
    found = train(data)
    ranks.stop()
    return found


def chosen(asked: argparse.Namespace) -> list[np.ndarray]:
    """The token ids of the first steps of an epoch over the whole file, the longest rows first, for `few`."""
    from llmkd.batches import epoch_steps

    vocabulary = (TOY if asked.quick else SIZES)["vocab_size"]
    every = token_rows(asked.data, asked.max_tokens, vocabulary, 200 if asked.quick else 8192)
    lengths = np.asarray([len(row) for row in every])
    epoch = epoch_steps(np.arange(len(every)), lengths, asked.step_rows, asked.batch_tokens, 0, 0)
    rows = [row for step in epoch[: asked.steps] for micro in step for row in micro]
    source = asked.data.parent.name if asked.data else "made up"
    print(f"{source}: {lengths_in_words(lengths)}; trained on: {lengths_in_words(lengths[rows])}")
    return [every[row] for row in sorted(rows, key=lambda row: -lengths[row])]


def few(data: Any, many: int) -> Any:
    """The longest rows, to warm up `many` ranks with: every kernel once, and memory, as what a process has
    not had yet is slow, and a training of any length pays for that once."""
    return replace(data, ids=data.ids[: WARM * max(2, many)])


def row(found: Any, peer: str, asked: argparse.Namespace) -> Row:
    speed, theirs = middle(found, "ours", "rows_a_second"), middle(found, peer, "rows_a_second")
    losses = [middle(found, way, "loss") for way in ("ours", peer)]
    what = f"training, {asked.data.parent.name if asked.data else 'made-up'} lengths"
    what += f", {parts(asked)}, {asked.precision}, dropout {asked.dropout:g}"
    like = peer.removesuffix(APART)
    against = NAMES[like]
    if asked.ranks > 1:
        against += f", {asked.ranks} {'ranks' if peer != like else 'threads'}"
    return Row(
        what,
        against,
        ratios(found, "ours", peer, "rows_a_second"),
        GOALS[like],
        f"{speed:.2f} rows/s",
        f"{theirs:.2f} rows/s",
        f"mean loss {losses[0]:.5f}, {losses[1]:.5f}",
    )


def timed(train: Any, model: nn.Module, start: Any, data: Any, asked: argparse.Namespace) -> dict[str, float]:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(start[name])
    began = clock(asked)
    loss = train(model, data, asked)
    return {"rows_a_second": len(data.ids) / (clock(asked) - began), "loss": loss}


def fit_ours(model: nn.Module, data: Any, asked: argparse.Namespace) -> float:
    """The mean loss of all rows."""
    from llmkd.methods.cached import Cached
    from llmkd.objective import Objective
    from llmkd.train import arguments, fit

    objective = Objective({"ce": 1, "kl": 1, "cosine": 1}, ["one", "two"], [1.0, 1.0], [1.0, 1.0])
    method, rows = Cached(model, objective, asked.precision), np.arange(len(data.ids))
    with tempfile.TemporaryDirectory() as directory:
        training = arguments(Path(directory), epochs=1, learning_rate=asked.lr)
        batching = {"batch_rows": asked.step_rows, "batch_tokens": asked.batch_tokens}
        history = fit(method, data, rows, training, **batching)
    return float(np.mean([entry["loss"] for entry in history["loss"]]))


if __name__ == "__main__":
    main()
