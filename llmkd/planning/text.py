"""A plan as plain text of at most 110 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH = 110
HEAD = ["", "", "n", "steps", "tokens", "PFLOP", "weight", "grads", "optim", "activ", "buffer", "peak"]
HEAD += ["host", "disk", "hours"]
SPACES = (2, 24, 2, 5, 6, 5, 6, 5, 5, 5, 6, 6, 5, 5, 5)  # and one space between


def table(plan: Mapping[str, Any]) -> str:
    """The jobs of a plan, a line each; what it assumes; what does not fit and what to change."""
    lines = [_title(plan), "", _line(HEAD)]
    lines += [_line(_cells(job)) for job in plan["jobs"]]
    totals = plan["totals"]
    sums = {"PFLOP": _count(totals["flops"] / 1e15), "peak": _gb(totals["peak"]), "disk": _gb(totals["disk"])}
    sums |= {"hours": _short(totals["hours"])}
    lines.append(_line(["", "in all", *(sums.get(name, "") for name in HEAD[2:])]))
    lines += ["", *_models(plan), *_wrapped("assumed", plan["assumptions"])]
    if totals["unknown"]:
        lines += _wrapped("unknown", [f"{totals['unknown']} jobs have unknown rows and are in no sum"])
    lines += ["", *_problems(plan)]
    return "\n".join(line.rstrip() for line in lines)


def _title(plan: Mapping[str, Any]) -> str:
    each = (
        f"{plan['devices']} x {plan['memory_gb']:g} GB, {plan['efficiency']:.0%} of {plan['tflops']:g} TFLOPS"
    )
    return f"{each}; GB; memory on one accelerator by one of n units, all else by all n"


def _line(cells: Any) -> str:
    left = 2
    return " ".join(
        cell[:width].ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, SPACES, strict=True))
    )


def _cells(job: Mapping[str, Any]) -> list[str]:
    parts = job["memory"]
    sums = ["?"] * 3
    if job["flops"] is not None:
        sums = [_count(job["steps"]), _count(job["tokens"]), _count(job["flops"] / 1e15)]
    spaces = [""] * 6
    if parts:
        active = parts["activations"] + parts["head"]
        given = (parts["weights"], parts["gradients"], parts["optimizer"], active, parts["buffers"])
        spaces = [*(_gb(value) for value in given), _gb(parts["peak"]) + ("" if job["fits"] else "!")]
    hours = "?" if job["hours"] is None else _short(job["hours"])
    what = f" {job['what']}"
    name = job["name"][: SPACES[1] - len(what)] + what
    return [job["stage"], name, str(job["times"]), *sums, *spaces, _gb(job["host"]), _gb(job["disk"]), hours]


def _gb(value: float) -> str:
    return _short(value / 1e9) if value else ""


def _short(value: float) -> str:
    if not value:
        return ""
    if value < 0.01:
        return "<.01"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _count(value: float) -> str:
    """With three digits and a suffix."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e5, "k")):
        if value >= limit:
            scaled = value / (1e3 if suffix == "k" else limit)
            return f"{scaled:.3g}{suffix}" if scaled < 1000 else f"{scaled:.0f}{suffix}"
    return f"{value:.0f}" if value >= 10 or (value == int(value) and value) else _short(value)


def _models(plan: Mapping[str, Any]) -> list[str]:
    told = [f"{one['name']} {_count(one['parameters'])} parameters" for one in plan["models"]]
    return _wrapped("models", told)


def _wrapped(title: str, items: list[str]) -> list[str]:
    from textwrap import wrap

    indent = " " * 9
    return [
        line
        for i, item in enumerate(items)
        for line in wrap(
            item, WIDTH, initial_indent=(title if not i else "").ljust(9), subsequent_indent=indent
        )
    ]


def _problems(plan: Mapping[str, Any]) -> list[str]:
    if not plan["problems"]:
        return ["everything fits"]
    lines = []
    for problem in plan["problems"]:
        what = f"{problem['stage']} {problem['name']} {problem['what']}"
        fits = problem["then"] <= problem["limit"]
        remedy = f"set {' '.join(problem['changes'])}" if problem["changes"] else "no setting helps"
        then = f"then {_gb(problem['then'])}" if fits else f"and still {_gb(problem['then'])}: more memory"
        line = f"{what}: {_gb(problem['peak'])} GB do not fit into {_gb(problem['limit'])}; {remedy}, {then}"
        lines += _wrapped("too big", [line])
    return lines
