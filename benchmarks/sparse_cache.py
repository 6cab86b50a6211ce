"""What a student loses to the cache's format: validation KL and CE after training on each, by teacher.

    python benchmarks/sparse_cache.py [--vocab 8000] [--steps 1200] [--seeds 3] [--ways topk sampled]
    python benchmarks/sparse_cache.py --model DIRECTORY --data train.parquet --held validation.parquet

Made-up teachers: word frequencies by Zipf's law, and a random linear map of a random context on top. The
`peaked` one is as sure as a language model (2.5 nats of entropy at 128,256 words, 43 % on its first word),
the `flat` one is not (6.7 nats, 14 %). The students are small nets, which start alike and see the same
contexts, each once, by what their cache holds of them, laid out for 128,256 words. Judged on fresh contexts
against the whole teacher; CE is that on words drawn from the teacher, in expectation: the KL and the
teacher's entropy.

A real teacher (`--model`, any local causal LM with its tokenizer) reads the column `text` of `--data`; the
students are Llamas of two layers from random weights, and read each row once. Judged on the texts of
`--held`; CE is that on their own next tokens. `--keep DIRECTORY` saves what the teacher reads for the next
call.

How near a student comes to its teacher decides: one that is still far from it gains by whatever shows more
words of each token (--steps 200), one that has little left to learn by what has no bias (the defaults).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from statistics import mean, stdev

import numpy as np
import torch
from side import Row, compare, parser
from text_teacher import Lesson, of_text, options
from torch import Tensor, nn

from llmkd.layout import Layout
from llmkd.losses import ce, kl
from llmkd.packing import pack, unpack
from llmkd.sparse import choose, sparse_kl

BATCH, WORDS = 64, 128_256
TEACHERS = {"peaked": 6.0, "flat": 2.0}  # nats by which a word's logit varies from context to context
WAYS: dict[str, tuple[str, Layout | None]] = {
    "online": ("online, all words", None),
    "topk": ("top 64 and tail, float32", Layout("topk", 64, WORDS, 32)),
    "short": ("top 19 and tail, 8 bits", Layout("topk", 19, WORDS)),
    "sampled": ("sampled, k = 21, 8 bits", Layout("sampled", 21, WORDS)),
    "wide": ("sampled, k = 42, 8 bits", Layout("sampled", 42, WORDS)),
}
SIZES = {"vocab": 8_000, "steps": 1200, "context": 16, "hidden": 32}
TOY = {"vocab": 200, "steps": 4, "context": 4, "hidden": 8}
Score = tuple[float, float]  # KL, CE


def main() -> None:
    found = parser(__doc__)
    for name in SIZES:
        found.add_argument(f"--{name}", type=int)
    found.add_argument("--seeds", type=int, help="as --rounds")
    found.add_argument("--first", type=int, default=1, help="the first seed")
    found.add_argument("--teachers", nargs="+", choices=TEACHERS, default=[*TEACHERS])
    found.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    options(found)
    asked = found.parse_args()
    if asked.model and not (asked.data and asked.held):
        found.error("--model reads texts; give --data and --held")
    for name, size in (TOY if asked.quick else SIZES).items():
        setattr(asked, name, getattr(asked, name) or size)
    torch.set_num_threads(asked.threads)
    compare(asked, partial(measured, asked))


def measured(asked: argparse.Namespace) -> list[Row]:
    seeds = range(asked.first, asked.first + (asked.seeds or asked.rounds))
    rows = []
    for name, lesson in lessons(asked).items():
        found = [trained(asked, lesson(seed), seed) for seed in seeds]
        report(asked, name, found)
        if {"sampled", "topk"} <= {*asked.ways}:
            rows.append(row(name, [(one["sampled"][0], one["topk"][0]) for one in found]))
    return rows


def lessons(asked: argparse.Namespace) -> dict[str, Callable[[int], Lesson]]:
    """By the teacher's name: what it teaches at a seed."""
    if asked.model:
        return {asked.model.name: of_text(asked)}
    print(f"{asked.vocab} words, {asked.steps} steps of {BATCH} tokens")
    print(f"a context of {asked.context} numbers, students of {asked.hidden} hidden units", flush=True)
    return {name: partial(made_up, asked, TEACHERS[name]) for name in asked.teachers}


def row(teacher: str, kls: list[tuple[float, float]]) -> Row:
    ours, theirs = (mean(one[i] for one in kls) for i in (0, 1))
    (name, layout), (other, whole) = WAYS["sampled"], WAYS["topk"]
    assert layout
    assert whole
    return Row(
        f"a student's KL, {teacher} teacher: {name}, {layout.token_bytes} bytes a token",
        f"{other}, {whole.token_bytes} bytes",
        [a / b for a, b in kls],
        "<= 1",
        f"{ours:.4f}",
        f"{theirs:.4f}",
    )


def report(asked: argparse.Namespace, teacher: str, found: list[dict[str, Score]]) -> None:
    print(f"{teacher:28}{'bytes a token':>14}{'KL':>9}{'s.e.':>9}{'CE':>9}{'s.e.':>9}  KL of each")
    for way in asked.ways:
        name, layout = WAYS[way]
        kls, ces = ([one[way][i] for one in found] for i in (0, 1))
        numbers = "".join(f"{number:9.4f}" for number in (*middle(kls), *middle(ces)))
        size = layout.token_bytes if layout else 4 * WORDS
        print(f"{name:28}{size:14d}{numbers}  {' '.join(f'{one:.4f}' for one in kls)}", flush=True)


def middle(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def made_up(asked: argparse.Namespace, spread: float, seed: int) -> Lesson:
    vocab = asked.vocab
    torch.manual_seed(seed)
    zipf = -torch.arange(1, vocab + 1).log()[torch.randperm(vocab)]  # (V,)
    table = torch.randn(vocab, asked.context) * (spread / asked.context**0.5)  # of the teacher
    start = nn.Sequential(nn.Linear(asked.context, asked.hidden), nn.GELU(), nn.Linear(asked.hidden, vocab))
    with torch.no_grad():
        start[2].weight.mul_(0.1)

    def said(context: Tensor) -> tuple[Tensor, Tensor]:
        return context, context @ table.T + zipf

    fresh = torch.randn(512, asked.context).split(BATCH)
    steps = (said(torch.randn(BATCH, asked.context)) for _ in range(asked.steps))
    return Lesson(start, 0.02, asked.steps, steps, map(said, fresh))


def trained(asked: argparse.Namespace, lesson: Lesson, seed: int) -> dict[str, Score]:
    """Validation KL and CE of one student a way."""
    learners = {way: Learner(lesson, WAYS[way][1], seed) for way in asked.ways}
    for context, wanted in lesson.steps:
        for learner in learners.values():
            learner.learn(context, wanted)
    return judged({way: learner.student for way, learner in learners.items()}, lesson)


class Learner:
    """A copy of the student, its optimizer, and the cache that it learns from; None: the teacher itself."""

    def __init__(self, lesson: Lesson, layout: Layout | None, seed: int) -> None:
        self.student, self.layout = deepcopy(lesson.start), layout
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=lesson.rate, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, lesson.count)
        self.random, self.fair = torch.Generator().manual_seed(seed), np.random.default_rng(seed)

    def learn(self, context: Tensor, wanted: Tensor) -> None:
        """One step; contexts, and the teacher's logits of them (n, V)."""
        said = self.student(context)  # (n, V)
        if self.layout is None:
            loss = kl(said, wanted)
        else:
            packed = pack(choose(wanted, self.layout, self.random), self.layout, self.fair)
            loss = sparse_kl(said, unpack(packed, self.layout))
        self.optimizer.zero_grad()
        loss.mean().backward()
        self.optimizer.step()
        self.schedule.step()


def judged(students: dict[str, nn.Module], lesson: Lesson) -> dict[str, Score]:
    found: dict[str, list[Tensor]] = {way: [] for way in students}  # (2, n): each token's KL and CE
    seen = 0
    with torch.no_grad():
        for context, wanted in lesson.fresh:
            part = slice(seen, seen := seen + len(wanted))
            for way, student in students.items():
                said = student(context)  # (n, V)
                soft = kl(said, wanted)
                hard = soft + entropy(wanted) if lesson.words is None else ce(said, lesson.words[part])
                found[way].append(torch.stack([soft, hard]))
    middles = {way: torch.cat(parts, 1).mean(1).tolist() for way, parts in found.items()}
    return {way: (soft, hard) for way, (soft, hard) in middles.items()}


def entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)  # (n, V)
    return -(log_p.exp() * log_p).sum(-1)


if __name__ == "__main__":
    main()
