"""Finished units: manifest last, atomic, fingerprinted, movable; and every damage refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmkd import digests, lock, run
from llmkd.config import science
from llmkd.errors import RunError
from llmkd.schema_distill import Distill
from llmkd.schema_models import Llm, Model

SETTINGS: dict[str, Any] = {"epochs": 2, "lora": {"r": 8}}
INPUTS = {"00_prepare": "abc"}


def make(directory: Path, text: str = "weights", settings: dict[str, Any] = SETTINGS) -> Path:
    with run.writing(directory, "02_teachers", settings, INPUTS, 7, alone=True) as unit:
        (unit.path / "deep").mkdir()
        (unit.path / "deep" / "model.bin").write_text(text)
        unit.rows["train"] = 3
        unit.metrics["best"] = 0.5
    return directory


def names(directory: Path) -> list[str]:
    """All but the cache of verified digests, which belongs to no unit."""
    return [path.name for path in directory.iterdir() if path.name != digests.VERIFIED]


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    return make(tmp_path / "runs" / "teacher" / "fold0")


def test_a_manifest_tells_what_was_made_from_what(unit: Path) -> None:
    found = run.manifest(unit)
    assert found["fingerprint"] == run.fingerprint("02_teachers", SETTINGS, INPUTS)
    assert found["files"]["deep/model.bin"]["bytes"] == len("weights")
    assert {key: found[key] for key in ("stage", "settings", "inputs", "seed", "rows", "metrics")} == {
        "stage": "02_teachers",
        "settings": SETTINGS,
        "inputs": INPUTS,
        "seed": 7,
        "rows": {"train": 3},
        "metrics": {"best": 0.5},
    }
    assert found["versions"]["torch"]
    assert found["seconds"] >= 0


def test_nothing_stands_under_its_name_before_it_is_whole(tmp_path: Path) -> None:
    directory = tmp_path / "unit"
    with run.writing(directory, "s", {}, {}, 0, alone=True) as unit:
        (unit.path / "file").write_text("x")
        assert not directory.exists()
        assert not (unit.path / run.MANIFEST).exists()
    assert run.manifest(directory)
    assert names(tmp_path) == ["unit"]


def test_the_manifest_is_written_after_the_files_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, write, rename = run._sync, run.write_json, os.rename
    monkeypatch.setattr(run, "_sync", lambda path: (steps.append(f"sync {path.name}"), sync(path))[1])
    monkeypatch.setattr(
        run, "write_json", lambda path, data: (steps.append("manifest"), write(path, data))[1]
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append("rename"), rename(a, b))[1])
    make(tmp_path / "unit")
    assert steps[:3] == ["sync model.bin", "manifest", "rename"]


def interrupted(directory: Path) -> None:
    def write() -> None:
        with run.writing(directory, "s", {}, {}, 0, alone=True) as unit:
            (unit.path / "model.bin").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()


def test_an_exception_leaves_no_finished_directory(tmp_path: Path) -> None:
    interrupted(tmp_path / "unit")
    assert not (tmp_path / "unit").exists()
    assert not run.stands(tmp_path / "unit", run.fingerprint("s", {}, {}))


def test_a_half_written_unit_leaves_nothing_in_the_next(tmp_path: Path) -> None:
    interrupted(tmp_path / "unit")
    make(tmp_path / "unit")
    assert set(run.manifest(tmp_path / "unit")["files"]) == {"deep/model.bin"}
    assert names(tmp_path) == ["unit"]


def test_an_old_unit_stays_until_the_new_one_is_whole(unit: Path) -> None:
    before = run.digest(unit)
    interrupted(unit)
    assert run.digest(unit) == before
    assert run.stands(unit, run.fingerprint("02_teachers", SETTINGS, INPUTS))
    make(unit, "other")
    assert run.digest(unit) != before


def test_a_kill_while_the_old_tree_is_removed_leaves_the_new_one(
    unit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def killed(path: Path, **kwargs: Any) -> None:
        if (Path(path) / "deep").exists():
            (Path(path) / "deep" / "model.bin").unlink()
            raise KeyboardInterrupt
        remove(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        make(unit, "new weights")
    assert (unit / "deep" / "model.bin").read_text() == "new weights"
    assert run.manifest(unit)
    monkeypatch.undo()
    make(unit, "newer")
    assert names(unit.parent) == ["fold0"]


@pytest.mark.parametrize(
    "other",
    [
        ("03_distill", SETTINGS, INPUTS),
        ("02_teachers", {**SETTINGS, "epochs": 3}, INPUTS),
        ("02_teachers", {**SETTINGS, "lora": {"r": 16}}, INPUTS),
        ("02_teachers", SETTINGS, {"00_prepare": "abd"}),
        ("02_teachers", SETTINGS, {**INPUTS, "01_pretrain/llama": "x"}),
    ],
)
def test_a_fingerprint_changes_with_stage_settings_and_inputs(
    other: tuple[str, dict, dict], unit: Path
) -> None:
    assert run.fingerprint(*other) != run.fingerprint("02_teachers", SETTINGS, INPUTS)
    assert not run.stands(unit, run.fingerprint(*other))


def test_a_fingerprint_depends_on_no_order_of_keys() -> None:
    turned = dict(reversed(SETTINGS.items()))
    assert run.fingerprint("s", turned, INPUTS) == run.fingerprint("s", SETTINGS, INPUTS)


@pytest.mark.parametrize(
    "machine",
    [{"batch_tokens": 99}, {"deepspeed": "configs/deepspeed/zero2.json"}, {"gradient_checkpointing": True}],
)
@pytest.mark.parametrize("section", [Distill, Llm])
def test_a_fingerprint_does_not_change_with_the_machine(section: type, machine: dict[str, Any]) -> None:
    base = {"name": "llama", "model": "x"} if section is Llm else {}
    one, two = (run.fingerprint("s", science(section(**base, **more)), {}) for more in ({}, machine))
    assert one == two
    assert run.fingerprint("s", science(section(**base, learning_rate=0.5)), {}) != one


def test_science_reaches_into_nested_sections() -> None:
    model = science(Model(name="m", model="x"))
    assert model["lora"]["r"] == 64
    assert science(Model(name="m", model="x", lora={"r": 8}))["lora"]["r"] == 8


def test_a_changed_unit_says_so_and_an_absent_one_does_not(
    unit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not run.stands(unit.with_name("fold1"), "mark")
    assert capsys.readouterr().out == ""
    assert not run.stands(unit, "mark")
    assert f"{unit}: config or inputs changed" in capsys.readouterr().out


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move])
def test_a_moved_or_copied_run_stays_valid(unit: Path, move: Any, tmp_path: Path) -> None:
    before, root = run.digest(unit), tmp_path / "runs"
    assert str(tmp_path) not in (unit / run.MANIFEST).read_text()
    move(root, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "teacher" / "fold0"
    assert run.digest(moved) == before
    assert run.stands(moved, run.fingerprint("02_teachers", SETTINGS, INPUTS))


def test_a_digest_is_of_contents_alone(unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    assert run.digest(make(unit.with_name("later"))) == run.digest(unit)
    assert run.digest(make(unit.with_name("other"), "weighty")) != run.digest(unit)


def damage(unit: Path, how: str) -> None:
    file, manifest = unit / "deep" / "model.bin", unit / run.MANIFEST
    if how == "missing file":
        file.unlink()
    elif how == "cut file":
        file.write_text("wei")
    elif how == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(how)


@pytest.mark.parametrize(
    "how",
    [
        "missing file",
        "cut file",
        "no manifest",
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"files": {"deep/model.bin": 7}}',
    ],
)
def test_a_damaged_unit_is_refused_in_one_line_with_its_remedy(unit: Path, how: str) -> None:
    damage(unit, how)
    for check in (run.digest, run.manifest):
        with pytest.raises(RunError, match=r"\A[^\n]*\Z") as error:
            check(unit)
    assert str(unit) in str(error.value)
    with pytest.raises(RunError, match="make tea"):
        run.manifest(unit, "make tea")


@pytest.mark.parametrize("key", ["fingerprint", "metrics", "seal", "inputs"])
@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_manifest_that_was_edited_is_refused(key: str, how: str, unit: Path) -> None:
    path = unit / run.MANIFEST
    data = json.loads(path.read_text())
    del data[key]
    path.write_text(json.dumps(data if how == "gone" else {**data, key: "x"}))
    with pytest.raises(RunError, match="damaged"):
        run.stands(unit, run.fingerprint("02_teachers", SETTINGS, INPUTS))


def reseal(unit: Path, **changes: Any) -> None:
    """What an attacker who knows the format can write."""
    data = {**json.loads((unit / run.MANIFEST).read_text()), **changes}
    del data["seal"]
    run.write_json(unit / run.MANIFEST, {**data, "seal": run._seal(data)})


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "deep/../../x"])
def test_a_manifest_reaches_no_file_outside_its_unit(name: str, unit: Path) -> None:
    reseal(unit, files={name: {"sha256": "0", "bytes": 1}})
    with pytest.raises(RunError, match="damaged"):
        run.digest(unit)


def flip(path: Path, at: int = 0) -> None:
    """One bit turned, in place, at the same size and time."""
    data, times = bytearray(path.read_bytes()), path.stat()
    data[at] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_flipped_bit_is_found_also_after_the_file_was_verified(unit: Path) -> None:
    run.digest(unit)
    time.sleep(0.02)  # a clock tick: the change has another ctime
    flip(unit / "deep" / "model.bin")
    with pytest.raises(RunError, match=r"deep/model.bin: its bytes are not those .* remove .* make tea\Z"):
        run.digest(unit, "make tea")
    with pytest.raises(RunError, match=r"run: python stages/02_teachers.py with this run's config\Z"):
        run.digest(unit)
    flip(unit / "deep" / "model.bin")
    assert run.digest(unit)


def test_a_file_is_read_once_and_then_only_after_a_change(
    unit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    entry = digests.file_entry
    monkeypatch.setattr(digests, "file_entry", lambda path: (read.append(path.name), entry(path))[1])
    run.digest(unit)
    assert read == [], "what was just written need not be read"
    moved = Path(shutil.copytree(unit.parent.parent, unit.parent.parent.with_name("there")))
    for _ in range(2):
        run.digest(moved / "teacher" / "fold0")
    assert read == ["model.bin"], "a copy is another file"
    for cache in unit.parents[2].rglob(f"{digests.VERIFIED}/**/*.json"):
        cache.write_text("[]")
    run.digest(unit)
    assert read == ["model.bin"] * 2


def test_a_run_on_a_read_only_disk_is_verified_without_a_cache(
    unit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(unit.parent / digests.VERIFIED)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert run.digest(unit)
    time.sleep(0.02)
    flip(unit / "deep" / "model.bin")
    with pytest.raises(RunError, match="its bytes are not those"):
        run.digest(unit)


def test_checkpoints_outlive_an_interruption_and_go_with_the_last_of_it(tmp_path: Path) -> None:
    def attempt(settings: dict[str, Any], fails: bool) -> list[str]:
        with run.writing(tmp_path / "unit", "s", settings, {}, 0, alone=True) as unit:
            found = sorted(path.name for path in unit.path.rglob("*.ckpt"))
            (unit.checkpoints / "step1.ckpt").write_text("x")
            (unit.path / "half.ckpt").write_text("x")
            if fails:
                raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        attempt({"a": 1}, True)
    with pytest.raises(KeyboardInterrupt):
        attempt({"a": 2}, True)
    assert attempt({"a": 2}, False) == ["step1.ckpt"], "of the same settings, and no half-written file"
    assert not (tmp_path / "unit" / run.CHECKPOINT).exists()
    assert set(run.manifest(tmp_path / "unit")["files"]) == {"half.ckpt"}
    with pytest.raises(KeyboardInterrupt):
        attempt({"a": 1}, True)
    assert attempt({"a": 3}, False) == [], "another unit's checkpoints are no start"


@pytest.mark.parametrize("at", ["file_entry", "write_json", "_replace"])
def test_what_is_whole_among_the_checkpoints_outlives_a_kill_until_the_unit_stands(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt() -> list[str]:
        with run.writing(tmp_path / "unit", "s", {}, {}, 0, alone=True) as unit:
            cache = unit.checkpoints / "cache"
            found = sorted(path.name for path in cache.glob("*"))
            cache.mkdir(exist_ok=True)
            (cache / "shard").write_text("dear")
            unit.whole.append("cache")
        return found

    write = run.write_json

    def killed(path: Path, *more: Any) -> None:
        if path.name == run.WHOLE_NOTE:  # the manifest is what comes after it
            return write(path, *more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, at, killed)  # while its bytes are read, and ever later
        with pytest.raises(KeyboardInterrupt):
            attempt()
    assert attempt() == ["shard"]
    assert set(run.manifest(tmp_path / "unit")["files"]) == {"cache/shard"}
    assert run.digest(tmp_path / "unit")
    assert not (tmp_path / "unit" / run.CHECKPOINT).exists()


def test_a_kill_between_the_name_and_the_cleaning_leaves_nothing_for_long(unit: Path) -> None:
    (unit / run.CHECKPOINT).mkdir()
    (unit / run.CHECKPOINT / "fingerprint").write_text("x")
    assert run.stands(unit, run.fingerprint("02_teachers", SETTINGS, INPUTS))
    assert not (unit / run.CHECKPOINT).exists()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (ValueError("space"), False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error: Exception, full: bool) -> None:
    assert run.is_disk_full(error) is full


HOLD = """
import sys, time
from pathlib import Path
from llmkd import run
with run.writing(Path(sys.argv[1]), "s", {}, {}, 0, alone=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_is_told_who_holds_a_unit(tmp_path: Path) -> None:
    """Other units are free; a dead process holds nothing, killed as it may be."""
    unit = tmp_path / "unit"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(unit)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"unit: held by process {holder.pid} on \S+ since 20.*; wait"):
            make(unit)
        assert run.manifest(make(tmp_path / "other"))
        assert (tmp_path / "unit.partial").exists(), "the refused one touched nothing"
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / "unit.lock").exists()
    assert run.manifest(make(unit))
    assert sorted(names(tmp_path)) == ["other", "unit"]


def test_a_lock_without_its_holder_s_words_is_a_lock(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w+b") as file:
        assert lock._holder(file.fileno()) == "another process"


def test_a_disk_without_locks_says_so_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    assert run.manifest(make(tmp_path / "unit"))
    assert "this disk knows no locks" in capsys.readouterr().out


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a finished directory .* python stages/00"):
        run.manifest(tmp_path / "none", "python stages/00")


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    run.write_json(path, {"b": 1, "a": Path("x")})
    assert json.loads(path.read_text()) == {"a": "x", "b": 1}
    circular: dict[str, Any] = {}
    circular["self"] = circular
    with pytest.raises(ValueError, match="Circular"):
        run.write_json(path, circular)
    assert json.loads(path.read_text()) == {"a": "x", "b": 1}
