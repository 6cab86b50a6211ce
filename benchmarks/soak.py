"""make soak: all stages, killed with -9 at random moments and started again by the same command.

    python benchmarks/soak.py --kills 100 --config tests/tiny.yaml teachers.llama.epochs=4

Each time a run is whole it is compared with one that nothing disturbed, and the next one begins. Exit code
1 where anything differs. The moments are drawn from --seed.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gptqmodel  # noqa: F401  imported before the first fork
import lightgbm  # noqa: F401
import numpy as np
import optimum.gptq  # noqa: F401
import peft  # noqa: F401
import pyarrow.parquet as pq

import llmkd.train  # noqa: F401
from llmkd.verify import verify_run

ROOT = Path(__file__).parent.parent
STAGES = ("00_prepare", "01_pretrain", "02_teachers", "03_distill", "04_merge", "05_quantize", "06_evaluate")
CLOCK = ("second", "latency", "time")  # figures that are of the machine, and differ from run to run


def start(config: str, run: Path, overrides: list[str], log: Path) -> int:
    """A process of its own for all stages, forked from this one, which has imported the libraries: so that
    kills meet the work and not the imports. Returns its id."""
    process = os.fork()
    if process:
        return process
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 1
    try:
        for stage in STAGES:
            sys.argv = [f"stages/{stage}.py", "--config", config, f"run={run}", *overrides]
            runpy.run_path(str(ROOT / "stages" / f"{stage}.py"), run_name="__main__")
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


def wait(process: int, seconds: float | None) -> int:
    """The exit code; of a process that was killed because it ran longer, -9."""
    until = time.monotonic() + (seconds if seconds is not None else float("inf"))
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def disturbed(
    args: argparse.Namespace, run: Path, moments: random.Random, left: int
) -> tuple[list[float], Counter[str]]:
    """One run to its end, killed at most `left` times. Returns the seconds each attempt lasted, and the
    stages that the kills met."""
    spent, met = list[float](), Counter[str]()
    while True:
        began = time.monotonic()
        process = start(args.config, run, args.overrides, args.directory / "log.txt")
        code = wait(process, moments.uniform(0, args.longest) if len(spent) < left else None)
        spent.append(time.monotonic() - began)
        if code == 0:
            return spent, met
        if code != -signal.SIGKILL:
            sys.exit(f"a restart ended with code {code}; see {args.directory / 'log.txt'}")
        begun = [stage for stage in STAGES if any(run.glob(f"{stage}*"))]
        met[begun[-1] if begun else STAGES[0]] += 1


def differences(one: Path, two: Path) -> list[str]:
    """What a run differs in from another: caches, figures, files that are left over or not whole."""
    found = [*verify_run(two), *leftovers(two)]
    for path in sorted(one.rglob("logits.parquet")):
        found += cache_differences(path, two / path.relative_to(one))
    metrics = [json.loads((run / "06_evaluate" / "metrics.json").read_text()) for run in (one, two)]
    return found + list(figure_differences(*metrics))


def leftovers(run: Path) -> list[str]:
    return [
        f"{path} is left over" for kind in ("*.partial", "*.lock", "checkpoint") for path in run.rglob(kind)
    ]


def cache_differences(one: Path, two: Path) -> list[str]:
    tables = [pq.read_table(path) for path in (one, two)]
    keys = [list(zip(t["view"].to_pylist(), t["id"].to_pylist(), strict=True)) for t in tables]
    if len(set(keys[1])) != len(keys[1]) or set(keys[0]) != set(keys[1]):
        return [f"{two}: not every id exactly once"]
    logits = [dict(zip(k, t["logits"].to_pylist(), strict=True)) for k, t in zip(keys, tables, strict=True)]
    apart = max(np.abs(np.subtract(logits[0][key], logits[1][key])).max() for key in logits[0])
    return [f"{two}: logits differ by up to {apart:.3g}"] if apart else []


def figure_differences(one: Any, two: Any, where: str = "metrics.json") -> Any:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted(one.keys() | two.keys()):
            if not any(word in key for word in CLOCK):
                yield from figure_differences(one.get(key), two.get(key), f"{where} {key}")
    elif one != two:
        yield f"{where}: {one} and {two}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--config", default="tests/tiny.yaml")
    parser.add_argument("--directory", type=Path, default=Path("runs/soak"))
    parser.add_argument("--longest", type=float, default=10, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    args.directory = args.directory.resolve()
    shutil.rmtree(args.directory, ignore_errors=True)
    args.directory.mkdir(parents=True)
    os.chdir(ROOT)
    moments = random.Random(args.seed)
    reference = args.directory / "undisturbed"
    (whole,), _ = disturbed(args, reference, moments, 0)
    print(f"undisturbed: {whole:.0f} s", flush=True)
    kills, lost, found, stages = 0, 0.0, 0, Counter[str]()
    while kills < args.kills:
        run = args.directory / "killed"
        shutil.rmtree(run, ignore_errors=True)
        spent, met = disturbed(args, run, moments, args.kills - kills)
        stages += met
        kills, lost = kills + len(spent) - 1, lost + sum(spent) - whole
        apart = differences(reference, run)
        found += len(apart)
        print(*apart, f"{kills} kills, {len(apart)} differences", sep="\n", flush=True)
    print(f"{kills} kills, {lost / kills:.1f} s lost per kill (starting again included), {found} differences")
    print(*(f"{count} in {stage}" for stage, count in sorted(stages.items())), sep=", ")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
