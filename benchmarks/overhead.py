"""What a run's stages spend outside their models: imports, configuration, hashes, set-up, writing.

    python benchmarks/overhead.py [--config configs/demo.yaml] [--rounds 1]

Runs all seven stages in a fresh directory, each in a process of its own, as `make evaluate` does, then once
more over the finished run. A stage's model compute is the time in training steps, optimizer, inference and
GPTQ; overhead is the rest of its time, from the start of the process to its end. The goals: 5 % of a run of
ten minutes, which is 30 s, and 45 s for the demo's seven stages. --clock cpu: the stages' own seconds.
--set distill.epochs=0.2 and the like leaves out compute, which hardly changes what else there is.
"""

from __future__ import annotations

import argparse
import builtins
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side import Row, compare, parser

ROOT = Path(__file__).parent.parent
STAGES = ("00_prepare", "01_pretrain", "02_teachers", "03_distill", "04_merge", "05_quantize", "06_evaluate")
spent: Counter[str] = Counter()  # seconds by what they went into
depth: list[str] = []
now = time.perf_counter


def main() -> None:
    found = parser(__doc__, rounds=1)
    found.add_argument("--config", default="configs/demo.yaml")
    found.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of the config")
    asked = found.parse_args()
    if asked.quick:
        asked.config = "tests/tiny.yaml"
    os.chdir(ROOT)
    if asked.way:
        return stage(asked, *asked.way.split(","))
    compare(asked, lambda: measure(asked))


def measure(asked: argparse.Namespace) -> list[Row]:
    rows: dict[str, list[float]] = {"fresh": [], "finished": []}
    walls = []
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as run:
            for kind, sums in rows.items():
                print(f"  {kind} run{'':20}{asked.clock:>8}{'overhead':>10}{'first step':>12}  of it")
                parts = [child(asked, name, run) for name in STAGES]
                sums.append(sum(part["wall"] - part.get("compute", 0) for part in parts))
                walls += [sum(part["wall"] for part in parts)] * (kind == "fresh")
    note = f"the stages one after the other: {walls[0]:.0f} s"
    goals = {"fresh": [("5 % of ten minutes", 30), ("45 s, seven stages", 45)], "finished": [("45 s", 45)]}
    return [
        Row(f"overhead of a {kind} run", name, [s / goal for s in rows[kind]], "<= 1",
            f"{rows[kind][0]:.1f} s", f"{goal} s", note)
        for kind, asks in goals.items() for name, goal in asks
    ]  # fmt: skip


def child(asked: argparse.Namespace, name: str, run: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--config", asked.config]
    command += ["--clock", asked.clock, "--way", f"{name},{run}", "--set", *asked.set]
    began = seconds_of_children(asked)
    done = subprocess.run(command, capture_output=True, text=True)
    wall = seconds_of_children(asked) - began
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    parts = {**json.loads(done.stdout.splitlines()[-1]), "wall": wall}
    over = wall - parts.get("compute", 0)
    rest = over - sum(parts.get(part, 0) for part in ("imports", "config", "hashes"))
    of_it = ", ".join(f"{part} {parts.get(part, 0):.1f}" for part in ("imports", "config", "hashes"))
    first = f"{parts['first step']:.1f}" if "first step" in parts else "-"
    print(f"  {name:29}{wall:8.1f}{over:10.1f}{first:>12}  {of_it}, rest {rest:.1f}", flush=True)
    return parts


def seconds_of_children(asked: argparse.Namespace) -> float:
    """Of the wall, or what the processes that have ended worked."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime if asked.clock == "cpu" else time.perf_counter()


def stage(asked: argparse.Namespace, name: str, run: str) -> None:
    """In a process of its own: run a stage with clocks around its parts, and print them."""
    import runpy

    global now
    now = time.process_time if asked.clock == "cpu" else time.perf_counter
    began = now()
    builtins.__import__ = clocked("imports", builtins.__import__)
    sys.path.insert(0, str(ROOT))
    import llmkd.run
    import llmkd.stage

    llmkd.stage.load = clocked("config", llmkd.stage.load)  # type: ignore[attr-defined]
    for one in ("digest", "source_digest", "checkpoint_digest"):
        setattr(llmkd.run, one, clocked("hashes", getattr(llmkd.run, one)))
    hook(began)
    sys.argv = [f"stages/{name}.py", "--config", asked.config, f"run={run}", *asked.set]
    try:
        runpy.run_path(f"stages/{name}.py", run_name="__main__")
    finally:
        print(json.dumps(spent))


def hook(began: float) -> None:
    """Clocks on what computes, put in where a stage imports it."""
    original = builtins.__import__

    def importing(name: str, *args: Any, **more: Any) -> Any:
        found = original(name, *args, **more)
        steps, train, quantize = (sys.modules.get(f"llmkd.{one}") for one in ("steps", "train", "quantize"))
        if hasattr(steps, "StepTrainer") and "steps" not in done:
            done.add("steps")
            step = clocked("compute", steps.StepTrainer.training_step)  # type: ignore[union-attr]

            def first(*args: Any, **more: Any) -> Any:
                spent.setdefault("first step", now() - began)
                return step(*args, **more)

            steps.StepTrainer.training_step = first  # type: ignore[union-attr]
        for module, function in ((train, "predict"), (quantize, "quantize_gptq")):
            if hasattr(module, function) and function not in done:
                done.add(function)
                setattr(module, function, clocked("compute", getattr(module, function)))
        return found

    done: set[str] = set()
    builtins.__import__ = importing


def clocked(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Seconds in the outermost call of any clocked function go to it."""

    def timed(*args: Any, **more: Any) -> Any:
        if depth:
            return function(*args, **more)
        depth.append(what)
        began = now()
        try:
            return function(*args, **more)
        finally:
            depth.pop()
            spent[what] += now() - began

    return timed


if __name__ == "__main__":
    main()
