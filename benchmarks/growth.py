"""How time and memory grow with rows, teachers and folds: linearly, or better.

    python benchmarks/growth.py [--base 3000] [--rounds 3]

Preparing labelled pairs as stage 00 does (a Parquet file read, checks, groups, folds, swapped copies,
rows.parquet written), writing a teacher's logits, joining all teachers' logits to the rows, cutting an epoch
into batches; each at 1, 10 and 100 times --base pairs, with 1 to 8 teachers and 1 to 10 folds. A ratio is
cost over size, both against the smallest: 1 is linear, less is better. Each point is a process of its own;
memory is the peak over what it held before of what is no disk's (RssAnon and RssShmem, looked at every
20 ms, Linux): texts lie in mapped files, whose pages the kernel takes back when it wants them. Against the
rows, the bytes that each further pair takes are told too.
What ends within half a second is done again until that has passed, and the mean counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from side import Found, Row, alone, clock, compare, in_turn, middle, parser

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
    return Row(title, f"1 x the {what}", each, "<= 1.1", *sides, note(found, name, large, small))


def note(found: Found, name: str, large: Any, small: Any) -> str:
    """Of memory over rows: what a further pair takes."""
    more = middle(found, way(*large), "pairs") - middle(found, way(*small), "pairs")
    if not name.endswith("_mb") or not more:
        return ""
    grown = middle(found, way(*large), name) - middle(found, way(*small), name)
    return f"{grown * 2**20 / more:.0f} bytes a pair more"


def point(asked: argparse.Namespace, size: int, teachers: int, folds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as place:
        return measured(asked, Path(place), asked.base * size, teachers, folds)


def measured(
    asked: argparse.Namespace, place: Path, count: int, teachers: int, folds: int
) -> dict[str, float]:
    from llmkd import crossfit
    from llmkd.batches import epoch_steps

    found = {"pairs": float(count)}

    def timed(name: str, work: Any) -> Any:
        held, began = list[float](), clock(asked)
        spent, times = 0.0, 0
        while times == 0 or (spent < ENOUGH and not asked.quick):
            result, times = anonymous(work, held), times + 1
            spent = clock(asked) - began
        found[name], found[f"{name}_mb"] = spent / times, max(held)
        return result

    prepared(raw(place / "few.parquet", 100), folds)  # every import once
    source = raw(place / "raw.parquet", count)
    table = timed("prepare", lambda: prepared(source, folds))
    said = np.random.default_rng(0).normal(0, 1, (len(table), len(LABELS))).astype(np.float32)
    timed("write", lambda: write(place, table, said, teachers, folds))
    names = {str(t): lambda fold, t=t: place / f"{t}-{fold}" for t in range(teachers)}
    view = "oof" if folds > 1 else "in_sample"
    timed("join", lambda: crossfit.teacher_logits(table, names, 0, count=folds, view=view, labels=LABELS))
    lengths = np.random.default_rng(0).integers(10, 1000, len(table))
    timed("batches", lambda: epoch_steps(np.arange(len(table)), lengths, 64, 4096, 1, 0))
    return found


def write(place: Path, table: Any, said: Any, teachers: int, folds: int) -> None:
    from llmkd import crossfit
    from llmkd.ids import Ids

    for teacher in range(teachers):
        for fold in range(folds):
            views = {name: at for name, at in crossfit.view_rows(table, fold, folds).items() if len(at)}
            directory = place / f"{teacher}-{fold}"
            directory.mkdir(exist_ok=True)
            found = {view: said[at] for view, at in views.items()}
            crossfit.write_views(directory, Ids(table["id"]), views, found, str(teacher), LABELS)


def prepared(source: Path, folds: int) -> Any:
    """As stage 00 does, from a file to a file."""
    from llmkd import mapped, rows

    table, _ = rows.canonical(rows.read(str(source)), part="train", kind="preference", labels=LABELS)
    table, _ = rows.prepare(table, None, kind="preference", swap=True, group="prompt", folds=folds, seed=1)
    mapped.write(table, source.with_name("rows.parquet"))
    return table


def anonymous(work: Callable[[], Any], held: list[float]) -> Any:
    """What `work` gives; its peak of memory that is no disk's goes to `held`, MB over what there was."""
    pa.default_memory_pool().release_unused()  # else what an earlier step left there is used again
    before, peaks, done = anonymous_now(), [0.0], threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            peaks[0] = max(peaks[0], anonymous_now())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        return work()
    finally:
        done.set()
        watcher.join()
        held.append(max(peaks[0], anonymous_now()) - before)


def anonymous_now() -> float:
    """MB that cannot be dropped and read again: a temporary directory in memory counts too (RssShmem)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


def raw(path: Path, count: int, some: int = 1000) -> Path:
    """Raw labelled pairs of some 100 words, a few at a time: what making them took must not be had again."""
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    words = [" ".join(f"w{i}" for i in random.integers(0, 5000, 30)) for _ in range(200)]
    schema = pa.schema({**dict.fromkeys(FIELDS, pa.string()), "label": pa.string()})
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, count, some):
            numbers = range(start, min(start + some, count))
            drawn = {name: random.integers(0, len(words), len(numbers)) for name in FIELDS}
            made = {
                name: [f"{words[i]} {n}" for n, i in zip(numbers, at, strict=True)]
                for name, at in drawn.items()
            }
            labels = [LABELS[i] for i in random.integers(0, 3, len(numbers))]
            file.write_table(pa.table({**made, "label": labels}, schema=schema))
    pa.default_memory_pool().release_unused()
    return path


if __name__ == "__main__":
    main()
