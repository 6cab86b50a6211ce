"""The state of each unit of a run, held against its config: read from manifests, locks and checkpoints."""

import fcntl
import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from llmkd import run, units
from llmkd.errors import LlmkdError
from llmkd.inputs import DISTILL, EVALUATE, MERGE, PREPARE, PRETRAIN, QUANTIZE, TEACHERS
from llmkd.schema import Config
from llmkd.settings import is_made

Make = Callable[[], units.Recipe]
FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, pid


def states(config: Config) -> list[dict[str, Any]]:
    """One entry a unit, in the order in which they are made: unit (its directory in the run), stage, state,
    reason, seconds (that it took). Raises nothing for what is missing, damaged or of another config.

    States: done; running; stopped (its checkpoint is gone on with); stale (made from another config, or from
    inputs that are others now); damaged; missing.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, make in everything(config):
        found[name] = {
            "unit": name,
            "stage": name.split("/")[0],
            **state(Path(config.run) / name, make, {unit: entry["state"] for unit, entry in found.items()}),
        }
    return list(found.values())


def everything(config: Config) -> Iterator[tuple[str, Make]]:
    """Every unit that the config has, by its directory in the run."""
    folds = range(config.folds.count)
    yield PREPARE, partial(units.prepared, config)
    for model in config.models:
        if is_made(config, model):
            yield f"{PRETRAIN}/{model.name}", partial(units.pretrained, config, model)
    online = units.beside(config, config.student)
    for teacher in (one for one in config.teachers if one not in online):
        for fold in folds:
            yield f"{TEACHERS}/{teacher.name}/fold{fold}", partial(units.teacher, config, teacher, fold)
    for student in config.students:
        for kind in units.kinds_of(config, student):
            name = student.name if kind == "student" else f"{student.name}-baseline"
            for fold in folds:
                yield f"{DISTILL}/{name}/fold{fold}", partial(units.student, config, student, kind, fold)
    yield MERGE, partial(units.merged, config)
    if config.quantize:
        yield QUANTIZE, partial(units.quantized, config)
    if config.task.test is not None:
        yield EVALUATE, partial(units.evaluated, config)


def due(config: Config, stage: str, only: Mapping[str, Sequence[str]]) -> bool:
    """Whether a unit of a stage is to be made now, of those that its flags leave: `only`, flag -> values.
    What it lacks, or is damaged, the stage itself tells."""
    for name, make in everything(config):
        directory = Path(config.run) / name
        if name.split("/")[0] == stage and meant(name, only):
            with suppress(LlmkdError):
                mark = make().mark
                if not (directory / run.MANIFEST).is_file() or run.manifest(directory)["fingerprint"] != mark:
                    return True
    return False


def meant(unit: str, only: Mapping[str, Sequence[str]]) -> bool:
    """Whether a stage's flags leave a unit: `stage`, `stage/name` or `stage/name[-baseline]/fold0`."""
    whole, _, fold = unit.partition("/")[2].partition("/fold")
    name, kind = whole.removesuffix("-baseline"), "baseline" if whole.endswith("-baseline") else "student"
    has = {"model": whole, "teacher": whole, "student": name, "only": kind, "fold": fold}
    return all(has[flag] in values for flag, values in only.items())


def state(directory: Path, make: Make, before: Mapping[str, str]) -> dict[str, Any]:
    """State, reason and seconds of one unit; `before` holds the states of those made earlier."""
    recipe, fault = None, ""
    try:
        recipe = make()
    except LlmkdError as error:  # an input of it is missing or stale
        fault = str(error).split("\n")[0]
    if holder := held_by(directory):
        return {"state": "running", "reason": holder, "seconds": None}
    data: dict[str, Any] | None = None
    if (directory / run.MANIFEST).is_file():
        try:
            data = run.manifest(directory)
            run.digest(directory)
        except LlmkdError as error:
            return {"state": "damaged", "reason": str(error), "seconds": None}
        if recipe and data["fingerprint"] == recipe.mark:
            return {"state": "done", "reason": None, "seconds": data["seconds"]}
    if saved := checkpoint(directory, recipe):
        return {"state": "stopped", "reason": saved, "seconds": None}
    if data is None:
        return {"state": "missing", "reason": None, "seconds": None}
    return {"state": "stale", "reason": why(data, recipe, before) or fault, "seconds": data["seconds"]}


def why(data: Mapping[str, Any], recipe: units.Recipe | None, before: Mapping[str, str]) -> str:
    """What a finished unit was made from that is another now; the first three of it."""
    known = data["inputs"]
    found = [f"{name} is {before[name]}" for name in known if before.get(name, "done") != "done"]
    if recipe:
        settings = json.loads(json.dumps(recipe.settings, default=str))
        found += changes(data["settings"], settings)
        now = recipe.inputs
        found += [f"another {name}" for name in now if name in known and now[name] != known[name]]
        found += [f"{name} is a new input" for name in now if name not in known]
        found += [f"{name} is no input any more" for name in known if name not in now]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def changes(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Each setting that differs: its path, what it was and what it is."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = ({str(place): value for place, value in enumerate(values)} for values in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} was {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def held_by(directory: Path) -> str | None:
    """Who is at a unit, if anyone is; asks for the lock's holder and never takes the lock itself."""
    path = directory.with_name(directory.name + ".lock")
    try:
        with path.open("rb") as file:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0)
            kind = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
            said = file.read()
    except FileNotFoundError:
        return None
    if kind == fcntl.F_UNLCK:  # left by a process that was killed
        return None
    try:
        who = json.loads(said)
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError):  # about to write who it is
        return "another process"


def checkpoint(directory: Path, recipe: units.Recipe | None) -> str | None:
    """When an unfinished unit's newest checkpoint was saved, and its step or block; none of another's."""
    place = directory.with_name(directory.name + ".partial") / run.CHECKPOINT
    note, files = place / "fingerprint", list(place.rglob("*.safetensors"))
    if not files or not note.is_file() or (recipe and note.read_text(encoding="utf-8") != recipe.mark):
        return None
    newest = max(files, key=lambda path: path.stat().st_mtime)
    saved = time.strftime("%F %T %Z", time.localtime(newest.stat().st_mtime))
    if newest.parent.parent.name == "gptq":
        return f"{len(files)} blocks quantized, the last saved {saved}"
    step = newest.name.removeprefix("step").split("-")[0].lstrip("0") or "0"
    return f"checkpoint of {newest.parent.name} at step {step}, saved {saved}"
