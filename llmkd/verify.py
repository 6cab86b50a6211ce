"""Every finished unit of a run held against its manifest; every byte is read, whatever was seen before."""

from collections.abc import Iterator
from pathlib import Path

from llmkd import run
from llmkd.digests import VERIFIED, file_entry
from llmkd.errors import RunError

UNFINISHED = (".partial", ".replaced")


def verify_run(directory: Path) -> list[str]:
    """One line a problem, with its remedy: files missing, damaged or not a unit's own; units made from
    other inputs than those that lie here. Nothing is changed. Raises RunError where there is no run."""
    found = list(units(directory))
    if not found:
        raise RunError(f"{directory}: no finished unit here; name a run directory")
    return [problem for unit in found for problem in (*_own(unit), *_chain(directory, unit))]


def units(directory: Path) -> Iterator[Path]:
    """The finished units below a directory, in order."""
    if (directory / run.MANIFEST).is_file():
        yield directory
    elif directory.is_dir():
        for path in sorted(directory.iterdir()):
            if path.is_dir() and path.name != VERIFIED and path.suffix not in UNFINISHED:
                yield from units(path)


def _own(unit: Path) -> Iterator[str]:
    """A unit against its own manifest."""
    try:
        data = run.manifest(unit)
    except RunError as error:
        yield str(error)
        return
    remedy = f"remove {unit} and run: python stages/{data['stage']}.py with this run's config"
    if run.fingerprint(data["stage"], data["settings"], data["inputs"]) != data["fingerprint"]:
        yield f"{unit / run.MANIFEST}: its fingerprint is not that of its settings and inputs; {remedy}"
    for name, entry in data["files"].items():
        if file_entry(unit / name) != entry:
            yield f"{unit / name}: its bytes are not those its {run.MANIFEST} tells of (sha256); {remedy}"
    known = {run.MANIFEST, *data["files"]}
    for path in sorted(path for path in unit.rglob("*") if path.is_file()):
        name = path.relative_to(unit).as_posix()
        if name not in known and not name.startswith(f"{run.CHECKPOINT}/"):
            yield f"{path}: not a file of this unit; remove it"


def _chain(directory: Path, unit: Path) -> Iterator[str]:
    """A unit against the units that it says it was made from."""
    try:
        data = run.manifest(unit)
    except RunError:  # told of by `_own`
        return
    for name, digest in data["inputs"].items():
        source = directory / name
        if not name[:2].isdigit():  # a raw file or a checkpoint from outside the run
            continue
        if not (source / run.MANIFEST).is_file():
            yield f"{unit}: made from {source}, which is not here; run its stage, then {data['stage']}"
        elif _digest(source) not in (digest, None):
            yield f"{unit}: made from another {source} than lies here; run: python stages/{data['stage']}.py"


def _digest(unit: Path) -> str | None:
    """As its manifest tells it; None where that is damaged, which is a problem of its own."""
    try:
        return run.told(run.manifest(unit))
    except RunError:
        return None
