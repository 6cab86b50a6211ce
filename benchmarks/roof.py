"""How much of this machine's matrix rate a training step reaches.

    python benchmarks/roof.py [--data prefs.parquet] [--rounds 3] [--ranks 4]

The step: 64 rows, two teachers' cached logits, a Gemma2 of 25M parameters with LoRA (r 64, dropout 0.05),
AdamW: forward, backward, clip, optimizer. The rate: one product of 2048 x 2048 matrices in the same
precision, in turn with the step, on the same threads. Operations are those that the mathematics needs for
the real tokens (padding counts as lost): a frozen layer of I inputs and O outputs 2IO forward and 2IO for
its input's gradient, its adapter 2r(I + O) each for forward, input and weights; attention 6 products of
L(L + 1)/2 pairs of tokens, 2D each, a head. In float32 without dropout ours adds an adapter to its layer
first, and a third of its operations goes: they are not counted then, and the share with them is told beside.
The first layer's projections of queries, keys and values need no gradient of their input. The last layer's
keys and values are of all tokens; all else there is of the one token that the head reads.
--ranks N: N processes of one thread share the step as the engine deals it, gradients meet once; its rate is
all operations by the seconds of the slowest. The product is N at once, one a process, their rates together.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from side import Row, clock, compare, parser, parts
from student import (
    DROPOUT,
    DTYPES,
    LORA,
    SIZES,
    TOY,
    classifier,
    examples,
    lengths_in_words,
    our_lora,
    token_rows,
)
from together import together

PRODUCTS = 5.0  # seconds of products: ranks begin and end them together


def main() -> None:
    found = parser(__doc__, precise=True)
    found.add_argument("--data", type=Path)
    for name, default in {"step-rows": 64, "max-tokens": 1024, "batch-tokens": 4096}.items():
        found.add_argument(f"--{name}", type=int, default=default)
    found.add_argument("--ranks", type=int, default=1)
    found.add_argument("--dropout", type=float, default=DROPOUT, help="of the adapters' inputs")
    asked = found.parse_args()
    if asked.quick:
        asked.step_rows, asked.max_tokens, asked.rounds = 16, 48, 1
    if asked.ranks > 1 and not asked.way:
        asked.threads = asked.ranks
    torch.set_num_threads(1 if asked.ranks > 1 else asked.threads)
    if asked.way:
        return print(json.dumps(rank(asked)))
    compare(asked, lambda: measure(asked))


def measure(asked: argparse.Namespace) -> list[Row]:
    sizes = TOY if asked.quick else SIZES
    data, step = chosen(asked)
    rows = np.concatenate([rows for rows, _ in step])
    print(f"the step: {lengths_in_words(data.lengths[rows])}, {len(step)} micro-batches")
    merged = asked.precision == "fp32" and not asked.dropout
    needed, written = (
        operations(sizes, LORA["r"], data.lengths[rows], merged=one) for one in (merged, False)
    )
    each = together("turns", asked.ranks) if asked.ranks > 1 else [turns(asked)]
    steps = [needed / max(times) for times in zip(*(one["step"] for one in each), strict=True)]
    products = [sum(rates) for rates in zip(*(one["product"] for one in each), strict=True)]
    for number, (ours, theirs) in enumerate(zip(steps, products, strict=True), 1):
        print(f"  round {number}: step {ours / 1e9:.1f}, product {theirs / 1e9:.1f} GFLOP/s", flush=True)
    print(f"a step needs {needed / 1e9:.1f} G operations; where its time goes, in one micro-batch:")
    print(profiled(student(asked)[0], data, step[len(step) // 2][0]))
    shares = [ours / theirs for ours, theirs in zip(steps, products, strict=True)]
    sides = [f"{median(rates) / 1e9:.1f} GFLOP/s" for rates in (steps, products)]
    note = f"loss {median(sum(losses) for losses in zip(*(one['loss'] for one in each), strict=True)):.5f}"
    note += f"; {median(shares) * written / needed:.2f} with adapters' products as peft has them" * merged
    what = f"a training step's matrix rate, {parts(asked)}, {asked.precision}, dropout {asked.dropout:g}, "
    what += f"{asked.batch_tokens:,} tokens a micro-batch"
    against = f"{asked.ranks} large products at once" if asked.ranks > 1 else "one large product"
    return [Row(what, against, shares, ">= 0.7", *sides, note)]


def rank(asked: argparse.Namespace) -> dict[str, list[float]]:
    """In one rank's process."""
    from llmkd import ranks

    ranks.start()
    found = turns(asked)
    ranks.stop()
    return found


def turns(asked: argparse.Namespace) -> dict[str, list[float]]:
    """Step and product in turn: seconds of this process's share of a step until all have taken theirs, its
    share of the loss, and operations a second of its products."""
    from torch.nn.parallel import DistributedDataParallel

    from llmkd import ranks

    data, step = chosen(asked)
    method, optimizer = student(asked)
    if asked.ranks > 1:
        method = DistributedDataParallel(method)
    largest = max(step, key=lambda one: len(one[0]) * data.lengths[one[0]].max())
    train(method, optimizer, data, [largest], asked.step_rows)  # every kernel once, and memory
    found: dict[str, list[float]] = {"step": [], "loss": [], "product": []}
    for _ in range(asked.rounds):
        ranks.barrier()
        began = clock(asked)
        found["loss"].append(train(method, optimizer, data, step, asked.step_rows))
        found["step"].append(clock(asked) - began)
        ranks.barrier()
        found["product"].append(product(asked, 0.05 if asked.quick else PRODUCTS))
    return found


def product(asked: argparse.Namespace, least: float) -> float:
    """Operations a second of large products, one after the other for `least` seconds."""
    size = 256 if asked.quick else 2048
    square = torch.randn(size, size).to(DTYPES[asked.precision])
    square @ square  # once before: the kernel is made
    began, times = clock(asked), 0
    while clock(asked) - began < least:
        square @ square
        times += 1
    return 2.0 * times * size**3 / (clock(asked) - began)


def chosen(asked: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The data and this rank's (rows, real rows) pairs of an epoch's first step."""
    from llmkd import ranks
    from llmkd.batches import epoch_steps
    from llmkd.dealing import deal

    sizes = TOY if asked.quick else SIZES
    data = examples(token_rows(asked.data, asked.max_tokens, sizes["vocab_size"], 2048))
    step = epoch_steps(np.arange(len(data.ids)), data.lengths, asked.step_rows, asked.batch_tokens, 0, 0)[0]
    return data, deal(step, data.lengths, ranks.world())[ranks.rank()]


def student(asked: argparse.Namespace) -> tuple[Any, torch.optim.Optimizer]:
    from llmkd.methods.cached import Cached
    from llmkd.objective import Objective

    objective = Objective({"ce": 1, "kl": 1, "cosine": 1}, ["one", "two"], [1.0, 1.0], [1.0, 1.0])
    model = our_lora(classifier(TOY if asked.quick else SIZES, asked.precision), asked.dropout)
    method = Cached(model, objective, asked.precision).train()
    trained = [value for value in method.parameters() if value.requires_grad]
    return method, torch.optim.AdamW(trained, lr=0)  # every round the same loss, whatever the ranks


def train(method: Any, optimizer: torch.optim.Optimizer, data: Any, mine: list[Any], whole: int) -> float:
    """One optimizer step of `whole` rows, of which `mine` are here; their share of its mean loss."""
    total, several = 0.0, hasattr(method, "no_sync")
    for number, (rows, real) in enumerate(mine, 1):
        apart = several and number < len(mine)  # gradients meet at the last micro-batch
        with method.no_sync() if apart else nullcontext():
            total += backward(method, data, rows, 1 / whole, real)
    torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def backward(method: Any, data: Any, rows: np.ndarray, scale: float, real: int) -> float:
    item = data.batch(rows, real, scale)
    losses, _ = method(**item["batch"])
    loss = (losses * item["weight"]).sum()
    loss.backward()
    return loss.item()


def operations(
    sizes: dict[str, int], r: int, lengths: np.ndarray, *, causal: bool = True, merged: bool = False
) -> float:
    """Of forward and backward. causal=False: over every pair of tokens, as eager attention. merged: with
    adapters that are added to their layers' weights (that itself not counted)."""
    small = 4 if merged else 6
    hidden, inner, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    queries, keys = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    projections = [(hidden, queries), (hidden, keys), (hidden, keys)]
    others = [(queries, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    layers, tokens = sizes["num_hidden_layers"], lengths.sum()
    layer, kept = (
        sum(4 * i * o + small * r * (i + o) for i, o in part)
        for part in ([*projections, *others], projections[1:])
    )
    total = (layers - 1) * layer * tokens + kept * tokens + (layer - kept) * len(lengths)
    total -= sum(2 * i * o + (not merged) * 2 * r * i for i, o in projections) * tokens  # the first layer's
    pairs = (lengths * (lengths + 1) // 2 if causal else lengths**2).sum()
    return float(total + 6 * 2 * queries * ((layers - 1) * pairs + tokens))


def profiled(method: Any, data: Any, rows: np.ndarray) -> str:
    from torch.profiler import ProfilerActivity, profile

    backward(method, data, rows, 1.0, len(rows))  # every kernel once
    with profile(activities=[ProfilerActivity.CPU]) as found:
        backward(method, data, rows, 1.0, len(rows))
    most = sorted(found.key_averages(), key=lambda one: -one.self_cpu_time_total)
    whole = sum(one.self_cpu_time_total for one in most)
    lines = [f"  {one.self_cpu_time_total / whole:6.1%} {one.key} ({one.count})" for one in most[:14]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
