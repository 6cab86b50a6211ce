"""A run directory: finished units with a manifest written last, fingerprints, skipping what stands.

A unit is one directory that is made as a whole: `00_prepare`, `02_teachers/llama/fold0`, ... It is
written beside its final name and renamed when its manifest stands, so a half-written unit is never
taken for a whole one. A manifest names no absolute path: a run directory may be copied or moved.
"""

import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkd import ranks
from llmkd.errors import RunError

MANIFEST = "manifest.json"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "optimum", "gptqmodel", "llmkd")


@dataclass
class Unit:
    """A directory in the making. Fill `path`; leave counts and figures in `rows` and `metrics`."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)


def fingerprint(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """sha256 of what a unit is made from: its stage, its part of the config, its inputs' digests."""
    return _sha(json.dumps([stage, settings, inputs], sort_keys=True, default=str).encode())


def digest(directory: Path) -> str:
    """sha256 over a finished unit's contents; the same, whenever they were made."""
    files = manifest(directory)["files"]
    return _sha(json.dumps({name: entry["sha256"] for name, entry in files.items()}, sort_keys=True).encode())


def manifest(directory: Path, remedy: str = "run the stage that makes it") -> dict[str, Any]:
    """The manifest of a finished unit, with the sizes of its files checked. Raises RunError."""
    path = directory / MANIFEST
    if not path.is_file():
        raise RunError(f"{directory}: not a finished directory (no {MANIFEST}); {remedy}")
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: entry["bytes"] for name, entry in data["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path}: damaged; remove {directory} and {remedy}") from None
    for name, size in sizes.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            raise RunError(
                f"{file}: missing or not of the {size} bytes written; remove {directory} and {remedy}"
            )
    return data


def stands(directory: Path, mark: str) -> bool:
    """Whether a finished unit was made from exactly this. Says so when one was made from something else."""
    if not (directory / MANIFEST).is_file():
        return False
    same = bool(manifest(directory).get("fingerprint") == mark)
    if not same and ranks.is_main():
        print(f"{directory}: config or inputs changed, made anew", flush=True)
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
    stages that only rank 0 runs.
    """
    started = time.time()
    barrier = (lambda: None) if alone else ranks.barrier
    unit = Unit(directory.with_name(directory.name + ".partial"))
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise RunError(f"{directory}: holds files but no {MANIFEST}, so it is not this run's; move it away")
    if ranks.is_main():
        shutil.rmtree(unit.path, ignore_errors=True)
        unit.path.mkdir(parents=True)
    barrier()
    yield unit
    barrier()
    if ranks.is_main():
        _finish(unit, directory, stage, settings, inputs, seed, time.time() - started)
    barrier()


def _finish(
    unit: Unit,
    directory: Path,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    seed: int,
    seconds: float,
) -> None:
    data: dict[str, Any] = {
        "stage": stage,
        "fingerprint": fingerprint(stage, settings, inputs),
        "settings": settings,
        "inputs": inputs,
        "seed": seed,
        "versions": _versions(),
        "files": _files(unit.path),
        "rows": unit.rows,
        "metrics": unit.metrics,
        "seconds": round(seconds, 2),
        "ranks": ranks.world(),
    }
    for name in data["files"]:
        _sync(unit.path / name)
    write_json(unit.path / MANIFEST, data)
    _replace(unit.path, directory)


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


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    names = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): file_entry(path) for path in names}


def file_entry(path: Path) -> dict[str, Any]:
    """{"sha256", "bytes"} of one file."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def source_digest(source: str) -> str:
    """What a raw input holds: sha256 over its files' bytes, or its own words where it is no file."""
    found = [source] if Path(source).is_file() else glob.glob(source, recursive=True)
    paths = sorted(path for path in map(Path, found) if path.is_file())
    return _sha("".join([*(file_entry(path)["sha256"] for path in paths)] or [source]).encode())


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


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
