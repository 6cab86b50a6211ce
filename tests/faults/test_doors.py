"""Closed doors: no pickle, no remote code, nothing written outside the run, no secret and no text let out;
and a full disk or a signal, which leave a run that goes on."""

import ast
import errno
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from conftest import STAGES

from llmkd.verify import verify_run

SOURCES = sorted([*(tiny.ROOT / "llmkd").rglob("*.py"), *(tiny.ROOT / "stages").glob("*.py")])
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "unsafe_load", "full_load"}
TRUST = "trust_remote_code"
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
            trusts = [ast.unparse(one.value) for one in node.keywords if one.arg == TRUST]
            assert not {"True", "None"} & {*trusts}, f"{called}: the word is the config's"
            auto = called.startswith("Auto") or called.startswith("auto.")
            assert trusts or not (auto and called.endswith((".from_pretrained", ".from_config"))), called
            local = [ast.unparse(one.value) for one in node.keywords if one.arg == "local_files_only"]
            assert local == ["True"] or "dynamic_module" not in called, f"{called}: code that lies elsewhere"
        elif isinstance(node, ast.FunctionDef):
            taken = node.args.kwonlyargs, node.args.kw_defaults
            defaults = {one.arg: value for one, value in zip(*taken, strict=True) if value is not None}
            assert ast.unparse(defaults.get(TRUST, ast.Constant(False))) == "False", node.name
        elif isinstance(node, ast.Dict):
            said = {
                ast.unparse(key): ast.unparse(one)
                for key, one in zip(node.keys, node.values, strict=True)
                if key
            }
            assert said.get(repr(TRUST)) not in ("True", "None")


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
    "WANDB_API_KEY": "wAnDbKeY0123456789abcdef0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "aWsSeCrEt0123456789",
    "DATABASE_PASSWORD": "pAsSwOrD0123456789",
    "HTTPS_PROXY": "http://sOmEuSeR:pRoXyPaSsWoRd@localhost:9",
    "MLFLOW_TRACKING_URI": "https://aNoThEr:mLfLoWpAsSwOrD@localhost:9/mlflow",
}


def test_no_secret_of_the_environment_reaches_a_file_or_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In all seven stages and the report, with curves kept, and where a stage fails."""
    from llmkd.reporting import write_report

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    words = [f"run={tmp_path}", "pretrain=[]", "distill.baseline=false", "tracking=tensorboard"]
    for stage in STAGES:
        assert tiny.stage(stage, *words) == 0, stage
    assert write_report(tmp_path).is_file()
    failing = [*words, "teachers.qwen.learning_rate=1e38", "--teacher=qwen", "--fold=0"]
    assert tiny.stage("02_teachers", *failing) == 2
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kinds = (
        "manifest.json",
        "metrics.json",
        "report.html",
        "README.md",
        "adapter_config.json",
        "events.out.*",
    )
    assert all(any(path.match(kind) for path in files) for kind in kinds)
    captured = capfd.readouterr()
    files[Path("log")] = (captured.out + captured.err).encode()
    hidden = [
        *SECRETS.values(),
        *(part for value in SECRETS.values() for part in value.split("@")[0].split(":")),
    ]
    for value in {one for one in hidden if len(one) > 7}:
        assert not [path for path, data in files.items() if value.encode() in data], value


def test_no_row_s_text_reaches_an_artifact_or_a_manifest(finished: Path) -> None:
    rows = pq.read_table(finished / "00_prepare" / "rows.parquet").to_pylist()
    texts = {row[field].encode() for row in rows for field in ("prompt", "response_a", "response_b")}
    texts = {text for text in texts if len(text) > 20}
    assert len(texts) > 50
    files = [path for path in finished.rglob("*") if path.is_file() and path.name != "rows.parquet"]
    for path in files:
        data = path.read_bytes()
        assert not [text for text in texts if text in data], path


def test_no_training_text_reaches_a_language_model_s_artifact(finished_lm: Path) -> None:
    """GPTQ's calibration rows among them. What a model is asked to go on with, test texts, stands in the
    scores by design."""
    root = finished_lm / "run"
    rows = pq.read_table(root / "00_prepare" / "rows.parquet", columns=["text", "part"]).to_pylist()
    texts = {row["text"].encode() for row in rows if row["part"] == "train" and len(row["text"]) > 20}
    assert len(texts) > 20
    models = [path for path in root.rglob("*") if path.is_file() and path.parts[-2] == "model"]
    assert {path.parts[-3] for path in models} >= {"04_merge", "05_quantize"}
    for path in [*models, *root.rglob("manifest.json")]:
        data = path.read_bytes()
        assert not [text for text in texts if text in data or text[:40] in data], path


def no_space(*args: Any, **kwargs: Any) -> None:
    paths = [str(one) for one in args if isinstance(one, Path)]
    raise OSError(errno.ENOSPC, "No space left on device", *paths[:1])


@pytest.mark.parametrize(
    ("stage", "where"),
    [
        ("00_prepare", "llmkd.mapped.write"),
        ("02_teachers", "pyarrow.parquet.ParquetWriter.write_table"),
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
