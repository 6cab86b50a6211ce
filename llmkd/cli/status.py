"""What of a run is done, stale and why, running and by whom, stopped, missing; no model is loaded."""

import argparse
from collections import Counter
from typing import Any

from llmkd.cli.options import Answer, config_flags, override_words, table

ORDER = ("done", "running", "stopped", "stale", "damaged", "missing")


def add_flags(parser: argparse.ArgumentParser) -> None:
    config_flags(parser)
    override_words(parser)
    parser.add_argument("--check", action="store_true", help="exit code 1 unless all units are done")


def answer(arguments: argparse.Namespace) -> Answer:
    from llmkd.cli.states import states
    from llmkd.config import load

    config = load(arguments.config, arguments.overrides)
    found = states(config)
    tally = Counter(unit["state"] for unit in found)
    counts = {state: tally[state] for state in ORDER if tally[state]}
    whole = set(counts) <= {"done"}
    data = {"run": config.run, "config": arguments.config, "counts": counts, "units": found}
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    text = f"{table([row(unit) for unit in found])}\n{config.run}: {told}"
    text += "" if whole else f"; to go on: llmkd run {config.given}"
    return Answer(data, text, 1 if arguments.check and not whole else 0)


def row(unit: dict[str, Any]) -> tuple[str, str, str, str]:
    return unit["unit"], unit["state"], clock(unit["seconds"]), unit["reason"] or ""


def clock(seconds: float | None) -> str:
    """3661.2 as 1:01:01, 1.25 as 1.2 s."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
