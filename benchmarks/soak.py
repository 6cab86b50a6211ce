"""make soak: all stages, killed with -9 at random moments and started again by the same command.

    python benchmarks/soak.py --kills 100
    python benchmarks/soak.py --kills 14 --ranks 2 --spread --config tests/tiny.yaml distill.epochs=4

Each time a run is whole it is compared with one that nothing disturbed, and the next one begins: bit by bit,
or to 1e-6 with several ranks, which a kill meets all at once. Exit code 1 where anything differs. The moments
are drawn from --seed: seconds after a start, or with --spread a moment of each stage in turn, so that short
ones are met as often as long ones. Trainings are saved every --save seconds.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gptqmodel  # noqa: F401  imported before the first fork
import lightgbm  # noqa: F401
import numpy as np
import optimum.gptq  # noqa: F401
import peft  # noqa: F401
import pyarrow.parquet as pq

import llmkd.train  # noqa: F401
from llmkd.config import load
from llmkd.verify import verify_run

ROOT = Path(__file__).parent.parent
STAGES = ("00_prepare", "01_pretrain", "02_teachers", "03_distill", "04_merge", "05_quantize", "06_evaluate")
BEGUN = "begun.txt"  # which stages an attempt has come to, and when
NONE: dict[str, float] = {}
CLOCK = ("second", "latency", "time")  # figures that are of the machine, and differ from run to run


def start(args: argparse.Namespace, run: Path) -> tuple[int, int]:
    """A process group of its own for all stages, forked from this process, which has imported the libraries,
    so that kills meet the work and not the imports. Returns its id, and a pipe that ends with its last one.
    """
    ends, held = os.pipe()
    process = os.fork()
    if process:
        os.close(held)
        os.setpgid(process, process)  # here and there: whichever comes first
        return process, ends
    os.setpgid(0, 0)
    handle = os.open(args.directory / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    for name in STAGES:
        with (args.directory / BEGUN).open("a") as file:
            print(name, time.monotonic(), file=file)
        argv = [f"stages/{name}.py", "--config", args.config, f"run={run}", *args.overrides]
        if code := stage(argv) if args.ranks == 1 else launched(argv, args.ranks):
            os._exit(code)
    os._exit(0)


def stage(argv: list[str]) -> int:
    """One stage in this process. Returns its exit code."""
    sys.argv = argv
    try:
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def launched(argv: list[str], world: int) -> int:
    """One stage in `world` processes, as torchrun starts them. Returns the first exit code that is not 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(world):
        if os.fork():
            continue
        os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world}")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
        code = stage(argv)
        sys.stdout.flush()
        os._exit(code)
    codes = (os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(world))
    return next((code for code in codes if code), 0)  # at once: `wait` ends the ranks that are left


def begun(args: argparse.Namespace) -> dict[str, float]:
    """When each stage of this attempt began, on the clock of `time.monotonic`."""
    path = args.directory / BEGUN
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: float(when) for name, when in (line.split() for line in lines)}


def wait(process: int, ends: int, seconds: float, ready: Callable[[], bool]) -> int:
    """The exit code of a process group; of one that was killed because it ran for longer once `ready`, -9."""
    until = float("inf")
    done, status = 0, 0
    while not done and time.monotonic() < until:
        if until == float("inf") and ready():
            until = time.monotonic() + seconds
        time.sleep(0.005)
        done, status = os.waitpid(process, os.WNOHANG)
    with suppress(ProcessLookupError):  # all of it, also the ranks that a failed one left waiting
        os.killpg(process, signal.SIGKILL)
    if not done:
        _, status = os.waitpid(process, 0)
    os.read(ends, 1)  # nothing is ever written: it ends when the last process has
    os.close(ends)
    return os.waitstatus_to_exitcode(status)


def disturbed(
    args: argparse.Namespace, run: Path, moments: random.Random, left: int, lasts: dict[str, float] = NONE
) -> tuple[list[float], Counter[str]]:
    """One run to its end, killed at most `left` times. Returns the seconds each attempt lasted, and the
    stages that the kills met. lasts: how long each stage is, for --spread."""
    spent, met = list[float](), Counter[str]()
    while True:
        (args.directory / BEGUN).unlink(missing_ok=True)
        after = [*STAGES, "none"][min(len(spent), len(STAGES))] if args.spread else STAGES[0]
        longest = lasts[after] if args.spread and after in lasts else args.longest
        began = time.monotonic()
        seconds = moments.uniform(0, longest) if len(spent) < left else float("inf")
        code = wait(*start(args, run), seconds, lambda after=after: after in begun(args))
        spent.append(time.monotonic() - began)
        if code == 0:
            return spent, met
        if code != -signal.SIGKILL:
            sys.exit(f"a restart ended with code {code}; see {args.directory / 'log.txt'}")
        met[[STAGES[0], *begun(args)][-1]] += 1


def differences(one: Path, two: Path, within: float) -> list[str]:
    """What a run differs in from another: caches, figures, files that are left over or not whole."""
    found = [*verify_run(two), *leftovers(two)]
    for path in sorted(one.glob("0[23]_*/**/logits.parquet")):
        found += cache_differences(path, two / path.relative_to(one), within)
    metrics = [json.loads((run / "06_evaluate" / "metrics.json").read_text()) for run in (one, two)]
    return found + list(figure_differences(*metrics, within))


def leftovers(run: Path) -> list[str]:
    return [
        f"{path} is left over" for kind in ("*.partial", "*.lock", "checkpoint") for path in run.rglob(kind)
    ]


def cache_differences(one: Path, two: Path, within: float) -> list[str]:
    tables = [pq.read_table(path) for path in (one, two)]
    keys = [list(zip(t["view"].to_pylist(), t["id"].to_pylist(), strict=True)) for t in tables]
    if len(set(keys[1])) != len(keys[1]) or set(keys[0]) != set(keys[1]):
        return [f"{two}: not every id exactly once"]
    logits = [dict(zip(k, t["logits"].to_pylist(), strict=True)) for k, t in zip(keys, tables, strict=True)]
    apart = max(np.abs(np.subtract(logits[0][key], logits[1][key])).max() for key in logits[0])
    return [f"{two}: logits differ by up to {apart:.3g}"] if apart > within else []


def figure_differences(one: Any, two: Any, within: float, where: str = "metrics.json") -> Any:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted(one.keys() | two.keys()):
            if not any(word in key for word in CLOCK):
                yield from figure_differences(one.get(key), two.get(key), within, f"{where} {key}")
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for place, pair in enumerate(zip(one, two, strict=True)):
            yield from figure_differences(*pair, within, f"{where} {place}")
    elif one != two and not (isinstance(one, float) and isinstance(two, float) and abs(one - two) <= within):
        yield f"{where}: {one} and {two}"


def saved(args: argparse.Namespace) -> list[str]:
    """Overrides: every training of the config is saved so often; teachers that are files have none."""
    config = load(args.config, args.overrides)
    places = [f"pretrain.{place}" for place in range(len(config.pretrain))]
    trained = [one.name for one in config.teachers if hasattr(one, "checkpoint_minutes")]
    places += [*(f"teachers.{name}" for name in trained), "distill"]
    return [f"{place}.checkpoint_minutes={args.save / 60:.4f}" for place in places]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1, help="processes a stage, over gloo")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--directory", type=Path, default=Path("runs/soak"))
    parser.add_argument("--longest", type=float, default=12, help="seconds until a kill, at most")
    parser.add_argument("--spread", action="store_true", help="one a stage, whatever it lasts")
    parser.add_argument("--save", type=float, default=1, help="seconds between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    args.overrides = [*saved(args), *args.overrides]
    args.directory = args.directory.resolve()
    shutil.rmtree(args.directory, ignore_errors=True)
    args.directory.mkdir(parents=True)
    os.chdir(ROOT)
    moments = random.Random(args.seed)
    reference = args.directory / "undisturbed"
    (whole,), _ = disturbed(args, reference, moments, 0)
    print(f"undisturbed: {whole:.0f} s", flush=True)
    began = [*begun(args).values(), time.monotonic()]
    lasts = dict(zip(STAGES, np.diff(began).tolist(), strict=True))
    kills, lost, found, stages = 0, 0.0, 0, Counter[str]()
    while kills < args.kills:
        run = args.directory / "killed"
        shutil.rmtree(run, ignore_errors=True)
        spent, met = disturbed(args, run, moments, args.kills - kills, lasts)
        stages += met
        kills, lost = kills + len(spent) - 1, lost + sum(spent) - whole
        apart = differences(reference, run, 0 if args.ranks == 1 else 1e-6)
        found += len(apart)
        print(*apart, f"{kills} kills, {len(apart)} differences", sep="\n", flush=True)
        print(*(f"{count} in {stage}" for stage, count in sorted(stages.items())), sep=", ", flush=True)
    print(f"{kills} kills, {lost / kills:.1f} s lost per kill (starting again included), {found} differences")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
