"""Units that are cut off between trainings: in a capture of logits, a merge, a quantization.

What is whole is kept, what is half is made anew, and the unit ends as the one that nothing disturbed.
"""

import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import bad_files as bad
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import STAGES

from llmkd import capture, checkpoint, resume, run, shards
from llmkd.verify import verify_run


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs but what ends with the process."""


def begun(finished: Path, directory: Path, stage: str) -> Path:
    """A copy of the run up to a stage."""
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(finished / earlier, directory / earlier)
    return directory


def killed(stage: str, *words: str) -> None:
    with pytest.raises(Killed):
        tiny.stage(stage, *words)


@pytest.mark.parametrize(("minutes", "view"), [(0, "in_sample"), (10, "oof"), (10, "in_sample")])
def test_a_capture_of_logits_asks_only_for_the_rest_and_trains_nothing_again(
    minutes: int, view: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier's: its training is whole by then; what was found is saved by the minute, and each view
    as soon as it is whole. Killed when a view is saved for the second time, or with its last row."""
    directory = begun(finished, tmp_path, "02_teachers")
    words = [f"run={directory}", "--teacher=qwen", "--fold=1", "teachers.qwen.batch_tokens=500"]
    words.append(f"teachers.qwen.checkpoint_minutes={minutes}")
    keeping, write = resume.keeping, checkpoint.write
    known: list[int] = []

    def counting(keep: Path | None, minutes: float) -> Any:
        found, save = keeping(keep, minutes)
        if keep:
            known.append(len(found))
        return found, save

    def dying(at: Path, step: int, *rest: Any) -> None:
        write(at, step, *rest)
        if at.parent.name == view and step > 20:
            raise Killed

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("llmkd.train.keeping", counting)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", dying)
        killed("02_teachers", *words)
    assert not (directory / "02_teachers" / "qwen" / "fold1").exists()
    known.clear()
    monkeypatch.setattr("llmkd.steps.StepTrainer.train", refuse)
    assert tiny.stage("02_teachers", *words) == 0
    unit = directory / "02_teachers" / "qwen" / "fold1"
    rows = run.manifest(unit)["rows"]
    oof, in_sample, test = known
    assert (oof, test) == (rows["oof"], 0), "one view was whole, one not begun"
    if minutes:
        assert in_sample == (rows["in_sample"] if view == "in_sample" else 0)
    else:
        assert 20 < in_sample < rows["in_sample"]
    assert verify_run(directory) == []
    same_logits(unit, finished / "02_teachers" / "qwen" / "fold1")


def same_logits(one: Path, two: Path) -> None:
    found = []
    for unit in (one, two):
        rows = pq.read_table(unit / "logits.parquet").to_pylist()
        assert len({(row["view"], row["id"]) for row in rows}) == len(rows)
        found.append({(row["view"], row["id"]): row["logits"] for row in rows})
    assert found[0].keys() == found[1].keys()
    for key, values in found[0].items():
        np.testing.assert_allclose(values, found[1][key], atol=1e-5)


def test_a_capture_of_next_tokens_keeps_its_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A language model's: the shard that was cut off is made anew, those before it are not."""
    config = bad.texts(tmp_path)
    for stage in STAGES[:2]:
        assert tiny.stage(stage, config=config) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "undisturbed")
    monkeypatch.setattr(capture, "cache_teacher", partial(capture.cache_teacher, shard_tokens=150))
    assert tiny.stage("02_teachers", f"run={tmp_path / 'undisturbed'}", config=config) == 0
    write, made = capture.write_shard, list[int]()

    def dying(at: Path, index: int, *rest: Any) -> None:
        if index == 2:
            raise Killed
        made.append(index)
        write(at, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(capture, "write_shard", dying)
        with pytest.raises(Killed):
            tiny.stage("02_teachers", config=config)
    assert made == [0, 1]
    made.clear()

    def counting(at: Path, index: int, *rest: Any) -> None:
        made.append(index)
        write(at, index, *rest)

    monkeypatch.setattr(capture, "write_shard", counting)
    assert tiny.stage("02_teachers", config=config) == 0
    assert made == list(range(2, made[-1] + 1))
    units = [tmp_path / name / "02_teachers" / "big" / "fold0" for name in ("run", "undisturbed")]
    assert run.told(run.manifest(units[0])) == run.told(run.manifest(units[1])), "byte by byte"


@pytest.mark.slow
def test_a_capture_of_next_tokens_that_kill_9_ended_goes_on_behind_its_last_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process, killed while its third shard lay there without its entry, and again in its fourth."""
    config = bad.texts(tmp_path)
    for stage in STAGES[:2]:
        assert tiny.stage(stage, config=config) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "undisturbed")
    half = tmp_path / "run" / "02_teachers" / "big" / "fold0.partial"
    script = [str(tiny.ROOT / "stages" / "02_teachers.py"), "--config", str(config)]
    before: dict[str, tuple[int, bytes]] = {}
    for index in (2, 3):
        dying = [sys.executable, str(Path(__file__).with_name("killed_capture.py")), "100", str(index)]
        done = subprocess.run([*dying, *script], check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        found = shards_of(half)
        assert sum(name.endswith(".json") for name in found) == index
        assert sum(name.endswith(".safetensors") for name in found) == index + 1
        assert before.items() <= found.items(), "made again"
        before = {name: found[name] for name in found if int(name[6:11]) < index}
        assert len(before) == 2 * index
    monkeypatch.setattr(capture, "cache_teacher", partial(capture.cache_teacher, shard_tokens=100))
    for name in ("run", "undisturbed"):
        assert tiny.stage("02_teachers", f"run={tmp_path / name}", config=config) == 0
    units = [tmp_path / name / "02_teachers" / "big" / "fold0" for name in ("run", "undisturbed")]
    assert before.items() <= shards_of(units[0]).items(), "made again"
    cached = [{name: data for name, (_, data) in shards_of(unit).items()} for unit in units]
    assert cached[0] == cached[1], "byte by byte"
    assert run.told(run.manifest(units[0])) == run.told(run.manifest(units[1]))
    rows = pq.read_table(tmp_path / "run" / "00_prepare" / "rows.parquet")
    ids = [id for path in sorted(units[0].rglob("shard-*.safetensors")) for id in shards._ids(path)]
    assert len(cached[0]) > 2 * 4, "some shards were made after both"
    assert sorted(ids) == sorted(rows["id"].to_pylist())


def shards_of(unit: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of a cache's files, by name."""
    files = sorted(unit.rglob("shard-*"))
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize(
    ("stage", "where"),
    [
        ("04_merge", "llmkd.merge.merge_folds"),
        ("05_quantize", "llmkd.gptq._record"),
        ("05_quantize", "llmkd.card.write_card"),
    ],
)
def test_a_merge_or_quantization_that_was_cut_off_begins_anew(
    stage: str, where: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its inputs, before its weights are written, and after; what it left goes."""
    directory = begun(finished, tmp_path, stage)
    before = tiny.snapshot(directory)

    def dying(*args: Any, **kwargs: Any) -> None:
        half = directory / f"{stage}.partial" / "model"
        half.mkdir(exist_ok=True)
        (half / "half.safetensors").write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(where, dying)
        killed(stage, f"run={directory}")
    assert (directory / f"{stage}.partial" / "model" / "half.safetensors").exists()
    assert not (directory / stage).exists()
    assert tiny.snapshot(directory) == before
    assert tiny.stage(stage, f"run={directory}") == 0
    assert run.told(run.manifest(directory / stage)) == run.told(run.manifest(finished / stage))
    assert not list(directory.rglob("*half*"))
    assert not list(directory.rglob("*.partial"))
