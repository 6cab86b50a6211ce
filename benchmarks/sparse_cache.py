"""What a student loses to the cache's format: validation KL after training on each, at 128,256 words.

    python benchmarks/sparse_cache.py [--vocab 128256] [--steps 250] [--seeds 3] [--scale 0.35]

A made-up teacher: word frequencies by Zipf's law, and a random linear map of a random context on top, so
its distributions have a head that depends on the context and a tail that matters. The student is smaller,
and sees each context once with what its cache holds. Judged on fresh contexts against the whole teacher.
"""

from __future__ import annotations

import argparse
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn

from llmkd.losses import kl
from llmkd.sparse import Layout, choose, pack, sparse_kl, unpack

HIDDEN, BATCH = 32, 64


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"vocab": 128_256, "steps": 250, "seeds": 3, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--scale", type=float, default=0.35, help="of the teacher's map: larger is surer")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    ways: dict[str, Layout | None] = {
        "online, all words": None,
        "top 64, float32": Layout("topk", 64, asked.vocab, 32),
        "top 19 and tail, 8 bits": Layout("topk", 19, asked.vocab),
        "20 sampled, 8 bits": Layout("sampled", 20, asked.vocab),
    }
    print(f"{asked.vocab} words, {asked.steps} steps of {BATCH} tokens, seeds 1 to {asked.seeds}")
    print(
        f"{'what the student learns from':30}{'bytes a token':>14}{'validation KL':>15}{'s.e.':>9}  each",
        flush=True,
    )
    for name, layout in ways.items():
        found = [trained(asked, layout, seed + 1) for seed in range(asked.seeds)]
        size = layout.token_bytes if layout else 4 * asked.vocab
        error = stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
        each = " ".join(f"{value:.4f}" for value in found)
        print(f"{name:30}{size:14d}{mean(found):15.4f}{error:9.4f}  {each}", flush=True)


def trained(asked: argparse.Namespace, layout: Layout | None, seed: int) -> float:
    """Validation KL of a student trained on what the layout keeps; None keeps everything."""
    vocab, steps = asked.vocab, asked.steps
    torch.manual_seed(seed)
    zipf = -torch.arange(1, vocab + 1).log()[torch.randperm(vocab)]  # (V,)
    table = torch.randn(vocab, HIDDEN) * asked.scale  # of the teacher
    student = nn.Sequential(nn.Linear(HIDDEN, 16), nn.GELU(), nn.Linear(16, vocab))
    with torch.no_grad():
        student[2].weight.mul_(0.1)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    fresh, fair = torch.randn(256, HIDDEN), np.random.default_rng(seed)
    for _ in range(steps):
        context = torch.randn(BATCH, HIDDEN)
        wanted = context @ table.T + zipf  # (n, V)
        said = student(context)  # (n, V)
        loss = kl(said, wanted) if layout is None else learnt(said, wanted, layout, fair)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        parts = [kl(student(part), part @ table.T + zipf) for part in fresh.split(BATCH)]
    return float(torch.cat(parts).mean())


def learnt(said: Tensor, wanted: Tensor, layout: Layout, fair: np.random.Generator) -> Tensor:
    return sparse_kl(said, unpack(pack(choose(wanted, layout), layout, fair), layout))


if __name__ == "__main__":
    main()
