"""Closed doors: no pickle, no remote code, nothing written outside the run, no secret and no text let out;
and a full disk or a signal, which leave a run that goes on."""

import ast
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from conftest import STAGES

from llmkd import run
from llmkd.verify import verify_run

SOURCES = sorted([*(tiny.ROOT / "llmkd").rglob("*.py"), *(tiny.ROOT / "stages").glob("*.py")])
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "unsafe_load", "full_load"}
LOADS = {"torch.load", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "yaml.unsafe_load"}


def errors(captured: str) -> list[str]:
    return [line for line in captured.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_unpickles_or_runs_what_it_reads(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {name.name.split(".")[0] for name in node.names} & FORBIDDEN
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in CALLS | LOADS, called
            trusts = [one.value for one in node.keywords if one.arg == "trust_remote_code"]
            assert [ast.unparse(value) for value in trusts] in ([], ["False"]), called


def test_a_model_whose_code_lies_beside_it_is_not_run(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that names its own class, as remote code does."""
    import json

    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model = copy / "01_pretrain" / "llama" / "model"
    outside = copy.parent / "model"
    model.rename(outside)
    config = json.loads((outside / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.Evil"}}
    config["model_type"] = "evil"
    (outside / "config.json").write_text(json.dumps(config))
    (outside / "evil.py").write_text(f"open({str(copy.parent / 'ran')!r}, 'w')")
    assert tiny.stage("06_evaluate", f"run={copy}", f"--artifact={outside}") == 2
    assert len(errors(capsys.readouterr().err)) == 1
    assert not (copy.parent / "ran").exists()


@pytest.mark.parametrize("kind", ["evil", "llama"])
def test_no_code_beside_a_checkpoint_is_run_whoever_says_yes(
    kind: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers asks on the terminal unless it is told no. A known model type has its own class."""
    import json

    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model = copy / "01_pretrain" / "llama" / "model"
    config = json.loads((model / "config.json").read_text())
    own = {
        name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForSequenceClassification", "AutoTokenizer")
    }
    outside = Path(shutil.copytree(model, copy.parent / "model"))
    (outside / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": own}))
    ran = copy.parent / "ran"
    (outside / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    words = [f"run={copy}", "teachers.llama.init=null", f"teachers.llama.model={outside}", "--teacher=llama"]
    before = tiny.snapshot(copy)
    code = tiny.stage("02_teachers", *words, "--fold=0")
    found = errors(capsys.readouterr().err)
    assert not ran.exists()
    if kind == "llama":
        assert (code, found) == (0, [])
    else:
        assert code == 2
        assert len(found) == 1
        assert "code" in found[0]
        assert tiny.snapshot(copy) == before


@pytest.mark.parametrize(
    "name", ["../out", "/tmp/out", "a/b", "..", "", ".hidden", "x" * 65, "a\x00b", "a\nb", "-rf", "~root"]
)
@pytest.mark.parametrize("where", ["teachers.0.name", "student.name"])
def test_no_name_leads_out_of_the_run(
    where: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    before = tiny.snapshot(tmp_path.parent)
    assert tiny.stage("01_pretrain", f"run={tmp_path / 'run'}", f"{where}={json.dumps(name)}") == 2
    assert errors(capsys.readouterr().err)
    assert tiny.snapshot(tmp_path.parent) == before


SECRETS = {
    "HF_TOKEN": "hf_SeCrEtToKeN0123456789",
    "AWS_SECRET_ACCESS_KEY": "aWsSeCrEt0123456789",
    "DATABASE_PASSWORD": "pAsSwOrD0123456789",
}


def test_no_secret_of_the_environment_reaches_a_file_or_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for stage in STAGES[:2]:
        assert tiny.stage(stage, f"run={tmp_path}") == 0
    assert tiny.stage("02_teachers", f"run={tmp_path}", "teachers.qwen.learning_rate=1e38", "--fold=0") == 2
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    captured = capfd.readouterr()
    for value in SECRETS.values():
        assert value.encode() not in written
        assert value not in captured.out + captured.err


def test_no_row_s_text_reaches_an_artifact_or_a_manifest(finished: Path) -> None:
    rows = pq.read_table(finished / "00_prepare" / "rows.parquet").to_pylist()
    texts = {row[field].encode() for row in rows for field in ("prompt", "response_a", "response_b")}
    texts = {text for text in texts if len(text) > 20}
    assert len(texts) > 50
    files = [path for path in finished.rglob("*") if path.is_file() and path.name != "rows.parquet"]
    for path in files:
        data = path.read_bytes()
        assert not [text for text in texts if text in data], path


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(args[-1]))


@pytest.mark.parametrize(
    ("stage", "where"),
    [
        ("00_prepare", "pyarrow.parquet.write_table"),
        ("02_teachers", "pyarrow.parquet.write_table"),
        ("02_teachers", "safetensors.torch.save_file"),
        ("02_teachers", "llmkd.run._sync"),
        ("04_merge", "llmkd.run.write_json"),
        ("06_evaluate", "llmkd.run.write_json"),
    ],
)
def test_a_full_disk_leaves_a_run_that_goes_on(
    stage: str,
    where: str,
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tiny.snapshot(copy)
    shutil.rmtree(copy / ("02_teachers/qwen/fold1" if stage == "02_teachers" else stage))
    before = tiny.snapshot(copy)
    with monkeypatch.context() as patch:
        patch.setattr(where, no_space)
        assert tiny.stage(stage, f"run={copy}") == 2
    (error,) = errors(capsys.readouterr().err)
    assert "No space left on device" in error
    assert "free some space, then the same command goes on" in error
    assert tiny.snapshot(copy) == before
    assert tiny.stage(stage, f"run={copy}") == 0
    assert tiny.snapshot(copy).keys() == whole.keys()
    assert verify_run(copy) == []


def test_a_terminated_stage_says_how_to_go_on_and_is_gone_on_with(finished: Path, tmp_path: Path) -> None:
    """A real process: SIGTERM in a training of hundreds of steps, then kill -9, then to the end."""
    for stage in STAGES[:2]:
        shutil.copytree(finished / stage, tmp_path / stage)
    script = [sys.executable, str(tiny.ROOT / "stages" / "02_teachers.py"), "--config", str(tiny.CONFIG)]
    options = [f"run={tmp_path}", "--teacher=qwen", "--fold=0", "teachers.qwen.checkpoint_minutes=0"]
    command = [*script, *options, "teachers.qwen.epochs=200"]
    unit = tmp_path / "02_teachers" / "qwen" / "fold0.partial"

    def until_saved(process: "subprocess.Popen[str]", step: int) -> int:
        """Waits for a checkpoint of that step or a later one. Returns the first step that was seen saved."""
        first = None
        while process.poll() is None:
            saved = [int(path.name[4:13]) for path in unit.glob("checkpoint/fit0/step*")]
            first = min(saved, default=None) if first is None else first
            if max(saved, default=0) >= step:
                return first or 0
        raise AssertionError(process.communicate())

    def begin() -> "subprocess.Popen[str]":
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    process = begin()
    until_saved(process, 3)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    (line,) = [line for line in told.splitlines() if "stopped by" in line]
    assert line.endswith("is saved; the same command goes on from there")
    assert "stopped by SIGTERM: step " in line
    assert "Traceback" not in told
    step = int(line.split("step ")[1].split()[0])
    process = begin()
    assert until_saved(process, step + 1) >= step, "it went on, and did not begin again"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert unit.exists()
    assert not (tmp_path / "02_teachers" / "qwen" / "fold0" / run.MANIFEST).exists()
