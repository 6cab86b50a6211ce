"""What a finished run says of itself: its manifests and metrics as plain dicts, for the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkd import run as runs
from llmkd.errors import RunError
from llmkd.planning import lookup, shapes

PREPARE, PRETRAIN, TEACHERS = "00_prepare", "01_pretrain", "02_teachers"
DISTILL, MERGE, QUANTIZE, EVALUATE = "03_distill", "04_merge", "05_quantize", "06_evaluate"
STAGES = (PREPARE, PRETRAIN, TEACHERS, DISTILL, MERGE, QUANTIZE, EVALUATE)
REMEDY = f"run: python stages/{EVALUATE}.py --config CONFIG, with this run's config"
READINGS = ("", "_calibrated", "_tta", "_tta_calibrated")  # of an artifact: at a temperature, in both orders
Units = dict[str, dict[str, Any]]


def gather(run: Path) -> dict[str, Any]:
    """All that needs no array: {"name", "causal", "metrics", "units": {place in the run: manifest},
    "missing", "student", "teachers": those that the student reads, "shipped", "scores", "sizes", "curves"}.

    Raises RunError where stage 06 is not finished, or a unit is not what it was judged by.
    """
    units, missing = finished_units(run)
    metrics = json.loads((run / EVALUATE / "metrics.json").read_text(encoding="utf-8"))
    student = units[EVALUATE]["settings"]["student"]["name"]
    return {
        "name": run.resolve().name,
        "causal": "continuations" in metrics,
        "metrics": metrics,
        "units": units,
        "missing": missing,
        "student": student,
        "teachers": _read(units, student),
        "shipped": "quantized" if "quantized" in metrics else "merged",
        "scores": scores(metrics),
        "sizes": sizes(units, metrics, student),
        "curves": list(curves(units, student, list(metrics["teachers"]))),
    }


def finished_units(run: Path) -> tuple[Units, list[str]]:
    """The manifests of stage 06 and of all it was made from, in the stages' order; and what is gone since.

    Raises RunError where a unit's contents are not those that the next one was made from.
    """
    runs.digest(run / EVALUATE, REMEDY)
    found: Units = {EVALUATE: runs.manifest(run / EVALUATE, REMEDY)}
    missing: set[str] = set()
    todo = [EVALUATE]
    while todo:
        user = todo.pop()
        for place, digest in found[user]["inputs"].items():
            if place.split("/")[0] not in STAGES or place in missing:
                continue
            if not (run / place / runs.MANIFEST).is_file():
                missing.add(place)
                continue
            if place not in found:
                found[place] = runs.manifest(run / place)
                todo.append(place)
            if runs.told(found[place]) != digest:
                raise RunError(f"{run / place}: made anew since {user} was made from it; {REMEDY}")
    return {place: found[place] for place in sorted(found, key=_in_order)}, sorted(missing)


def _in_order(place: str) -> tuple[str, int]:
    name, fold = re.fullmatch(r"(.*?)(?:/fold(\d+))?", place, re.DOTALL).groups()  # type: ignore[union-attr]
    return name, int(fold or 0)


def model_of(manifest: Mapping[str, Any], student: str) -> str | None:
    """Whose a unit of stages 02 and 03 is, by its name in the tables; None of another stage."""
    settings = manifest["settings"]
    if manifest["stage"] == TEACHERS:
        return f"teacher {settings['teacher']['name']}"
    if manifest["stage"] != DISTILL:
        return None
    if settings["kind"] == "baseline":
        return "baseline"
    own = settings["student"]["name"]  # an earlier student of a chain is the next one's teacher
    return "student" if own == student else f"teacher {own}"


def folds_of(units: Units, student: str) -> dict[str, list[str]]:
    """The places of each model's folds, by its name in the tables."""
    found: dict[str, list[str]] = {}
    for place, manifest in units.items():
        if name := model_of(manifest, student):
            found.setdefault(name, []).append(place)
    return found


def _read(units: Units, student: str) -> list[str]:
    """The teachers whose logits the student reads, by their names in the tables."""
    places = folds_of(units, student).get("student", [])
    names = units[places[0]]["settings"].get("teachers", []) if places else []
    return [f"teacher {name}" for name in names]


def scores(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the scores' table, all on test rows: teachers, peers, then what led to the artifact."""
    rows = {f"teacher {name}": found.get("test", found) for name, found in metrics["teachers"].items()}
    rows |= {f"peer {name}": found["test"] for name, found in metrics.get("peers", {}).items()}
    artifacts = [f"{one}{how}" for one in ("merged", "quantized") for how in READINGS]
    shown = ("before", "baseline", "student", *artifacts)
    rows |= {name: metrics[name] for name in shown if name in metrics}
    return rows | {f"output {name}": found for name, found in metrics.get("outputs", {}).items()}


def family(name: str) -> str:
    """The model that a row of the scores is of, however it was read."""
    return name.removesuffix("_calibrated").removesuffix("_tta")


def sizes(units: Units, metrics: Mapping[str, Any], student: str) -> dict[str, int | None]:
    """Bytes of the weights that one row meets, by model: the base and one fold's adapter; None where the
    base is neither in the run, nor on this disk, nor well known."""
    found: dict[str, int | None] = dict(metrics["size_bytes"])
    online: dict[str, Mapping[str, Any]] = {}
    for name, places in folds_of(units, student).items():
        unit = units[places[0]]
        which = unit["settings"].get("teacher") or unit["settings"]["student"]
        own = _weights(unit, "adapter/") + _weights(unit, "model.txt")
        online |= {one["name"]: one for one in unit["settings"].get("online", ())}
        if own and "adapter/adapter_model.safetensors" not in unit["files"]:  # all weights were trained
            found[name] = own
        else:
            base = _base(units, which)
            found[name] = own + base if base else None
    for name in metrics["teachers"]:  # one that ran beside the student has no unit of its own
        if f"teacher {name}" not in found:
            found[f"teacher {name}"] = _base(units, online.get(name, {"name": name}))
    return found


def _base(units: Units, model: Mapping[str, Any]) -> int | None:
    """Bytes of a model as it is before its training: of what stage 01 made, of a checkpoint on this disk, or
    of a well-known name's parameters, headless, at the two bytes each that hubs have them in."""
    if made := units.get(f"{PRETRAIN}/{model['name']}"):
        return _weights(made, "model/") or None
    if not (source := model.get("model")):
        return None
    if Path(source).is_dir():
        return sum(file.stat().st_size for file in Path(source).glob("*.safetensors")) or None
    known = lookup.known().get(source.lower())
    return 2 * shapes.from_config(known["config"]).backbone if known else None


def _weights(unit: Mapping[str, Any], under: str) -> int:
    suffixes = (".safetensors", ".bin", ".txt")
    names = [name for name in unit["files"] if name.startswith(under) and name.endswith(suffixes)]
    return sum(unit["files"][name]["bytes"] for name in names)


def curves(units: Units, student: str, teachers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One fold's course of one term: {"model", "fold", "term", "against", "steps", "values"}.

    against: the model that a term such as `kl/llama` compares with, by its name in the tables.
    """
    for manifest in units.values():
        if (model := model_of(manifest, student)) is None:
            continue
        found: dict[str, tuple[list[int], list[float]]] = {}
        before, metrics = 0, manifest["metrics"]
        for phase in metrics.get("phases", [metrics]):
            for entry in [*phase.get("loss", []), *phase.get("dev", [])]:
                for term in entry.keys() - {"epoch", "grad_norm", "learning_rate", "step"}:
                    steps, values = found.setdefault(term, ([], []))
                    steps.append(before + entry["step"])
                    values.append(entry[term])
            before += phase.get("steps", 0)
        for logged, (steps, values) in sorted(found.items()):
            named = _term(logged, model, manifest["settings"], teachers)
            yield {**named, "fold": manifest["settings"]["fold"], "steps": steps, "values": values}


def _term(logged: str, model: str, settings: Mapping[str, Any], teachers: Sequence[str]) -> dict[str, Any]:
    """`kl/llama` is a KL against a teacher; of peers that learn together `bert/kl/llama` is bert's."""
    peers = {peer["name"]: f"peer {peer['name']}" for peer in settings.get("peers", ())}
    first, _, rest = logged.partition("/")
    if peers and rest and first in {settings["student"]["name"], *peers}:
        model, logged = peers.get(first, model), rest
    term, _, other = logged.rpartition("/")
    if term and other in teachers:
        return {"model": model, "term": term, "against": f"teacher {other}"}
    return {"model": model, "term": logged, "against": None}
