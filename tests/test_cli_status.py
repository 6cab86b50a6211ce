"""`llmkd status` and `llmkd verify` on a finished run, and on what is left of one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny

from llmkd.cli import main
from llmkd.cli.status import clock
from llmkd.sources import read

HOLD = """
import pathlib, sys
from llmkd import lock
with lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def code(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def status(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> dict[str, Any]:
    """Each unit's entry by its name."""
    capsys.readouterr()
    assert code("status", "--json", "--config", tiny.CONFIG, f"run={run}", *words) == 0
    document = json.loads(capsys.readouterr().out)
    assert sum(document["counts"].values()) == len(document["units"])
    return {unit["unit"]: unit for unit in document["units"]}


def of_state(found: dict[str, Any], state: str) -> set[str]:
    return {name for name, unit in found.items() if unit["state"] == state}


def test_a_finished_run_is_done(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of the stages whose recipes stand in their scripts: 00, 01 and 06."""
    before = tiny.snapshot(finished)
    found = status(capsys, finished)
    assert list(found) == [
        "00_prepare",
        *(f"01_pretrain/{name}" for name in ("llama", "qwen", "gemma")),
        *(f"02_teachers/{name}/fold{fold}" for name in ("llama", "qwen") for fold in (0, 1)),
        *(f"03_distill/{name}/fold{fold}" for name in ("gemma", "gemma-baseline") for fold in (0, 1)),
        "04_merge",
        "05_quantize",
        "06_evaluate",
    ]
    assert of_state(found, "done") == set(found)
    assert all(unit["seconds"] > 0 and unit["reason"] is None for unit in found.values())
    assert tiny.snapshot(finished) == before


def test_the_table_and_the_exit_code(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["status", "--check", "--config", tiny.CONFIG, f"run={finished}"]
    assert code(*words) == 0
    assert capsys.readouterr().out.endswith(f"\n{finished}: 15 done\n")
    assert code(*words, "merge.how=factors") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"{finished}: 12 done, 3 stale; to go on: llmkd run --config {tiny.CONFIG}")
    assert 'merge.how was "delta", now "factors"' in lines[-4]
    assert lines[-4].split()[:2] == ["04_merge", "stale"]


def test_a_run_that_was_never_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = status(capsys, tmp_path / "nowhere")
    assert of_state(found, "missing") == set(found)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("override", "unit", "reason"),
    [
        ("seed=4", "00_prepare", "seed was 3, now 4"),
        (
            "teachers.qwen.learning_rate=1",
            "02_teachers/qwen/fold1",
            "teacher.learning_rate was 0.003, now 1.0",
        ),
        ("distill.epochs=5", "03_distill/gemma-baseline/fold0", "trainings.0.epochs was 2.0, now 5.0"),
        ("task.train='arena:rows=97,seed=1'", "00_prepare", "task.train was"),
        ("evaluate.tta=none", "06_evaluate", 'evaluate.tta was "swap", now "none"'),
        ("pretrain.0.rows=59", "01_pretrain/gemma", "phases.0.rows was 60, now 59"),
    ],
)
def test_why_a_unit_is_stale(
    finished: Path, override: str, unit: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = status(capsys, finished, override)
    assert found[unit]["state"] == "stale"
    assert found[unit]["reason"].startswith(reason)


def test_what_follows_a_stale_unit_is_stale(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = status(capsys, finished, "teachers.qwen.lora.alpha=1")
    assert of_state(found, "stale") == {
        *(f"02_teachers/qwen/fold{fold}" for fold in (0, 1)),
        *(f"03_distill/gemma/fold{fold}" for fold in (0, 1)),
        *("04_merge", "05_quantize", "06_evaluate"),
    }
    assert found["03_distill/gemma/fold1"]["reason"] == "02_teachers/qwen/fold1 is stale"


def test_what_is_missing_and_what_is_damaged(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "02_teachers" / "llama" / "fold0")
    (copy / "04_merge" / "model" / "config.json").write_text("{}")
    found = status(capsys, copy)
    assert of_state(found, "missing") == {"02_teachers/llama/fold0"}
    assert of_state(found, "damaged") == {"04_merge"}
    assert "missing or not of the" in found["04_merge"]["reason"]
    assert found["03_distill/gemma/fold0"]["reason"] == "02_teachers/llama/fold0 is missing"
    assert found["05_quantize"]["reason"] == "04_merge is damaged"
    assert of_state(found, "done") >= {"03_distill/gemma/fold1", "03_distill/gemma-baseline/fold0"}


def test_who_is_at_a_unit(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unit = copy / "03_distill" / "gemma" / "fold1"
    command = [sys.executable, "-c", HOLD, str(unit)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        found = status(capsys, copy)
        assert found["03_distill/gemma/fold1"]["state"] == "running"
        assert f"process {holder.pid} on " in found["03_distill/gemma/fold1"]["reason"]
        holder.kill()
    assert (copy / "03_distill" / "gemma" / "fold1.lock").exists()  # killed, so it is still there
    assert status(capsys, copy)["03_distill/gemma/fold1"]["state"] == "done"


def test_a_training_that_was_stopped(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unit = copy / "03_distill" / "gemma" / "fold0"
    mark = json.loads((unit / "manifest.json").read_text())["fingerprint"]
    shutil.rmtree(unit)
    saved = unit.with_name("fold0.partial") / "checkpoint"
    (saved / "phase0").mkdir(parents=True)
    (saved / "fingerprint").write_text(mark)
    assert status(capsys, copy)["03_distill/gemma/fold0"]["state"] == "missing"
    (saved / "phase0" / f"step{12:09}-{'0' * 64}.safetensors").touch()
    found = status(capsys, copy)["03_distill/gemma/fold0"]
    assert found["state"] == "stopped"
    assert found["reason"].startswith("checkpoint of phase0 at step 12, saved 20")
    assert status(capsys, copy, "distill.epochs=9")["03_distill/gemma/fold0"]["state"] == "missing"


def test_a_quantization_that_was_stopped(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unit = copy / "05_quantize"
    mark = json.loads((unit / "manifest.json").read_text())["fingerprint"]
    shutil.rmtree(unit)
    saved = unit.with_name("05_quantize.partial") / "checkpoint"
    for block in (1, 2):
        (saved / "gptq" / f"block{block}").mkdir(parents=True)
        (saved / "gptq" / f"block{block}" / f"step{block:09}-{'0' * 64}.safetensors").touch()
    (saved / "fingerprint").write_text(mark)
    found = status(capsys, copy)["05_quantize"]
    assert found["state"] == "stopped"
    assert found["reason"].startswith("2 blocks quantized, the last saved 20")


def test_status_loads_no_torch(finished: Path) -> None:
    words = ["status", "--config", str(tiny.CONFIG), f"run={finished}"]
    said = f"import sys; from llmkd.cli import main; main({words!r}); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", said], check=True, capture_output=True, text=True)
    assert found.stdout.splitlines()[-2:] == [f"{finished}: 15 done", "False"]


def test_every_document_has_the_keys_that_are_documented(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (tiny.ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    known = dict(re.findall(r"^\| `([\w -]+)` \| ([a-z_, ]+)(?:;.*)? \|$", page, re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    model, rows = copy / "05_quantize" / "model", tmp_path / "rows.parquet"
    pq.write_table(read("arena:rows=200,seed=9"), rows)
    asked: dict[str, list[object]] = {
        "init": [rows, "-o", "new.yaml"],
        "plan": ["--config", tiny.CONFIG],
        "run": ["--config", tiny.CONFIG, f"run={copy}", "merge"],
        "status": ["--config", tiny.CONFIG, f"run={copy}"],
        "predict": [model, rows, "-o", "p.csv"],
        "evaluate": [model, "--data", rows],
        "verify": [copy],
        "report": [copy],
        "export --format onnx": [model, "-o", "onnx"],
        "export --format hub": [copy, "-o", "hub"],
        "completion": ["bash"],
    }
    found = {}
    for words, more in asked.items():
        capsys.readouterr()
        assert code(*words.split(), *more, "--json") == 0
        found[words] = list(json.loads(capsys.readouterr().out))
    assert found == {words: known[words].split(", ") for words in asked}


def test_verify_tells_of_each_problem_on_a_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("verify", copy) == 0
    assert capsys.readouterr().out == f"{copy}: 15 units, all whole\n"
    (copy / "04_merge" / "model" / "config.json").write_text("{}")
    assert code("verify", copy, "--json") == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["units"] == 15
    assert len(document["problems"]) == 1
    assert err == f"error: {document['problems'][0]}\n"


def test_seconds_as_people_read_them() -> None:
    assert [clock(value) for value in (None, 1.25, 59.9, 61, 3661.2)] == [
        "",
        "1.2 s",
        "59.9 s",
        "1:01",
        "1:01:01",
    ]
