"""How time and memory grow with rows, teachers and folds: linearly, or better.

    python benchmarks/growth.py [--base 3000] [--rounds 3]

Preparing labelled pairs (checks, groups, folds, swapped copies), writing a teacher's logits, joining all
teachers' logits to the rows, cutting an epoch into batches; each at 1, 10 and 100 times --base pairs, with
1 to 8 teachers and 1 to 10 folds. A ratio is cost over size, both against the smallest: 1 is linear, less
is better. Each point is a process of its own; memory is its peak over what it held before (VmHWM, Linux).
What ends within half a second is done again until that has passed, and the mean counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from side import Found, Row, alone, clock, compare, in_turn, middle, parser, peak, reset_peak

LABELS = ["a", "b", "tie"]
STEPS = ("prepare", "write", "join", "batches")
FIELDS = ("prompt", "response_a", "response_b")
ENOUGH = 0.5  # seconds


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--base", type=int, default=3000, help="pairs at size 1")
    asked = found.parse_args()
    if asked.quick:
        asked.base, asked.rounds = 20, 1
    if asked.way:
        return print(json.dumps(point(asked, *map(int, asked.way.split(",")))))
    compare(asked, lambda: measure(asked))


def measure(asked: argparse.Namespace) -> list[Row]:
    times, teachers, folds = [1, 10, 100], [1, 2, 4, 8], [1, 5, 10]
    points = [(size, 2, 5) for size in times]
    points += [(10, count, 5) for count in teachers] + [(10, 2, count) for count in folds]
    found = in_turn({way(*one): alone(way(*one)) for one in dict.fromkeys(points)}, asked.rounds)
    rows = []
    for step in STEPS:
        for name, unit in ((step, "s"), (f"{step}_mb", "MB")):
            pairs = [((100, 2, 5), (1, 2, 5), 100, "rows")]
            pairs += [((10, 8, 5), (10, 1, 5), 8, "teachers")] * (step in ("write", "join"))
            pairs += [((10, 2, 10), (10, 2, 5), 2, "folds")] * (step != "batches")
            rows += [row(found, name, unit, step, *pair) for pair in pairs]
    return rows


def way(size: int, teachers: int, folds: int) -> str:
    return f"{size},{teachers},{folds}"


def row(found: Found, name: str, unit: str, step: str, large: Any, small: Any, times: int, what: str) -> Row:
    pairs = zip(found[way(*large)], found[way(*small)], strict=True)
    # memory is counted in pages, and a small size may add none
    each = [max(a[name], 1e-6) / max(b[name], 1.0 if unit == "MB" else 1e-6) / times for a, b in pairs]
    sides = [f"{middle(found, way(*one), name):.3g} {unit}" for one in (large, small)]
    title = f"{step}, {times} x the {what}: {'time' if unit == 's' else 'memory'} / {times}"
    return Row(title, f"1 x the {what}", each, "<= 1.1", *sides)


def point(asked: argparse.Namespace, size: int, teachers: int, folds: int) -> dict[str, float]:
    from llmkd import crossfit, rows
    from llmkd.batches import epoch_steps

    raw = pairs(asked.base * size)
    found: dict[str, float] = {}

    def timed(name: str, work: Any) -> Any:
        before, began = reset_peak(), clock(asked)
        spent, times = 0.0, 0
        while times == 0 or (spent < ENOUGH and not asked.quick):
            result, times = work(), times + 1
            spent = clock(asked) - began
        found[name], found[f"{name}_mb"] = spent / times, peak() - before
        return result

    def prepared(raw: Any) -> Any:
        table, _ = rows.canonical(
            raw, part="train", kind="preference", columns={name: name for name in FIELDS}, label="label",
            labels=LABELS,
        )  # fmt: skip
        return rows.prepare(table, None, kind="preference", swap=True, group="prompt", folds=folds, seed=1)[0]

    prepared(pairs(100))  # every import once
    table = timed("prepare", lambda: prepared(raw))
    ids = table["id"].to_pylist()
    said = np.random.default_rng(0).normal(0, 1, (len(ids), len(LABELS))).astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        timed("write", lambda: write(Path(place), table, said, teachers, folds))
        names = {str(t): lambda fold, t=t: Path(place) / f"{t}-{fold}" for t in range(teachers)}
        view = "oof" if folds > 1 else "in_sample"
        timed("join", lambda: crossfit.teacher_logits(table, names, 0, count=folds, view=view, labels=LABELS))
    lengths = np.random.default_rng(0).integers(10, 1000, len(ids))
    timed("batches", lambda: epoch_steps(np.arange(len(ids)), lengths, 64, 4096, 1, 0))
    return found


def write(place: Path, table: Any, said: Any, teachers: int, folds: int) -> None:
    from llmkd import crossfit, logits

    ids = table["id"].to_pylist()
    for teacher in range(teachers):
        for fold in range(folds):
            views = {name: at for name, at in crossfit.view_rows(table, fold, folds).items() if len(at)}
            directory = place / f"{teacher}-{fold}"
            directory.mkdir(exist_ok=True)
            cached = {view: ([ids[row] for row in at], said[at]) for view, at in views.items()}
            logits.write(directory / "logits.parquet", cached, teacher=str(teacher), labels=LABELS)


def pairs(count: int) -> Any:
    """Raw labelled pairs of some 100 words."""
    import pyarrow as pa

    random = np.random.default_rng(0)
    words = [" ".join(f"w{i}" for i in random.integers(0, 5000, 30)) for _ in range(200)]
    drawn = {name: random.integers(0, len(words), count) for name in FIELDS}
    made = {name: [f"{words[i]} {n}" for n, i in enumerate(at)] for name, at in drawn.items()}
    return pa.table({**made, "label": [LABELS[i] for i in random.integers(0, 3, count)]})


if __name__ == "__main__":
    main()
