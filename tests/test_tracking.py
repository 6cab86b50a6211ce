"""Curves and figures: TensorBoard for real, W&B and MLflow as packages that note how they are called."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from llmkd.config import parse, science
from llmkd.errors import ConfigError
from llmkd.tracking import Track, check, numbers, record

SETTINGS = {"seed": 3, "distill": {"learning_rate": 1e-3}}
WANDB = """
import json, types
from pathlib import Path
run, config = None, {}
said = open(Path(__file__).with_name("said.jsonl"), "a")
def note(what, **facts):
    print(json.dumps([what, facts], default=str), file=said, flush=True)
class Config(dict):
    def update(self, values, allow_val_change=False):
        note("config", **values)
config = Config()
class Run:
    id, summary = "r", {}
    def log(self, figures):
        note("log", **figures)
    def _label(self, code):
        pass
    def __enter__(self):
        return self
    def __exit__(self, *error):
        global run
        run = None
        note("finish", failed=error[0] is not None)
def init(**settings):
    global run
    note("init", **settings)
    run = Run()
    return run
def log(figures):
    run.log(figures)
def Settings(**settings):
    return settings
"""
MLFLOW = """
import json, types
from contextlib import contextmanager
from pathlib import Path
__version__ = "3.17.2"
limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
utils = types.SimpleNamespace(validation=limits)
said = open(Path(__file__).with_name("said.jsonl"), "a")
active = None
def note(what, **facts):
    print(json.dumps([what, facts], default=str), file=said, flush=True)
def is_tracking_uri_set():
    return True
def get_tracking_uri():
    return ""
def set_tracking_uri(uri):
    note("uri", uri=uri)
def set_experiment(name):
    note("experiment", name=name)
def set_tags(tags):
    note("tags", **tags)
def log_params(params, synchronous=True):
    note("config", **params)
def log_metrics(metrics, step=None, synchronous=True):
    note("log", step=step, **metrics)
def active_run():
    return active
def end_run():
    raise AssertionError("whoever starts a run ends it")
@contextmanager
def start_run(run_name, tags):
    global active
    note("init", name=run_name, tags=tags)
    active = types.SimpleNamespace(info=None)
    yield active
    active = None
    note("finish", failed=False)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a package of that name that notes each call; returns what was noted."""

    def install(name: str, source: str) -> Path:
        place = tmp_path / "packages"
        (place / name / "sdk" / "lib").mkdir(parents=True)
        (place / name / "__init__.py").write_text(source)
        for part in ("sdk", "sdk/lib"):
            (place / name / part / "__init__.py").touch()
        (place / name / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): ...")
        (place / f"{name}-1.0.dist-info").mkdir()
        (place / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(str(place))
        for module in [one for one in sys.modules if one.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        return place / name / "said.jsonl"

    yield install
    for module in [one for one in sys.modules if one.split(".")[0] in ("wandb", "mlflow")]:
        del sys.modules[module]


def train(tmp_path: Path, to: str, **more: Any) -> dict[str, Any]:
    from llmkd.methods.cached import Cached
    from llmkd.objective import HARD
    from llmkd.train import fit

    rows = tiny.examples()
    return fit(
        Cached(tiny.classifier(), HARD, "fp32"),
        rows,
        np.arange(16),
        tiny.training(tmp_path / "run"),
        dev=np.arange(16, 24),
        batch_rows=8,
        batch_tokens=256,
        track=Track(to, tmp_path / "run", "02_teachers/llama/fold0", SETTINGS),
        **more,
    )


def events(directory: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory)).Reload()
    scalars = {tag: [(at.step, at.value) for at in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0] for tag in found.Tags()["tensors"]}
    return scalars, {tag: text.decode() for tag, text in texts.items()}


def said(file: Path) -> list[tuple[str, dict[str, Any]]]:
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()]


def test_tensorboard_has_terms_development_scores_and_settings(tmp_path: Path) -> None:
    history = train(tmp_path, "tensorboard")
    directory = tmp_path / "run" / "tracking" / "02_teachers" / "llama" / "fold0"
    scalars, texts = events(directory)
    assert [step for step, _ in scalars["train/ce"]] == [entry["step"] for entry in history["loss"]] == [1, 2]
    assert scalars["eval/dev_log_loss"] == [(2, pytest.approx(history["best"]))]
    assert json.loads(texts["config/text_summary"]) == SETTINGS
    assert '"run_name": "run/02_teachers/llama/fold0"' in texts["args/text_summary"]
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in directory.iterdir())


def test_a_training_begun_anew_replaces_its_curves(tmp_path: Path) -> None:
    train(tmp_path, "tensorboard")
    train(tmp_path, "tensorboard")
    scalars, _ = events(tmp_path / "run" / "tracking" / "02_teachers" / "llama" / "fold0")
    assert len(scalars["train/ce"]) == 2


def test_a_whole_training_keeps_its_curves(tmp_path: Path) -> None:
    for _ in range(2):
        train(tmp_path, "tensorboard", checkpoints=tmp_path / "checkpoint")
    scalars, _ = events(tmp_path / "run" / "tracking" / "02_teachers" / "llama" / "fold0")
    assert len(scalars["train/ce"]) == 2


def test_tracking_changes_nothing_of_a_training(tmp_path: Path) -> None:
    one, other = (train(tmp_path, to) for to in ("none", "tensorboard"))
    for history in (one, other):
        for entry in history["loss"]:
            entry.pop("epoch")
    assert one == other


def test_none_writes_and_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llmkd.tracking import Track, record, tracked\n"
        f"track = Track('none', Path({str(tmp_path)!r}), 'unit', {{}})\n"
        "with tracked(track, list, resumed=False) as callbacks: assert callbacks == []\n"
        "record(track, {'student': {'log_loss': 1.0}})\n"
        "assert not {'torch', 'transformers', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not list(tmp_path.iterdir())


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    record(Track("tensorboard", tmp_path, "06_evaluate", {}), {"log_loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_final_figures_are_numbers_alone(tmp_path: Path) -> None:
    metrics = {"student": {"log_loss": 0.9, "oof": {"ece": 0.1}}, "continuations": ["a text"], "none": None}
    assert numbers(metrics) == {"student/log_loss": 0.9, "student/oof/ece": 0.1}
    record(Track("tensorboard", tmp_path, "06_evaluate", SETTINGS), metrics)
    scalars, texts = events(tmp_path / "tracking" / "06_evaluate")
    assert scalars == {
        "student/log_loss": [(0, pytest.approx(0.9))],
        "student/oof/ece": [(0, pytest.approx(0.1))],
    }
    assert "a text" not in "".join(texts.values())


@pytest.mark.parametrize(("to", "source"), [("wandb", WANDB), ("mlflow", MLFLOW)])
def test_a_service_gets_each_unit_as_a_run(to: str, source: str, tmp_path: Path, package: Any) -> None:
    file = package(to, source)
    for _ in range(2):  # the next fold is a run of its own
        history = train(tmp_path, to)
    record(Track(to, tmp_path / "run", "06_evaluate", SETTINGS), {"student": {"log_loss": 0.9}})
    calls = said(file)
    names = [facts["name"] for what, facts in calls if what == "init"]
    assert names == ["run/02_teachers/llama/fold0"] * 2 + ["run/06_evaluate"]
    order = [what for what, _ in calls if what in ("init", "finish")]
    assert order == ["init", "finish"] * 3
    figures = [facts for what, facts in calls if what == "log"]
    scores = [facts["eval/dev_log_loss"] for facts in figures if "eval/dev_log_loss" in facts]
    assert scores == [history["best"]] * 2
    assert figures[-1]["student/log_loss"] == 0.9
    assert any(facts.get("ce", facts.get("train/ce")) for facts in figures)
    configs = [facts for what, facts in calls if what == "config"]
    assert {facts.get("output_dir", "") for facts in configs} <= {"02_teachers/llama/fold0", ""}
    assert "0.001" in file.read_text()
    assert not [facts for facts in configs if str(tmp_path) in str(facts)]


def test_wandb_is_asked_to_keep_console_code_and_paths_to_itself(tmp_path: Path, package: Any) -> None:
    file = package("wandb", WANDB)
    record(Track("wandb", tmp_path / "run", "06_evaluate", SETTINGS), {"log_loss": 1.0})
    (_, asked), *_ = said(file)
    assert asked["settings"] == {
        "console": "off",
        "save_code": False,
        "disable_git": True,
        "disable_code": True,
        "x_disable_meta": True,
    }
    assert asked["config"] == {"config": SETTINGS}
    assert asked["dir"] == str(tmp_path / "run" / "tracking")


def test_mlflow_writes_into_the_run_unless_told_where(
    tmp_path: Path, package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = package("mlflow", MLFLOW)
    track = Track("mlflow", tmp_path / "run", "06_evaluate", SETTINGS)
    record(track, {"log_loss": 1.0})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    record(track, {"log_loss": 1.0})
    assert [facts["uri"] for what, facts in said(file) if what == "uri"] == [
        f"sqlite:///{tmp_path}/run/tracking/mlflow.db"
    ]


def test_mlflow_is_told_a_stage_for_its_source(tmp_path: Path, package: Any) -> None:
    file = package("mlflow", MLFLOW)
    train(tmp_path, "mlflow")
    (begun,) = [facts for what, facts in said(file) if what == "init"]
    assert begun["tags"] == {"mlflow.source.name": "02_teachers"}


def test_a_missing_package_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    for to in ("wandb", "mlflow", "tensorboard"):
        with pytest.raises(ConfigError, match=rf"^tracking = '{to}': not installed; pip install {to}, or"):
            check(to)
    check("none")


def test_where_curves_go_is_no_part_of_a_fingerprint() -> None:
    models = "teachers: [{name: a, model: b}]\nstudent: {name: c, model: d}"
    config = parse(f"run: r\ntask: {{kind: preference, train: t}}\n{models}\ntracking: none")
    assert config.tracking == "none"
    assert "tracking" not in science(config)


def test_stages_leave_curves_and_final_figures(copy: Path) -> None:
    for unit in ("02_teachers/qwen/fold0", "06_evaluate"):
        shutil.rmtree(copy / unit)
    one = ("--teacher", "qwen", "--fold", "0")
    assert tiny.stage("02_teachers", f"run={copy}", "tracking=tensorboard", *one) == 0
    assert tiny.stage("06_evaluate", f"run={copy}", "tracking=tensorboard") == 0
    assert sorted(
        path.parent.relative_to(copy).as_posix() for path in (copy / "tracking").rglob("events*")
    ) == [
        "tracking/02_teachers/qwen/fold0",
        "tracking/06_evaluate",
    ]
    scalars, texts = events(copy / "tracking" / "06_evaluate")
    metrics = json.loads((copy / "06_evaluate" / "metrics.json").read_text())
    assert scalars["quantized/log_loss"] == [(0, pytest.approx(metrics["quantized"]["log_loss"]))]
    settings = json.loads((copy / "06_evaluate" / "manifest.json").read_text())["settings"]
    assert json.loads(texts["config/text_summary"]) == settings


def test_several_trainings_of_a_unit_have_curves_each(tmp_path: Path) -> None:
    from llmkd.crossfit import Fit, fit_in_turn
    from llmkd.methods.cached import Cached
    from llmkd.objective import HARD

    rows, training = tiny.examples(), tiny.training(tmp_path / "run")
    method = Cached(tiny.classifier(), HARD, "fp32")
    one = Fit(method, HARD, rows, np.arange(16), training, {"batch_rows": 8, "batch_tokens": 256})
    fit_in_turn([one, one], None, track=Track("tensorboard", tmp_path / "run", "03_distill/g/fold0", {}))
    found = sorted(path.parent.name for path in (tmp_path / "run" / "tracking").rglob("events*"))
    assert found == ["fit0", "fit1"]


def test_a_stage_ends_at_once_where_a_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    assert tiny.stage("00_prepare", f"run={tmp_path / 'run'}", "tracking=wandb") == 2
    assert capsys.readouterr().err.startswith("error: tracking = 'wandb': not installed; pip install wandb")
    assert not (tmp_path / "run").exists()
