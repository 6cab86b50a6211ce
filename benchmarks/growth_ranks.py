"""How a teacher's capture grows with ranks: its logits on all rows, its cache, the join to the rows.

    python benchmarks/growth_ranks.py [--count 2000] [--joined 200000] [--rounds 3]

1, 2 and 4 processes of one thread with gloo between them, as torchrun starts them (by the wall's clock no
more than there are cores), a small classifier whole on each. The join, which each rank does by itself, is of
--joined rows, so that it takes long enough. A ratio is what the slowest rank took, or the largest held, over
what one rank alone did: 1 is no growth. Each id must be written once whatever the ranks. With --clock cpu a
rank's own seconds. Memory is each process's peak over its imports (VmHWM, Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side import Row, clock, compare, in_turn, middle, parser, peak, ratios, reset_peak
from student import LABELS, TOY, classifier, examples, token_rows
from together import together

PLACE = "LLMKD_BENCHMARK_CACHE"
MANY = (1, 2, 4)
JOINS = 10  # their mean counts: one may meet Python's search for garbage, another not
STEPS = {"capture": "s", "join": "s", "mb": "MB"}


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--count", type=int, default=2000, help="rows")
    found.add_argument("--joined", type=int, default=200_000, help="rows")
    asked = found.parse_args()
    if asked.quick:
        asked.count, asked.joined, asked.rounds = 40, 400, 1
    torch.set_num_threads(asked.threads)
    if asked.way:
        return print(json.dumps(rank(asked, Path(os.environ[PLACE]))))
    compare(asked, lambda: measure(asked))


def measure(asked: argparse.Namespace) -> list[Row]:
    able = [many for many in MANY if asked.quick or asked.clock == "cpu" or many <= (os.cpu_count() or 1)]
    if left := MANY[len(able) :]:
        print(f"  {left[0]} ranks and more: left out, as there are {os.cpu_count()} cores")
    found = in_turn({str(many): lambda many=many: started(many) for many in able}, asked.rounds)
    rows = []
    for step, unit in STEPS.items():
        for many in able[1:]:
            sides = [f"{middle(found, str(one), step):.3g} {unit}" for one in (many, 1)]
            ids = f"ids written {middle(found, str(many), 'ids'):.0f}, {middle(found, '1', 'ids'):.0f}"
            each = ratios(found, str(many), "1", step)
            what = f"{step if unit == 's' else 'peak memory'}, {many} ranks: of the slowest or largest"
            rows.append(Row(what, "1 rank", each, "<= 1.1", *sides, ids))
    return rows


def started(many: int) -> dict[str, Any]:
    """What the slowest of `many` ranks took, and the ids in the cache they left."""
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as place:
        found = together("rank", many, {PLACE: place})
        ids = pq.read_table(Path(place) / "logits.parquet")["id"].to_pylist()
        assert len(set(ids)) == len(ids), "an id was written twice"
    return {**{step: max(one[step] for one in found) for step in STEPS}, "ids": float(len(ids))}


def rank(asked: argparse.Namespace, place: Path) -> dict[str, float]:
    """In one rank's process."""
    import pyarrow as pa

    from llmkd import crossfit, logits, ranks
    from llmkd.train import predict

    ranks.start()
    data = examples(token_rows(None, 256, TOY["vocab_size"], asked.count))
    model, rows = classifier(TOY, "fp32"), np.arange(asked.count)
    predict(model, data, rows[:8], 4096)  # every kernel once
    before, began = reset_peak(), clock(asked)
    found = predict(model, data, rows, 4096)
    if ranks.is_main():
        cached = {"in_sample": (list(data.ids), found)}
        logits.write(place / "logits.parquet", cached, teacher="one", labels=LABELS)
    captured = clock(asked) - began
    ids = [f"row{number}" for number in range(asked.joined)]
    if ranks.is_main():
        said = np.random.default_rng(0).normal(0, 1, (asked.joined, len(LABELS))).astype(np.float32)
        (place / "many").mkdir()
        logits.write(place / "many/logits.parquet", {"in_sample": (ids, said)}, teacher="one", labels=LABELS)
    table = pa.table({"id": ids, "part": ["train"] * asked.joined, "fold": [-1] * asked.joined})
    ranks.barrier()
    began, where = clock(asked), {"one": lambda _: place / "many"}
    for _ in range(JOINS):
        crossfit.teacher_logits(table, where, 0, count=1, view="in_sample", labels=LABELS)
    joined = (clock(asked) - began) / JOINS
    ranks.stop()
    return {"capture": captured, "join": joined, "mb": peak() - before}


if __name__ == "__main__":
    main()
