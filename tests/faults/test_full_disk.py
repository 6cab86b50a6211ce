"""A disk that is really full: a small tmpfs that a stage fills, and that grows when it has told so."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from conftest import STAGES

from llmkd import run
from llmkd.verify import units, verify_run

ROOM = "size=64m"


def mount(*words: str | Path) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 64 MB; its size may be set anew with `sized`."""
    place = tmp_path / "disk"
    place.mkdir()
    if not shutil.which("mount") or not mount("-t", "tmpfs", "-o", ROOM, "tmpfs", place):
        pytest.skip("nothing may be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def used(place: Path) -> int:
    """Bytes of the blocks that are taken."""
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def written(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def told(directory: Path) -> dict[str, str]:
    """What each unit holds; of what lies in stage 06, which tells seconds too, the scores alone."""
    found = {
        unit.relative_to(directory).as_posix(): run.told(run.manifest(unit)) for unit in units(directory)
    }
    if (directory / STAGES[-1]).is_dir():
        metrics = json.loads((directory / STAGES[-1] / "metrics.json").read_text())
        found[STAGES[-1]] = str({name: metrics[name]["log_loss"] for name in ("student", "quantized_tta")})
    return found


PARTS = {"02_teachers": ["--teacher=qwen", "--fold=1"], "03_distill": ["--only=student", "--fold=0"]}
UNITS = {"02_teachers": "02_teachers/qwen/fold1", "03_distill": "03_distill/gemma/fold0"}
CASES = [pytest.param(stage, 0, marks=pytest.mark.slow) for stage in STAGES] + [(one, 0.5) for one in STAGES]


@pytest.mark.parametrize(("stage", "share"), CASES)
def test_a_full_disk_is_one_line_and_a_larger_one_goes_on(
    stage: str, share: float, finished: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a byte left, and half of what the stage writes."""
    directory = disk / "run"
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(finished / earlier, directory / earlier)
    directory.mkdir(exist_ok=True)
    words = [f"run={directory}", *PARTS.get(stage, [])]
    room = used(disk) + int(share * written(finished / UNITS.get(stage, stage)))
    assert mount("-o", f"remount,size={max(room, 4096)}", disk)
    before = tiny.snapshot(directory)
    assert tiny.stage(stage, *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1, errors
    assert "No space left on device" in errors[0]
    assert "free some space, then the same command goes on" in errors[0]
    after = tiny.snapshot(directory)
    assert {name: after[name] for name in before} == before, "what was finished is untouched"
    new = {name.split("/fold")[0] for name in after.keys() - before.keys()}
    assert all(name.startswith(stage) for name in new), new
    assert mount("-o", f"remount,{ROOM}", disk)
    assert tiny.stage(stage, *words) == 0
    whole = told(finished)
    assert told(directory) == {name: whole[name] for name in told(directory)}
    assert verify_run(directory) == []
