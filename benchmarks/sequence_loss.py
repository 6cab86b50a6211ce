"""The loss of sequence distillation with and without the logits: seconds and peak memory, side by side.

    python benchmarks/sequence_loss.py [--tokens 2048] [--hidden 512] [--vocab 256000] [--rounds 2]

Each way runs in a process of its own, in turn (plain, chunked, plain, chunked, ...), so that neither finds
the other's memory. A pass is forward and backward, to the student's hidden states and head; CE + T² KL
against one teacher at T = 2, float32, CPU. Memory is what the pass adds to the process at its peak (VmHWM,
Linux). The plain way is what one writes with torch: whole logits, cross_entropy and kl_div.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

from side import Row, alone, available, clock, compare, in_turn, middle, parser, peak, ratios, reset_peak

WAYS = ("plain", "chunked")
SIZES = {"tokens": 2048, "hidden": 512, "vocab": 256_000, "chunk": 128}
TOY = {"tokens": 96, "hidden": 16, "vocab": 2_000, "chunk": 32}


def main() -> None:
    found = parser(__doc__, rounds=2)
    for name in SIZES:
        found.add_argument(f"--{name}", type=int)
    asked = found.parse_args()
    for name, size in (TOY if asked.quick else SIZES).items():
        setattr(asked, name, getattr(asked, name) or size)
    if asked.way:
        print(json.dumps(measure(asked)))
    else:
        compare(asked, partial(measured, asked))


def measured(asked: argparse.Namespace) -> list[Row]:
    needed, free = 7.3 * 4 * asked.tokens * asked.vocab, available()
    if free < needed:
        sys.exit(
            f"the plain way needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; take fewer --tokens"
        )
    found = in_turn({way: alone(way) for way in WAYS}, asked.rounds)
    what = f"a loss over {asked.tokens} tokens, hidden {asked.hidden}, {asked.vocab} words"
    seconds, more = ([f"{middle(found, way, name):,.1f}" for way in WAYS] for name in ("seconds", "mb"))
    note = "loss " + ", ".join(f"{middle(found, way, 'loss'):.5f}" for way in reversed(WAYS))
    speed, memory = ratios(found, "plain", "chunked", "seconds"), ratios(found, "chunked", "plain", "mb")
    return [
        Row(f"{what}: speed", "whole logits", speed, ">= 0.9", f"{seconds[1]} s", f"{seconds[0]} s", note),
        Row("the same: peak memory", "whole logits", memory, "<= 0.1", f"{more[1]} MB", f"{more[0]} MB"),
    ]


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    hidden, teacher = (torch.randn(asked.tokens, asked.hidden) for _ in range(2))
    weight, theirs = (torch.randn(asked.vocab, asked.hidden).mul_(0.05) for _ in range(2))
    targets = torch.randint(asked.vocab, (asked.tokens,))
    loss_of = {"plain": plain, "chunked": chunked(asked.chunk)}[asked.way]
    loss_of(hidden[:64].clone().requires_grad_(), weight.requires_grad_(), targets[:64], teacher[:64], theirs)
    hidden.requires_grad_()
    before, began = reset_peak(), clock(asked)
    loss = loss_of(hidden, weight, targets, teacher, theirs)
    loss.backward()
    seconds = clock(asked) - began
    return {"seconds": seconds, "mb": max(1, round(peak() - before)), "loss": loss.item()}


def plain(hidden, weight, targets, teacher, theirs, temperature=2.0):  # type: ignore[no-untyped-def]
    from torch.nn.functional import cross_entropy, kl_div

    logits, wanted = hidden @ weight.T, teacher @ theirs.T  # (N, V)
    log_q, log_p = (logits / temperature).log_softmax(-1), (wanted / temperature).log_softmax(-1)
    soft = kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return cross_entropy(logits, targets) + temperature**2 * soft


def chunked(chunk):  # type: ignore[no-untyped-def]
    from llmkd.chunked import chunked_loss
    from llmkd.models.head import Head
    from llmkd.objective import Objective

    objective = Objective({"ce": 1.0, "kl": 1.0}, ["teacher"], [1.0], [2.0], normalize=False)

    def loss_of(hidden, weight, targets, teacher, theirs):  # type: ignore[no-untyped-def]
        pairs = [(teacher, Head(theirs))]
        loss, _ = chunked_loss(hidden, Head(weight), targets, objective, pairs, chunk=chunk)
        return loss.mean()

    return loss_of


if __name__ == "__main__":
    main()
