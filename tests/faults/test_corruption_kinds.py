"""Every file of every kind of unit, damaged in every way: the next stage names it before use, and touches
nothing. What `test_corruption` does file by file for one run, here for each kind of run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import bad_files as bad
import pytest
import test_ways as ways
import tiny
from conftest import STAGES
from test_corruption import WAYS, lose, swap
from test_ways_ranks import PEER, TWO_LAYERS

from llmkd import cli, run
from llmkd.verify import units

REPORT = "report"
NEXT = {
    "00_prepare": "01_pretrain",
    "02_teachers": "03_distill",
    "05_quantize": "06_evaluate",
    "06_evaluate": REPORT,
}
HERE = {  # what stands in each kind of run, beside what all have: that the walk has seen it
    "pairs": {"adapter_model.safetensors", "generation_config.json", "llmkd.json", "metrics.json"},
    "tabular": {"model.txt", "features.json", "predictions.parquet"},
    "texts": {"shard-00000.safetensors", "metrics.json"},
    "depths": {"exits.safetensors"},
    "peers": {"peers/peer/logits.parquet", "peers/peer/adapter/adapter_model.safetensors"},
}


def tabular(root: Path, finished: Path) -> tuple[Path, list[str]]:
    """Boosted trees, a net, and the scalers that were fitted for it."""
    for seed, rows in ((1, 160), (2, 60), (3, 40)):
        ways.tabular(root, seed, rows)
    path = root / "tabular.yaml"
    path.write_text(ways.TABULAR.format(run=root / "run", root=root).replace("TINY", ways.TINY))
    return path, []


def depths(root: Path, finished: Path) -> tuple[Path, list[str]]:
    return _without_teachers(root, finished, "distill.method=self_distillation")


def peers(root: Path, finished: Path) -> tuple[Path, list[str]]:
    return _without_teachers(root, finished, "distill.method=mutual", PEER)


def _without_teachers(root: Path, finished: Path, *words: str) -> tuple[Path, list[str]]:
    shutil.copytree(finished / "00_prepare", root / "run" / "00_prepare")
    short = ["teachers=[]", "pretrain=[]", "quantize=null", "distill.baseline=false", "distill.epochs=1"]
    return tiny.CONFIG, [*words, *TWO_LAYERS, *short]


MADE = {"tabular": tabular, "depths": depths, "peers": peers}


@pytest.fixture(scope="module")
def whole(
    request: pytest.FixtureRequest, finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path, list[str]]:
    """All stages of one kind of run: its kind, its directory, its config and the overrides."""
    if request.param == "pairs":
        return "pairs", finished, tiny.CONFIG, []
    if request.param == "texts":
        root = request.getfixturevalue("finished_lm")
        return "texts", root / "run", root / "lm.yaml", []
    root = tmp_path_factory.mktemp(request.param)
    config, words = MADE[request.param](root, finished)
    for stage in STAGES:
        assert tiny.stage(stage, f"run={root / 'run'}", *words, config=config) == 0, stage
    return request.param, root / "run", config, words


def reader(root: Path, place: Path) -> str:
    """The first stage that reads the unit at `place` in the run."""
    stage, name = place.parts[0], place.parts[-1]
    if stage == "01_pretrain":
        return "02_teachers" if (root / "02_teachers" / name).exists() else "03_distill"
    if stage == "03_distill":
        return "06_evaluate" if place.parts[1].endswith("-baseline") else "04_merge"
    if stage == "04_merge":
        return "05_quantize" if (root / "05_quantize").exists() else "06_evaluate"
    return NEXT[stage]


def another(root: Path, file: Path) -> Path:
    """A whole file of other contents from a whole run: of the same name if there is one, else of the same
    kind, else any."""
    found = [
        one for pattern in (file.name, f"*{file.suffix}", "*.json") for one in sorted(root.rglob(pattern))
    ]
    return next(one for one in found if differs(one, file))


def differs(one: Path, file: Path) -> bool:
    return ".verified" not in one.parts and one.read_bytes() != file.read_bytes()


def refused(stage: str, root: Path, words: list[str], config: Path) -> int:
    if stage != REPORT:
        return tiny.stage(stage, f"run={root}", *words, config=config)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(root)])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "whole",
    [
        "pairs",
        "tabular",
        "texts",
        pytest.param("depths", marks=pytest.mark.slow),
        pytest.param("peers", marks=pytest.mark.slow),
    ],
    indirect=True,
)
def test_damage_of_any_file_is_named_before_use(
    way: Callable[[Path, Path], None],
    whole: tuple[str, Path, Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind, original, config, words = whole
    root = Path(shutil.copytree(original, tmp_path / "run"))
    found = [unit for unit in units(root) if unit.name != "fold1"]
    asked = {unit: reader(root, unit.relative_to(root)) for unit in found}
    seen = set[str]()
    for stage in (REPORT, *reversed(STAGES)):
        if stage != REPORT:  # the stages behind it are not done either: the damage cannot hide behind one
            shutil.rmtree(root / stage, ignore_errors=True)
        for unit in (unit for unit, by in asked.items() if by == stage):
            alone = [f"--teacher={unit.name}"] if stage == "02_teachers" else []  # it reads one after another
            for file in sorted(path for path in unit.rglob("*") if path.is_file()):
                seen |= {file.name, str(file.relative_to(unit))}
                data = file.read_bytes()
                way(file, another(original, file))
                before = tiny.snapshot(root)
                capsys.readouterr()
                assert refused(stage, root, [*words, *alone], config) == 2, file
                (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
                lost = file.name == run.MANIFEST and way in (lose, swap)  # then there is no such unit
                assert str(unit if lost else file) in error
                assert f"run: python stages/{unit.relative_to(root).parts[0]}.py" in error
                assert tiny.snapshot(root) == before
                file.write_bytes(data)
    assert seen >= HERE[kind] | {run.MANIFEST, "rows.parquet", "model.safetensors", "config.json"}


def judge(root: Path, finished: Path) -> tuple[Path, str]:
    """A file of another tool's verdicts."""
    file = bad.said()(root, finished)
    return file, f"teachers=[{{kind: file, name: judge, path: {file}, probabilities: [pa, pb, pt]}}]"


def own_model(root: Path, finished: Path) -> tuple[Path, str]:
    """A checkpoint that lies outside the run."""
    path = shutil.copytree(finished / "01_pretrain" / "llama" / "model", root / "model")
    teacher = f"{{name: judge, model: {path}, lora: {{r: 2, alpha: 4}}, batch_rows: 32, epochs: 0.2}}"
    return path / "model.safetensors", f"teachers=[{teacher}]"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("made", [judge, own_model])
def test_what_lies_outside_the_run_and_changed_is_not_what_a_teacher_is_of(
    made: Callable[[Path, Path], tuple[Path, str]],
    way: Callable[[Path, Path], None],
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has no manifest that would tell damage from a new version: either way the teacher is stale."""
    root = tmp_path / "run"
    for stage in ("00_prepare", "01_pretrain"):
        shutil.copytree(finished / stage, root / stage)
    file, teacher = made(tmp_path, finished)
    words = [f"run={root}", teacher, ways.PRETRAIN]
    assert tiny.stage("02_teachers", *words, "--fold=0") == 0
    way(file, finished / "01_pretrain" / "qwen" / "model" / "model.safetensors")
    before = tiny.snapshot(root)
    capsys.readouterr()
    assert tiny.stage("03_distill", *words, "--fold=0") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{root / '02_teachers/judge/fold0'}: made from another config or other inputs" in error
    assert "run: python stages/02_teachers.py" in error
    assert tiny.snapshot(root) == before
