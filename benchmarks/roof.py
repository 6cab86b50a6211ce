"""How much of this machine's matrix rate a training step reaches.

    python benchmarks/roof.py [--data prefs.parquet] [--rounds 3]

The step: 64 rows, two teachers' cached logits, a Gemma2 of 25M parameters with LoRA (r 64), bf16, AdamW:
forward, backward, clip, optimizer. The rate: one product of 2048 x 2048 matrices in bf16, in turn with the
step, on the same threads. Operations are those that the mathematics needs for the real tokens (padding
counts as lost): a frozen layer of I inputs and O outputs 2IO forward and 2IO for its input's gradient, its
adapter 2r(I + O) each for forward, input and weights; attention 6 products of L(L + 1)/2 pairs of tokens,
2D each, a head. The first layer's projections of queries, keys and values need no gradient of their input.
The last layer's keys and values are of all tokens; all else there is of the one token that the head reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side import Row, clock, compare, in_turn, middle, parser
from student import LORA, SIZES, TOY, classifier, examples, lengths_in_words, our_lora, token_rows


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--data", type=Path)
    for name, default in {"step-rows": 64, "max-tokens": 1024, "batch-tokens": 4096}.items():
        found.add_argument(f"--{name}", type=int, default=default)
    asked = found.parse_args()
    if asked.quick:
        asked.step_rows, asked.max_tokens, asked.rounds = 16, 48, 1
    torch.set_num_threads(asked.threads)
    compare(asked, lambda: measure(asked))


def measure(asked: argparse.Namespace) -> list[Row]:
    from llmkd.batches import epoch_steps

    sizes = TOY if asked.quick else SIZES
    data = examples(token_rows(asked.data, asked.max_tokens, sizes["vocab_size"], 2048))
    step = epoch_steps(np.arange(len(data.ids)), data.lengths, asked.step_rows, asked.batch_tokens, 0, 0)[0]
    rows = np.concatenate(step)
    print(f"the step: {lengths_in_words(data.lengths[rows])}, {len(step)} micro-batches")
    needed = operations(sizes, LORA["r"], data.lengths[rows])
    method = student(sizes)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=5e-5)
    square = torch.randn(256 if asked.quick else 2048, 256 if asked.quick else 2048).bfloat16()

    def trained() -> dict[str, float]:
        began = clock(asked)
        loss = train(method, optimizer, data, step)
        return {"rate": needed / (clock(asked) - began), "loss": loss}

    def product() -> dict[str, float]:
        began = clock(asked)
        for _ in range(10):
            square @ square
        return {"rate": 10 * 2 * len(square) ** 3 / (clock(asked) - began)}

    train(method, optimizer, data, step[:1])
    found = in_turn({"step": trained, "product": product}, asked.rounds)
    shares = [a["rate"] / b["rate"] for a, b in zip(found["step"], found["product"], strict=True)]
    print(f"a step needs {needed / 1e9:.1f} G operations; where its time goes, in one micro-batch:")
    print(profiled(method, data, step[len(step) // 2]))
    ours, theirs = (f"{middle(found, way, 'rate') / 1e9:.1f} GFLOP/s" for way in found)
    note = f"loss {middle(found, 'step', 'loss'):.5f}"
    return [Row("a training step's matrix rate", "one large product", shares, ">= 0.7", ours, theirs, note)]


def student(sizes: dict[str, int]) -> Any:
    from llmkd.methods.cached import Cached
    from llmkd.objective import Objective

    objective = Objective({"ce": 1, "kl": 1, "cosine": 1}, ["one", "two"], [1.0, 1.0], [1.0, 1.0])
    return Cached(our_lora(classifier(sizes, "bf16")), objective, "bf16").train()


def train(method: Any, optimizer: Any, data: Any, step: list[np.ndarray]) -> float:
    """One optimizer step; its mean loss."""
    total, count = 0.0, sum(map(len, step))
    for rows in step:
        total += backward(method, data, rows, 1 / count)
    torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def backward(method: Any, data: Any, rows: np.ndarray, scale: float) -> float:
    item = data.batch(rows, len(rows), scale)
    losses, _ = method(**item["batch"])
    loss = (losses * item["weight"]).sum()
    loss.backward()
    return loss.item()


def operations(sizes: dict[str, int], r: int, lengths: np.ndarray, causal: bool = True) -> float:
    """Of forward and backward. causal=False: over every pair of tokens, as eager attention."""
    hidden, inner, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    queries, keys = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    projections = [(hidden, queries), (hidden, keys), (hidden, keys)]
    others = [(queries, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    layers, tokens = sizes["num_hidden_layers"], lengths.sum()
    layer, kept = (
        sum(4 * i * o + 6 * r * (i + o) for i, o in part)
        for part in ([*projections, *others], projections[1:])
    )
    total = (layers - 1) * layer * tokens + kept * tokens + (layer - kept) * len(lengths)
    total -= sum(2 * i * o + 2 * r * i for i, o in projections) * tokens  # the first layer's
    pairs = (lengths * (lengths + 1) // 2 if causal else lengths**2).sum()
    return float(total + 6 * 2 * queries * ((layers - 1) * pairs + tokens))


def profiled(method: Any, data: Any, rows: np.ndarray) -> str:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        backward(method, data, rows, 1.0)
    most = sorted(found.key_averages(), key=lambda one: -one.self_cpu_time_total)
    whole = sum(one.self_cpu_time_total for one in most)
    lines = [f"  {one.self_cpu_time_total / whole:6.1%} {one.key} ({one.count})" for one in most[:14]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
