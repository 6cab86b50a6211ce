"""Every kind of file that a stage reads, damaged in every way: named before use, nothing finished touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import bad_files as bad
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import STAGES

from llmkd import cli, run
from llmkd.verify import units, verify_run

# file -> (the first stage that reads it, a valid file of the same kind that was made from something else)
READ = {
    "00_prepare/rows.parquet": ("01_pretrain", "other/rows.parquet"),
    "00_prepare/manifest.json": ("01_pretrain", "other/manifest.json"),
    "01_pretrain/llama/model/model.safetensors": ("02_teachers", "01_pretrain/qwen/model/model.safetensors"),
    "01_pretrain/llama/model/config.json": ("02_teachers", "01_pretrain/qwen/model/config.json"),
    "01_pretrain/gemma/model/tokenizer.json": ("03_distill", "01_pretrain/llama/model/tokenizer.json"),
    "01_pretrain/gemma/manifest.json": ("03_distill", "01_pretrain/llama/manifest.json"),
    "02_teachers/qwen/fold0/logits.parquet": ("03_distill", "02_teachers/llama/fold0/logits.parquet"),
    "02_teachers/qwen/fold1/manifest.json": ("03_distill", "02_teachers/qwen/fold0/manifest.json"),
    "03_distill/gemma/fold0/adapter/adapter_model.safetensors": (
        "04_merge",
        "03_distill/gemma/fold1/adapter/adapter_model.safetensors",
    ),
    "03_distill/gemma/fold1/adapter/adapter_config.json": (
        "04_merge",
        "01_pretrain/gemma/model/config.json",
    ),
    "04_merge/model/model.safetensors": ("05_quantize", "01_pretrain/gemma/model/model.safetensors"),
    "04_merge/model/config.json": ("05_quantize", "01_pretrain/gemma/model/config.json"),
    "05_quantize/model/model.safetensors": ("06_evaluate", "04_merge/model/model.safetensors"),
    "01_pretrain/gemma/model/tokenizer_config.json": (
        "03_distill",
        "01_pretrain/gemma/model/config.json",
    ),
    "04_merge/model/llmkd.json": ("05_quantize", "04_merge/model/config.json"),
    "05_quantize/model/tokenizer.json": ("06_evaluate", "01_pretrain/llama/model/tokenizer.json"),
    "05_quantize/manifest.json": ("06_evaluate", "04_merge/manifest.json"),
    "03_distill/gemma-baseline/fold0/logits.parquet": (
        "06_evaluate",
        "03_distill/gemma-baseline/fold1/logits.parquet",
    ),
}


def flip(file: Path, other: Path) -> None:
    """A byte in the middle; of a manifest one of its fingerprint: a float's last digit may change nothing."""
    data = bytearray(file.read_bytes())
    mark = data.find(b'"fingerprint": "') if file.name == run.MANIFEST else -1
    data[len(data) // 2 if mark < 0 else mark + 20] ^= 1
    file.write_bytes(bytes(data))


def cut(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose(file: Path, other: Path) -> None:
    file.unlink()


def swap(file: Path, other: Path) -> None:
    shutil.copy2(other, file)


WAYS: list[Callable[[Path, Path], None]] = [flip, cut, lose, swap]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 00 of another run, on other rows."""
    directory = tmp_path_factory.mktemp("other")
    assert tiny.stage("00_prepare", f"run={directory}", "task.train=arena:rows=96,seed=7") == 0
    return directory / "00_prepare"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", READ)
def test_damage_is_named_before_use(
    name: str,
    way: Callable[[Path, Path], None],
    copy: Path,
    other: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage, counterpart = READ[name]
    source = other / counterpart.removeprefix("other/") if "other/" in counterpart else copy / counterpart
    way(copy / name, source)
    for later in STAGES[STAGES.index(stage) :]:  # none of them is done: the damage cannot hide behind one
        shutil.rmtree(copy / later)
    before = tiny.snapshot(copy)
    assert tiny.stage(stage, f"run={copy}") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    # without its own manifest a unit is none, and with another's its files are not those that are told of
    unit = name.endswith(run.MANIFEST) and way in (lose, swap)
    assert str((copy / name).parent if unit else copy / name) in errors[0]
    assert f"run: python stages/{name.split('/')[0]}.py" in errors[0]
    assert tiny.snapshot(copy) == before


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs over texts up to their teacher's cache of next tokens: the configs, by the words they read."""
    configs = {}
    for what in ("some words", "many words"):
        configs[what] = bad.texts(tmp_path_factory.mktemp("texts"), what)
        for stage in STAGES[:3]:
            assert tiny.stage(stage, config=configs[what]) == 0
    return configs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["shard-00000.safetensors", "manifest.json"])
def test_a_damaged_cache_of_next_tokens_is_named_before_use(
    name: str,
    way: Callable[[Path, Path], None],
    captured: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Swapped: by the same teacher's, of another run's rows."""
    config, other = captured.values()
    directory = Path(shutil.copytree(config.parent / "run", tmp_path / "run"))
    file = Path("02_teachers") / "big" / "fold0" / "cache" / name
    way(directory / file, other.parent / "run" / file)
    before = tiny.snapshot(directory)
    capsys.readouterr()
    assert tiny.stage("03_distill", f"run={directory}", config=config) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(directory / file) in errors[0]
    assert "run: python stages/02_teachers.py" in errors[0]
    assert tiny.snapshot(directory) == before


def test_a_mended_file_goes_on(copy: Path) -> None:
    file = copy / "02_teachers" / "qwen" / "fold0" / "logits.parquet"
    whole = file.read_bytes()
    flip(file, file)
    assert tiny.stage("03_distill", f"run={copy}") == 2
    file.write_bytes(whole)
    before = tiny.snapshot(copy)
    assert tiny.stage("03_distill", f"run={copy}") == 0
    assert tiny.snapshot(copy) == before


def test_another_unit_under_this_one_s_name_is_refused(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole and sealed, but another fold's, and so of another fingerprint."""
    teacher = copy / "02_teachers" / "llama"
    shutil.rmtree(teacher / "fold0")
    shutil.copytree(teacher / "fold1", teacher / "fold0")
    assert tiny.stage("03_distill", f"run={copy}") == 2
    error = capsys.readouterr().err
    assert f"{teacher / 'fold0'}: made from another config or other inputs" in error
    assert "run: python stages/02_teachers.py" in error


@pytest.mark.parametrize("way", WAYS)
def test_verify_finds_damage_in_every_unit_at_once(
    way: Callable[[Path, Path], None], copy: Path, other: Path
) -> None:
    assert verify_run(copy) == []
    damaged = {}
    for unit in units(copy):
        file = next(unit / name for name in sorted(run.manifest(unit)["files"]) if "token" not in name)
        damaged[unit] = file
    for file in damaged.values():
        way(file, copy / "00_prepare" / "rows.parquet" if file.name != "rows.parquet" else other / file.name)
    before = tiny.snapshot(copy)
    found = verify_run(copy)
    assert len(found) == len(damaged) == 15
    for problem, (unit, file) in zip(found, damaged.items(), strict=True):
        assert problem.startswith(f"{file}: ")
        assert f"remove {unit} and run: python stages/" in problem
        assert "\n" not in problem
    assert tiny.snapshot(copy) == before


def test_verify_follows_what_was_made_from_what(copy: Path) -> None:
    shutil.rmtree(copy / "02_teachers" / "qwen" / "fold1")
    shutil.rmtree(copy / "04_merge")
    (copy / "05_quantize" / "model" / "extra.py").write_text("")
    assert tiny.stage("00_prepare", f"run={copy}", "task.train=arena:rows=96,seed=7") == 0
    found = verify_run(copy)
    student = copy / "03_distill" / "gemma" / "fold1"
    assert f"{student}: made from {copy / '02_teachers/qwen/fold1'}, which is not here" in "\n".join(found)
    assert f"{copy / '05_quantize'}: made from {copy / '04_merge'}, which is not here" in "\n".join(found)
    assert f"{copy / '05_quantize/model/extra.py'}: not a file of this unit; remove it" in found
    stale = [line for line in found if f"made from another {copy / '00_prepare'} than lies here" in line]
    assert len(stale) == 3 + 3 + 4 + 1 + 1, "models, teachers, students, the artifact, its scores"


def test_verify_finds_settings_that_are_not_the_fingerprint_s(copy: Path) -> None:
    path = copy / "04_merge" / run.MANIFEST
    data = json.loads(path.read_text())
    del data["seal"]
    data["settings"]["merge"]["how"] = "factors"
    path.write_text(json.dumps({**data, "seal": run._seal(data)}))
    assert [line.split(";")[0] for line in verify_run(copy)] == [
        f"{path}: its fingerprint is not that of its settings and inputs"
    ]


def test_a_logits_cache_that_says_something_else_than_its_manifest(copy: Path) -> None:
    """Written anew by a tool that means well: valid, and still not what was made here."""
    file = copy / "02_teachers" / "qwen" / "fold0" / "logits.parquet"
    pq.write_table(pq.read_table(file), file, compression="none")
    assert tiny.stage("03_distill", f"run={copy}") == 2


def test_the_command_tells_of_each_problem_on_a_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["verify", str(copy)])
    assert capsys.readouterr().out == f"{copy}: 15 units, all whole\n"
    lose(copy / "04_merge" / "model" / "config.json", copy)
    flip(copy / "00_prepare" / "rows.parquet", copy)
    with pytest.raises(SystemExit, match=r"\A1\Z"):
        cli.main(["verify", str(copy)])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["error", str(copy / "00_prepare" / "rows.parquet")],
        ["error", str(copy / "04_merge" / "model" / "config.json")],
    ]
    with pytest.raises(SystemExit, match=r"\A2\Z"):
        cli.main(["verify", str(copy / "nowhere")])
    assert "no finished unit here; name a run directory" in capsys.readouterr().err
