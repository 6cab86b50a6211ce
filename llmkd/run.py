"""A run directory: finished units with a manifest written last, fingerprints, skipping what stands.

A unit is one directory that is made as a whole: `00_prepare`, `02_teachers/llama/fold0`, ... It is
written beside its final name and renamed when its manifest stands, so a half-written unit is never
taken for a whole one. A manifest names no absolute path: a run directory may be copied or moved.

What an interrupted unit had already learnt stays in its `checkpoint/` for the next process that makes it
from the same settings and inputs; a finished unit has none.
"""

import errno
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from llmkd import lock, ranks
from llmkd.digests import differing, known_sha, remember, sha, stamp
from llmkd.digests import file_entry as file_entry
from llmkd.errors import RunError

MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"  # what a unit in the making keeps for the process that goes on with it
NOTE = "fingerprint"  # in there: what that unit is made from
WHOLE_NOTE = "whole.json"  # ... and what of its checkpoints was about to move into it
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "optimum", "gptqmodel", "llmkd")


@dataclass
class Unit:
    """A directory in the making. Fill `path`; leave counts and figures in `rows` and `metrics`.

    What lies in `checkpoints` outlives an interruption, and goes when the unit is finished, but for what
    `whole` names: that moves into the unit, at the last moment, as it may have taken days to make.
    """

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINT


def fingerprint(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """sha256 of what a unit is made from: its stage, its part of the config, its inputs' digests."""
    return sha(json.dumps([stage, settings, inputs], sort_keys=True, default=str).encode())


def digest(directory: Path, remedy: str = "") -> str:
    """sha256 over a finished unit's contents; the same, whenever they were made.

    Each file is held against its manifest, where it changed since it was last: raises RunError naming it.
    Of several ranks the first one reads for all.
    """
    data = manifest(directory, remedy)
    files = data["files"]
    wrong = differing(directory, data["stage"], files) if ranks.is_main() else []
    if wrong:
        raise RunError(
            f"{directory / wrong[0]}: its bytes are not those its {MANIFEST} tells of (sha256): damaged, or "
            f"another run's; remove {directory} and {remedy or _remedy(data)}"
        )
    return told(data)


def told(data: Mapping[str, Any]) -> str:
    """A unit's digest as its manifest tells it."""
    digests = {name: entry["sha256"] for name, entry in data["files"].items()}
    return sha(json.dumps(digests, sort_keys=True).encode())


def manifest(directory: Path, remedy: str = "") -> dict[str, Any]:
    """The manifest of a finished unit, with its own seal and the sizes of its files checked.

    Raises RunError.
    """
    path = directory / MANIFEST
    if not path.is_file():
        again = remedy or "run the stage that makes it"
        raise RunError(f"{directory}: not a finished directory (no {MANIFEST}); {again}")
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: entry["bytes"] for name, entry in data["files"].items()}
        inside = all(_inside(name) for name in sizes)
        whole = data.pop("seal") == _seal(data) and isinstance(data["stage"], str) and inside
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        again = remedy or "run the stage that makes it"
        raise RunError(f"{path}: damaged; remove {directory} and {again}")
    for name, size in sizes.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            raise RunError(
                f"{file}: missing or not of the {size} bytes written; "
                f"remove {directory} and {remedy or _remedy(data)}"
            )
    return data


def _remedy(data: Mapping[str, Any]) -> str:
    return f"run: python stages/{data['stage']}.py with this run's config"


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _seal(data: Mapping[str, Any]) -> str:
    """sha256 of all else that a manifest says: a flipped byte in it is found as well."""
    return sha(json.dumps(data, sort_keys=True).encode())


def stands(directory: Path, mark: str) -> bool:
    """Whether a finished unit was made from exactly this. Says so when one was made from something else."""
    if not (directory / MANIFEST).is_file():
        return False
    same = bool(manifest(directory).get("fingerprint") == mark)
    if not same and ranks.is_main():
        print(f"{directory}: config or inputs changed, made anew", flush=True)
    if same and ranks.is_main():  # of a kill just after the unit got its name
        shutil.rmtree(directory / CHECKPOINT, ignore_errors=True)
    return same


@contextmanager
def writing(
    directory: Path,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    seed: int,
    *,
    alone: bool = False,
) -> Iterator[Unit]:
    """A unit to fill; finished, under its own name, only when the block ends without an error.

    All ranks enter it and all may read `unit.path`; by convention rank 0 alone writes. `alone` is for
    stages that only rank 0 runs. Raises RunError where another process is at it.
    """
    started = time.time()
    barrier = (lambda: None) if alone else ranks.barrier
    unit = Unit(directory.with_name(directory.name + ".partial"))
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise RunError(f"{directory}: holds files but no {MANIFEST}, so it is not this run's; move it away")
    mark = fingerprint(stage, settings, inputs)
    with ExitStack() as stack:
        refusal = ""
        if ranks.is_main():
            try:
                stack.enter_context(lock.held(directory))
                _begin(unit, mark)
            except RunError as error:
                refusal = str(error)
        if refusal := refusal if alone else ranks.gather(refusal)[0]:  # every rank ends by the same error
            raise RunError(refusal)
        yield unit
        barrier()
        if ranks.is_main():
            _finish(unit, directory, stage, settings, inputs, seed, time.time() - started)
        barrier()


def _begin(unit: Unit, mark: str) -> None:
    """An empty unit, but for the checkpoints of one that was to be made from the same."""
    note = unit.checkpoints / NOTE
    if note.is_file() and note.read_text(encoding="utf-8") == mark:
        moved = unit.checkpoints / WHOLE_NOTE
        for name in json.loads(moved.read_text(encoding="utf-8")) if moved.is_file() else []:
            if (unit.path / name).exists():  # of a kill before the unit got its name
                os.rename(unit.path / name, unit.checkpoints / name)
        for path in unit.path.iterdir():
            if path.is_dir() and path != unit.checkpoints:
                shutil.rmtree(path)
            elif path != unit.checkpoints:
                path.unlink()
        return
    if unit.path.exists():
        shutil.rmtree(unit.path)
    unit.checkpoints.mkdir(parents=True)
    note.write_text(mark, encoding="utf-8")


def _finish(
    unit: Unit,
    directory: Path,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    seed: int,
    seconds: float,
) -> None:
    files = _files(unit)
    data: dict[str, Any] = {
        "stage": stage,
        "fingerprint": fingerprint(stage, settings, inputs),
        "settings": settings,
        "inputs": inputs,
        "seed": seed,
        "versions": _versions(),
        "files": {name: file_entry(path) for name, path in files.items()},
        "rows": unit.rows,
        "metrics": unit.metrics,
        "seconds": round(seconds, 2),
        "ranks": ranks.world(),
    }
    for path in files.values():
        _sync(path)
    if unit.whole:
        write_json(unit.checkpoints / WHOLE_NOTE, unit.whole)
    for name in unit.whole:
        os.rename(unit.checkpoints / name, unit.path / name)
    data = json.loads(json.dumps(data, default=str))
    write_json(unit.path / MANIFEST, {**data, "seal": _seal(data)})
    _replace(unit.path, directory)
    shutil.rmtree(directory / CHECKPOINT)
    remember(directory, stage, data["files"])


def _replace(new: Path, directory: Path) -> None:
    """Two renames, so that a kill while an old tree is being removed leaves no half of it under its name."""
    old = directory.with_name(directory.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    os.rename(new, directory)
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """JSON under its final name only when whole: written beside, synced, renamed."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, sort_keys=True, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def is_disk_full(error: BaseException) -> bool:
    """Whether writing failed for want of space or quota; libraries in Rust tell it by words alone."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def _files(unit: Unit) -> dict[str, Path]:
    """Where the files of a finished unit lie now, by their names in it."""
    found = {}
    for path in sorted(path for path in unit.path.rglob("*") if path.is_file()):
        place = path.relative_to(unit.path)
        if place.parts[0] == CHECKPOINT:
            place = place.relative_to(CHECKPOINT)
            if place.parts[0] not in unit.whole:
                continue
        found[place.as_posix()] = path
    return found


def source_digest(source: str) -> str:
    """What a raw input holds: sha256 over its files' bytes, or its own words where it is no file."""
    found = [source] if Path(source).is_file() else glob.glob(source, recursive=True)
    paths = sorted(path for path in map(Path, found) if path.is_file())
    return sha("".join([*map(known_sha, paths)] or [source]).encode())


WHOLE = 1 << 24  # bytes up to which a checkpoint's file is read whole to tell it from another


def checkpoint_digest(directory: Path) -> str:
    """What a checkpoint on disk holds: names, sizes and bytes, of large files both ends.

    Weights of hundreds of gigabytes are told apart in moments; training changes both ends of a shard.
    """
    # code that it comes with may lie deeper
    paths = {path for path in directory.iterdir() if path.is_file()} | {*directory.rglob("*.py")}
    return _ends_digest(directory, tuple((path, stamp(path)) for path in sorted(paths)))


@cache
def _ends_digest(directory: Path, files: tuple[tuple[Path, tuple[int, ...]], ...]) -> str:
    seen = hashlib.sha256()
    for path, (size, *_) in files:
        seen.update(f"{path.relative_to(directory).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            seen.update(file.read(WHOLE))
            file.seek(max(size - WHOLE, 0))
            seen.update(file.read())
    return seen.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
