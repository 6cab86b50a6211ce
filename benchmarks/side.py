"""What the benchmarks share: two ways measured in turn, the machine in words, one table row a comparison."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # libraries' notices have no place in a table
os.environ.setdefault("TQDM_DISABLE", "1")
SHARED = 0.25  # cores of other work that make a machine busy
Found = dict[str, list[dict[str, Any]]]  # what each way measured, round by round


@dataclass
class Row:
    """One comparison: the ratio of each round, so that what slows the whole machine cancels out."""

    what: str
    against: str
    ratios: list[float]
    goal: str  # such as ">= 3"; "" where there is none
    ours: str
    theirs: str
    note: str = ""
    command: str = field(default_factory=lambda: " ".join(["python", *sys.argv]))

    @property
    def met(self) -> bool:
        if not self.goal:
            return True
        sign, value = self.goal.split()
        return median(self.ratios) >= float(value) if sign == ">=" else median(self.ratios) <= float(value)

    @property
    def verdict(self) -> str:
        return f"{self.goal}: {'yes' if self.met else 'no'}" if self.goal else "none"

    def line(self) -> str:
        low, high = min(self.ratios), max(self.ratios)
        cells = [self.what, self.against, self.ours, self.theirs, f"{median(self.ratios):.2f}"]
        cells += [f"{low:.2f} to {high:.2f}", self.verdict, self.note]
        return "| " + " | ".join(cells) + " |"


HEAD = "| what | against | ours | theirs | ratio | rounds | goal | the same work |\n" + "|---" * 8 + "|"


def parser(doc: str | None, rounds: int = 3, *, precise: bool = False) -> argparse.ArgumentParser:
    """The arguments that all scripts share; `precise`: where both sides compute in one precision."""
    assert doc
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--rounds", type=int, default=rounds)
    found.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)))
    found.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: this process's own seconds, on a busy machine",
    )
    found.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, and nothing else")
    if precise:
        found.add_argument(
            "--precision",
            choices=["bf16", "fp32"],
            default="bf16" if bf16_units() else "fp32",
            help="of both sides' arithmetic; bf16 where this processor has it",
        )
    found.add_argument("--rows", type=Path, help="append the table's rows to this file, as JSON")
    found.add_argument("--way", help=argparse.SUPPRESS)  # measure this one, in this process
    return found


def clock(asked: argparse.Namespace) -> float:
    """Seconds, of the wall or of this process's own work."""
    return time.process_time() if asked.clock == "cpu" else time.perf_counter()


def in_turn(ways: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> Found:
    """A B A B ...: what disturbs the machine for a while meets all ways alike."""
    found: Found = {way: [] for way in ways}
    for number in range(rounds):
        for way, measure in ways.items():
            found[way].append(measure())
            print(f"  round {number + 1}, {way}: {shown(found[way][-1])}", flush=True)
    return found


def shown(measured: Mapping[str, Any]) -> str:
    parts = (f"{value:.5g}" if isinstance(value, float) else str(value) for value in measured.values())
    return ", ".join(f"{name} {part}" for name, part in zip(measured, parts, strict=True))


def alone(
    way: str, python: str = sys.executable, environment: Mapping[str, str] | None = None
) -> Callable[[], dict[str, Any]]:
    """This benchmark's own command in a process of its own, so that no way finds another's memory."""

    def measure() -> dict[str, Any]:
        command = [python, *sys.argv, "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return measure


def ratios(found: Found, over: str, under: str, name: str) -> list[float]:
    """Round by round: what `over` measured of `name`, by what `under` did."""
    return [a[name] / b[name] for a, b in zip(found[over], found[under], strict=True)]


def middle(found: Found, way: str, name: str) -> float:
    return float(median(one[name] for one in found[way]))


def compare(asked: argparse.Namespace, measure: Callable[[], list[Row]]) -> list[Row]:
    """Run `measure` and print its table, the machine, and whether it was busy."""
    if asked.clock == "cpu" and getattr(asked, "ranks", 1) > 1:  # a rank would count one thread, a peer all
        sys.exit("--clock cpu with --ranks over 1 is not like for like: take the wall's, on a quiet machine")
    before, began = worked(), time.time()
    print(machine(asked.threads), flush=True)
    rows = measure()
    others = (worked() - before) / (time.time() - began)
    print(f"\n{HEAD}")
    print(*(row.line() for row in rows), sep="\n")
    state = f"{asked.clock} clock, {time.time() - began:.0f} s, {others:.2f} cores of other work"
    busy = others > SHARED
    print(f"{state}; {'BUSY: other work shared the machine' if busy else 'quiet'}", flush=True)
    if asked.quick:
        print("toy sizes: these ratios mean nothing")
    if asked.rows:
        more = {"busy": busy, "clock": asked.clock, "machine": machine(asked.threads)}
        with asked.rows.open("a") as file:
            file.writelines(json.dumps({**asdict(row), **more}) + "\n" for row in rows)
    return rows


def worked() -> float:
    """Seconds of cores that went to others than this process and those that it waited for, since the machine
    was started; also to other machines on the same hardware, where the system can tell (Linux)."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _, _, interrupts, soft, stolen = ticks
    together = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
    return together - sum(os.times()[:4])


def machine(threads: int) -> str:
    names = [line.partition(":")[2].strip() for line in processor() if line.startswith("model name")]
    kind = f"{names[0] if names else platform.machine()} ({', '.join(bf16_units()) or 'no bf16 arithmetic'})"
    return f"{os.cpu_count()} cores, {kind}, {threads} thread{'s' * (threads > 1)} a side, CPU only"


def bf16_units() -> list[str]:
    """What this processor multiplies bf16 with (x86 under Linux), asked without llmkd, as peers' environments
    have none of it. Without any, a product in bf16 takes some fifty to three hundred times as long as in
    float32, on both sides of a comparison."""
    able = " ".join(line for line in processor() if line.startswith("flags"))
    return [kind for kind in ("avx512_bf16", "amx_bf16") if kind in able]


def processor() -> list[str]:
    found = Path("/proc/cpuinfo")
    return found.read_text().splitlines() if found.exists() else []


def parts(asked: argparse.Namespace) -> str:
    """Our side's ranks of one thread, or its threads."""
    many, what = (asked.ranks, "rank") if asked.ranks > 1 else (asked.threads, "thread")
    return f"{many} {what}{'s' * (many > 1)}"


def reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def available() -> float:
    """Bytes of memory that this machine could still give (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def peak() -> float:
    """Most memory this process has held since it was reset, MB (VmHWM, Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
