"""What a run spends outside its models: imports, configuration, hashes, set-up, writing.

    python benchmarks/overhead.py [--config configs/demo.yaml] [--rounds 1] [--apart]

`llmkd run` in a fresh directory, as a user starts it, then once more over the finished run. Model compute is
the time in training steps, clipping and optimizer, inference and GPTQ; overhead is the rest, from the start
of the command to its end. --apart: each stage by itself, as `make evaluate` runs them. The goals: 5 % of a
run of ten minutes, which is 30 s, and 45 s for the demo's seven stages. --clock cpu: the processes' own
seconds. --set distill.epochs=0.2 and the like leaves out compute, which hardly changes what else there is.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from side import Row, compare, parser

ROOT = Path(__file__).parent.parent
STAGES = ("00_prepare", "01_pretrain", "02_teachers", "03_distill", "04_merge", "05_quantize", "06_evaluate")
RUN, TOLD = "llmkd run", '{"told"'
spent: Counter[str] = Counter()  # seconds by what they went into
depth: list[str] = []
starts: list[float] = []  # of this process, or of the stage that it is
now = time.perf_counter


def main() -> None:
    found = parser(__doc__, rounds=1)
    found.add_argument("--config", default="configs/demo.yaml")
    found.add_argument("--apart", action="store_true", help="each stage in a process that imports anew")
    found.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of the config")
    asked = found.parse_args()
    if asked.quick:
        asked.config, asked.set = "tests/tiny.yaml", []  # its overrides are of the demo
    os.chdir(ROOT)
    if asked.way:
        name, run = asked.way.split(",")
        return whole(asked, run) if name == RUN else stage(asked, name, run)
    compare(asked, lambda: measure(asked))


def measure(asked: argparse.Namespace) -> list[Row]:
    rows: dict[str, list[float]] = {"fresh": [], "finished": []}
    walls = []
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as run:
            for kind, sums in rows.items():
                print(f"  {kind} run{'':20}{asked.clock:>8}{'overhead':>10}{'first step':>12}  of it")
                parts = [child(asked, name, run) for name in (STAGES if asked.apart else [RUN])]
                sums.append(sum(part["wall"] - part.get("compute", 0) for part in parts))
                walls += [sum(part["wall"] for part in parts)] * (kind == "fresh")
    note = f"{'stage by stage' if asked.apart else 'llmkd run'}, compute included: {walls[0]:.0f} s"
    goals = {"fresh": [("5 % of ten minutes", 30), ("45 s, seven stages", 45)], "finished": [("45 s", 45)]}
    return [
        Row(f"overhead of a {kind} run", name, [s / goal for s in rows[kind]], "<= 1",
            f"{rows[kind][0]:.1f} s", f"{goal} s", note)
        for kind, asks in goals.items() for name, goal in asks
    ]  # fmt: skip


def child(asked: argparse.Namespace, name: str, run: str) -> dict[str, float]:
    """A stage, or all by `llmkd run`, in a process of its own: its seconds by what they went into."""
    command = [sys.executable, str(Path(__file__).resolve()), "--config", asked.config]
    command += ["--clock", asked.clock, "--way", f"{name},{run}", "--set", *asked.set]
    began = seconds_of_children(asked)
    done = subprocess.run(command, capture_output=True, text=True)
    wall = seconds_of_children(asked) - began
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(TOLD)]
    if name == RUN:
        for part in told[:-1]:
            show(part["told"], part)
    parts = {**told[-1], "wall": wall}
    if name == RUN:
        show("before and between them", {**parts, "wall": wall - sum(part["wall"] for part in told[:-1])})
        parts["compute"] = sum(part.get("compute", 0) for part in told[:-1])
    show(name, parts)
    return parts


def show(name: str, parts: dict[str, float]) -> None:
    over = parts["wall"] - parts.get("compute", 0)
    rest = over - sum(parts.get(part, 0) for part in ("imports", "config", "hashes"))
    of_it = ", ".join(f"{part} {parts.get(part, 0):.1f}" for part in ("imports", "config", "hashes"))
    first = f"{parts['first step']:.1f}" if "first step" in parts else "-"
    print(f"  {name:29}{parts['wall']:8.1f}{over:10.1f}{first:>12}  {of_it}, rest {rest:.1f}", flush=True)


def seconds_of_children(asked: argparse.Namespace) -> float:
    """Of the wall, or what the processes that have ended worked."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime if asked.clock == "cpu" else time.perf_counter()


def stage(asked: argparse.Namespace, name: str, run: str) -> None:
    """In a process of its own: run a stage with clocks around its parts, and print them."""
    import runpy

    began = put_clocks(asked)
    sys.argv = [f"stages/{name}.py", "--config", asked.config, f"run={run}", *asked.set]
    try:
        runpy.run_path(f"stages/{name}.py", run_name="__main__")
    finally:
        tell(name, began)


def whole(asked: argparse.Namespace, run: str) -> None:
    """In a process of its own: `llmkd run`, whose stages, its forks, have the clocks from it."""
    began = put_clocks(asked)
    from llmkd import cli
    from llmkd.cli import forks

    if not forks.possible():
        sys.exit("stages are no forks on this machine; measure with --apart")
    run_stage, ready = forks._run, forks.ready

    def surely(modules: Sequence[str]) -> bool:
        return ready(modules) or sys.exit("a stage would be no fork, and tell nothing; measure with --apart")

    def clocked_stage(command: Sequence[str]) -> int:
        spent.clear()
        starts.append(now())
        code = run_stage(command)
        tell(Path(command[0]).stem, starts[-1])
        return code

    forks._run, forks.ready = clocked_stage, surely
    cli.main(["run", "--config", asked.config, f"run={run}", *asked.set])
    tell(RUN, began)


def put_clocks(asked: argparse.Namespace) -> float:
    global now
    now = time.process_time if asked.clock == "cpu" else time.perf_counter
    starts.append(now())
    builtins.__import__ = clocked("imports", builtins.__import__)
    sys.path.insert(0, str(ROOT))
    import llmkd.libraries
    import llmkd.run
    import llmkd.stage

    llmkd.libraries.import_module = clocked("imports", llmkd.libraries.import_module)  # type: ignore[attr-defined]
    llmkd.stage.load = clocked("config", llmkd.stage.load)  # type: ignore[attr-defined]
    for one in ("digest", "source_digest", "checkpoint_digest"):
        setattr(llmkd.run, one, clocked("hashes", getattr(llmkd.run, one)))
    hook()
    return starts[-1]


def tell(name: str, began: float) -> None:
    print(json.dumps({"told": name, **spent, "wall": now() - began}), flush=True)


def hook() -> None:
    """Clocks on what computes, put in where a stage imports it."""
    original = builtins.__import__

    def importing(name: str, *args: Any, **more: Any) -> Any:
        found = original(name, *args, **more)
        steps, train, quantize = (sys.modules.get(f"llmkd.{one}") for one in ("steps", "train", "quantize"))
        trainer: Any = getattr(steps, "StepTrainer", None)
        if trainer and "steps" not in done:
            done.add("steps")
            optimizer = sys.modules["accelerate.optimizer"].AcceleratedOptimizer
            step = clocked("compute", trainer.training_step)
            for owner, method in ((trainer, "_clip_grad_norm"), (optimizer, "step")):
                setattr(owner, method, clocked("compute", getattr(owner, method)))

            def first(*args: Any, **more: Any) -> Any:
                spent.setdefault("first step", now() - starts[-1])
                return step(*args, **more)

            trainer.training_step = first
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
