"""Finished units: manifest last, atomic, fingerprinted, movable; and every damage refused."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from llmkd import run
from llmkd.config import Distill, Model, Teacher, science
from llmkd.errors import RunError

SETTINGS: dict[str, Any] = {"epochs": 2, "lora": {"r": 8}}
INPUTS = {"00_prepare": "abc"}


def make(directory: Path, text: str = "weights", settings: dict[str, Any] = SETTINGS) -> Path:
    with run.writing(directory, "02_teachers", settings, INPUTS, 7, alone=True) as unit:
        (unit.path / "deep").mkdir()
        (unit.path / "deep" / "model.bin").write_text(text)
        unit.rows["train"] = 3
        unit.metrics["best"] = 0.5
    return directory


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
    assert [path.name for path in tmp_path.iterdir()] == ["unit"]


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
    assert [path.name for path in tmp_path.iterdir()] == ["unit"]


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
        if (Path(path) / run.MANIFEST).exists():
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
    assert [path.name for path in unit.parent.iterdir()] == ["fold0"]


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
@pytest.mark.parametrize("section", [Distill, Teacher])
def test_a_fingerprint_does_not_change_with_the_machine(section: type, machine: dict[str, Any]) -> None:
    base = {"name": "llama", "model": "x"} if section is Teacher else {}
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


def test_a_manifest_without_its_fingerprint_does_not_stand(unit: Path) -> None:
    path = unit / run.MANIFEST
    data = json.loads(path.read_text())
    del data["fingerprint"]
    path.write_text(json.dumps(data))
    assert not run.stands(unit, run.fingerprint("02_teachers", SETTINGS, INPUTS))


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a finished directory .* python stages/00"):
        run.manifest(tmp_path / "none", "python stages/00")


def test_source_digest_follows_bytes_not_names(tmp_path: Path) -> None:
    one, two = tmp_path / "a-1.csv", tmp_path / "a-2.csv"
    one.write_text("x")
    two.write_text("y")
    both = run.source_digest(str(tmp_path / "a-*.csv"))
    assert run.source_digest(str(one)) != run.source_digest(str(two)) != both
    two.write_text("z")
    assert run.source_digest(str(tmp_path / "a-*.csv")) != both
    shutil.copy(one, tmp_path / "b.csv")
    assert run.source_digest(str(tmp_path / "b.csv")) == run.source_digest(str(one))


def test_source_digest_of_what_is_no_file_is_of_its_words() -> None:
    assert run.source_digest("arena:rows=10,seed=1") == run.source_digest("arena:rows=10,seed=1")
    assert run.source_digest("arena:rows=10,seed=1") != run.source_digest("arena:rows=10,seed=2")


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    run.write_json(path, {"b": 1, "a": Path("x")})
    assert json.loads(path.read_text()) == {"a": "x", "b": 1}
    circular: dict[str, Any] = {}
    circular["self"] = circular
    with pytest.raises(ValueError, match="Circular"):
        run.write_json(path, circular)
    assert json.loads(path.read_text()) == {"a": "x", "b": 1}
