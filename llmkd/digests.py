"""What files hold: sha256 of bytes, and a cache of which files were already held against theirs.

The cache lies in a run's `.verified/`, one small file a unit. It belongs to no unit and may be deleted:
the next start then reads every byte once more.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

VERIFIED = ".verified"
Entry = Mapping[str, Any]  # {"sha256", "bytes"} of one file, as a manifest holds it


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """{"sha256", "bytes"} of one file."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def known_sha(path: Path) -> str:
    """sha256 of one file; read once a process for as long as it does not change."""
    return _sha_of(path, stamp(path))


@cache
def _sha_of(path: Path, _: tuple[int, ...]) -> str:
    return str(file_entry(path)["sha256"])


def differing(directory: Path, stage: str, files: Mapping[str, Entry]) -> list[str]:
    """Names of the files whose bytes are not their entry's. Only files that changed since they were last
    seen are read: changed is another size, time or inode."""
    cache = _cache(directory, stage)
    seen = _read(cache)
    now: dict[str, Any] = {}
    for name in files:
        mark = [*stamp(directory / name)]
        known = seen.get(name)
        fresh = known == [mark, files[name]["sha256"]]  # only good news is believed of a cache
        now[name] = known if fresh else [mark, file_entry(directory / name)["sha256"]]
    if now != seen:
        _write(cache, now)
    return [name for name, entry in files.items() if now[name][1] != entry["sha256"]]


def remember(directory: Path, stage: str, files: Mapping[str, Entry]) -> None:
    """Note files whose digests were taken this moment, so that the next stage need not read them."""
    now = {name: [[*stamp(directory / name)], entry["sha256"]] for name, entry in files.items()}
    _write(_cache(directory, stage), now)


def stamp(path: Path) -> tuple[int, ...]:
    """What no change of a file leaves as it was; ctime also tells of one that put the old mtime back."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _cache(directory: Path, stage: str) -> Path:
    """A unit's place in the run's `.verified/`. The run is what holds the stage's folder."""
    places = [directory, *directory.parents]
    top = next((at for at in places if at.name == stage or at.name.startswith(f"{stage}-")), directory)
    return top.parent / VERIFIED / f"{directory.relative_to(top.parent)}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not there yet, or no more than a cache that was damaged
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, data: dict[str, Any]) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(data), encoding="utf-8")
        os.replace(beside, path)
    except OSError:  # a run on a read-only or a full disk is read in full at every start
        beside.unlink(missing_ok=True)
