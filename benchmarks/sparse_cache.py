"""What a student loses to the cache's format: validation KL and CE after training on each, for two teachers.

    python benchmarks/sparse_cache.py [--vocab 8000] [--steps 1200] [--seeds 3]

Made-up teachers: word frequencies by Zipf's law, and a random linear map of a random context on top. The
`peaked` one is as sure as a language model (2.5 nats of entropy at 128,256 words, 43 % on its first word),
the `flat` one is not (6.7 nats, 14 %). The student is a small net, and sees each context once with what its
cache holds, laid out for 128,256 words. Judged on fresh contexts against the whole teacher; CE is that on
words drawn from the teacher, in expectation: the KL and the teacher's entropy.

How many tokens there are to a word decides: with less than one (--vocab 32000 --steps 200) whatever shows
more words of each token is ahead, with ten (the default) what has no bias is.
"""

from __future__ import annotations

import argparse
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn

from llmkd.losses import kl
from llmkd.sparse import Layout, choose, pack, sparse_kl, unpack

HIDDEN, BATCH, WORDS = 16, 64, 128_256
TEACHERS = {"peaked": 1.5, "flat": 0.5}  # scales of the map
WAYS: dict[str, Layout | None] = {
    "online, all words": None,
    "top 64 and tail, float32": Layout("topk", 64, WORDS, 32),
    "top 19 and tail, 8 bits": Layout("topk", 19, WORDS),
    "sampled, k = 21, 8 bits": Layout("sampled", 21, WORDS),
}


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"vocab": 8_000, "steps": 1200, "seeds": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=[*TEACHERS])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"{asked.vocab} words, {asked.steps} steps of {BATCH} tokens, seeds 1 to {asked.seeds}")
    for teacher in asked.teachers:
        print(f"{teacher:28}{'bytes a token':>14}{'KL':>9}{'s.e.':>9}{'CE':>9}{'s.e.':>9}  KL of each")
        for name, layout in WAYS.items():
            found = [trained(asked, TEACHERS[teacher], layout, seed + 1) for seed in range(asked.seeds)]
            size = layout.token_bytes if layout else 4 * WORDS
            (kls, kl_error), (ces, ce_error) = (middle(values) for values in zip(*found, strict=True))
            each = " ".join(f"{one[0]:.4f}" for one in found)
            numbers = f"{kls:9.4f}{kl_error:9.4f}{ces:9.4f}{ce_error:9.4f}"
            print(f"{name:28}{size:14d}{numbers}  {each}", flush=True)


def middle(values: tuple[float, ...]) -> tuple[float, float]:
    return mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def trained(asked: argparse.Namespace, scale: float, layout: Layout | None, seed: int) -> tuple[float, float]:
    """Validation KL and CE of a student trained on what the layout keeps; None keeps everything."""
    vocab, steps = asked.vocab, asked.steps
    torch.manual_seed(seed)
    zipf = -torch.arange(1, vocab + 1).log()[torch.randperm(vocab)]  # (V,)
    table = torch.randn(vocab, HIDDEN) * scale  # of the teacher
    student = nn.Sequential(nn.Linear(HIDDEN, 32), nn.GELU(), nn.Linear(32, vocab))
    with torch.no_grad():
        student[2].weight.mul_(0.1)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    fresh, fair = torch.randn(512, HIDDEN), np.random.default_rng(seed)
    for _ in range(steps):
        context = torch.randn(BATCH, HIDDEN)
        wanted = context @ table.T + zipf  # (n, V)
        said = student(context)  # (n, V)
        loss = kl(said, wanted) if layout is None else learnt(said, wanted, layout, fair)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    apart, entropy = [], []
    with torch.no_grad():
        for part in fresh.split(BATCH):
            wanted = part @ table.T + zipf
            apart.append(kl(student(part), wanted))
            log_p = wanted.log_softmax(-1)
            entropy.append(-(log_p.exp() * log_p).sum(-1))
    found = float(torch.cat(apart).mean())
    return found, found + float(torch.cat(entropy).mean())


def learnt(said: Tensor, wanted: Tensor, layout: Layout, fair: np.random.Generator) -> Tensor:
    return sparse_kl(said, unpack(pack(choose(wanted, layout), layout, fair), layout))


if __name__ == "__main__":
    main()
