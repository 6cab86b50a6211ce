"""What a run was made from, as a stranger may see it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llmkd import run as runs
from llmkd.reporting.gather import Units
from llmkd.reporting.pieces import escape, missing, section, table


def provenance(data: dict[str, Any]) -> str:
    units = data["units"]
    rows = [
        [
            escape(place),
            ", ".join(f"{escape(name)} {count:,}" for name, count in unit["rows"].items()),
            f"{unit['seconds']:,.1f}",
            _hash(unit["fingerprint"]),
            _hash(runs.told(unit)),
        ]
        for place, unit in units.items()
    ]
    versions: dict[str, set[str]] = {}
    for unit in units.values():
        for name, version in unit["versions"].items():
            versions.setdefault(name, set()).add(version)
    settings = [unit["settings"] for unit in units.values()]
    facts = {
        "seed": {unit["seed"] for unit in units.values()},
        "precision asked for": {one["precision"] for one in settings if "precision" in one},
        "ranks": {unit["ranks"] for unit in units.values()},
        "seconds of all units": {round(sum(unit["seconds"] for unit in units.values()), 1)},
        **versions,
    }
    cells = [[escape(name), escape(", ".join(map(str, sorted(found))))] for name, found in facts.items()]
    gone = missing(f"Gone since stage 06 judged: {', '.join(data['missing'])}.") if data["missing"] else ""
    config = escape(json.dumps(resolved(units), indent=2, ensure_ascii=False))
    return section(
        "Provenance",
        "The units this was made from; a fingerprint is of settings and inputs, a digest of contents.",
        table(["unit", "rows", "seconds", "fingerprint", "digest"], rows, words=(1,)),
        gone,
        table(["", "in this run"], cells),
        f"<details><summary>Config, as each unit was made from it</summary><pre>{config}</pre></details>\n",
    )


def _hash(digits: str) -> str:
    return f"<code title='{escape(digits)}'>{escape(digits[:10])}</code>"


def resolved(units: Units) -> dict[str, Any]:
    """Each unit's settings, those of a model's folds once, without machine paths and secrets."""
    found: dict[str, Any] = {}
    for place, manifest in units.items():
        settings = {key: value for key, value in manifest["settings"].items() if key != "fold"}
        found.setdefault(re.sub(r"/fold\d+$", "", place), public(settings))
    return found


SECRET = re.compile(
    r"^token$|(^|_)(secret|password|passwd|authorization|credentials?|(api|access|auth|hf|hub|private)_?(key|token))s?$",
    re.I,
)
PATH = re.compile(
    r"(?:(?<=^)|(?<=[\s=,:;'\"(\[]))(?:~|[A-Za-z]:)?[/\\](?![/\\])(?:[^\s/\\]+[/\\])*([^\s/\\]*)"
)


def public(value: Any) -> Any:
    """A setting as a stranger may see it: of absolute paths the last part alone, no user of a URL, nothing
    under a key that speaks of a secret."""
    if isinstance(value, Mapping):
        return {public(key): _shown(key, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and re.match(r"(file://|~|[A-Za-z]:)?[/\\](?![/\\])", value):  # may hold spaces
        return "…/" + re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return PATH.sub(r"…/\1", re.sub(r"://[^/@\s]+@", "://", value))


def _shown(key: str, value: Any) -> Any:
    return "(hidden)" if value is not None and SECRET.search(key) else public(value)
