"""Every way to distil, through the stages: what each leaves, and that its artifact is what was trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny

from llmkd import run

REST = ("03_distill", "04_merge", "06_evaluate")
LABELLED = "quantize=null"
# the part of tests/tiny.yaml's that is gemma's: its other phase names a teacher that a test may leave out
PRETRAIN = (
    "pretrain=[{objective: causal_lm, data: 'arena:rows=60,seed=4', models: [gemma], "
    "learning_rate: 3.0e-3, batch_rows: 8, rows: 60}]"
)
TINY = "hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2"


def go_on(directory: Path, *overrides: str, stages: tuple[str, ...] = REST) -> dict[str, Any]:
    """The stages of a copied run with another way to distil; its metrics."""
    for name in stages:
        assert tiny.stage(name, f"run={directory}", LABELLED, "distill.baseline=false", *overrides) == 0, name
    return dict(json.loads((directory / "06_evaluate" / "metrics.json").read_text()))


def logged(directory: Path, student: str = "gemma") -> set[str]:
    known = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    history = run.manifest(directory / f"03_distill/{student}/fold0")["metrics"]["loss"]
    return set(history[0]) - known


def test_an_online_teacher_teaches_as_its_cache_does(copy: Path) -> None:
    """Same losses step by step; the cache is float32 and so are these models."""
    cached = run.manifest(copy / "03_distill/gemma/fold0")["metrics"]
    go_on(copy, "distill.method=online")
    online = run.manifest(copy / "03_distill/gemma/fold0")["metrics"]
    for ours, theirs in zip(online["loss"], cached["loss"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
    assert online["best"] == pytest.approx(cached["best"], abs=1e-4)


def test_features_of_a_teacher_of_another_tokenizer_are_compared_pooled(copy: Path) -> None:
    pair = "{teacher: llama, teacher_layer: 1, student_layer: 1}"
    go_on(copy, "distill.method=feature", f"distill.features=[{pair}]", "distill.feature_at=pooled")
    assert any("hidden" in name or "feature" in name for name in logged(copy))
    names = {path.name for path in (copy / "04_merge" / "model").iterdir()}
    assert not [name for name in names if "project" in name]
    adapter = run.manifest(copy / "03_distill/gemma/fold0")["files"]
    assert not [name for name in adapter if "project" in name]


def test_a_layer_that_is_not_there_is_named_before_any_training(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny.snapshot(copy)
    pair = "{teacher: llama, teacher_layer: 9, student_layer: 1}"
    code = tiny.stage("03_distill", f"run={copy}", "distill.method=feature", f"distill.features=[{pair}]")
    assert code == 2
    assert "layer 9" in capsys.readouterr().err
    assert tiny.snapshot(copy) == before


def test_peers_learn_together_and_each_is_judged(copy: Path) -> None:
    peer = (
        f"{{name: bert, init: {{architecture: llama, config: {{{TINY}, num_key_value_heads: 2, "
        "max_position_embeddings: 128}, tokenizer: {vocab_size: 330}}, lora: null}"
    )
    way = [
        "distill.method=mutual",
        f"peers=[{peer}]",
        "teachers=[]",
        PRETRAIN,
        "distill.terms={ce: 1, kl: 0, cosine: 0}",
    ]
    found = go_on(copy, *way, stages=("01_pretrain", *REST))
    assert set(found["peers"]) == {"bert"}
    assert found["peers"]["bert"]["test"]["rows"] == 40
    left = run.manifest(copy / "03_distill/gemma/fold0")["files"]
    assert "peers/bert/adapter/model.safetensors" in left


def test_every_exit_is_judged_and_the_shallow_ones_are_shorter(copy: Path) -> None:
    two = ["student.init.config.num_hidden_layers=2", "student.init.config.layer_types=null"]
    way = ["distill.method=self_distillation", "teachers=[]", PRETRAIN]
    found = go_on(copy, *way, *two, stages=("01_pretrain", *REST))
    assert set(found["outputs"]) == {"exit 1"}
    assert found["outputs"]["exit 1"]["rows"] == 40
    assert found["outputs"]["exit 1"]["log_loss"] != found["merged"]["log_loss"]
    assert 0 < found["outputs"]["exit 1"]["accuracy"] <= 1
    assert found["outputs"]["exit 1"]["rows_per_second"] > 0
    assert {"exit1/ce", "exit1/kl", "ce"} <= logged(copy)


def test_phases_follow_one_another(copy: Path) -> None:
    phases = (
        "[{terms: {ce: 0}, rows: [train, test], epochs: 1}, "
        "{terms: {kl: 0, cosine: 0}, learning_rate: 1.0e-3, epochs: 1}]"
    )
    go_on(copy, f"distill.phases={phases}")
    manifest = run.manifest(copy / "03_distill/gemma/fold0")
    soft, hard = manifest["metrics"]["phases"]
    assert "ce" not in soft["loss"][0]
    assert set(hard["loss"][0]) >= {"ce"}
    assert not [name for name in hard["loss"][0] if "/" in name]
    assert soft["steps"] > hard["steps"], "the first phase reads the test rows' soft labels too"


def test_phases_without_development_rows_end_as_they_should(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [f"run={copy}", "folds.count=1", "views=[in_sample]", "distill.baseline=false"]
    told += ["teachers.llama.epochs=0.2", "teachers.qwen.epochs=0.2"]
    for name in ("00_prepare", "01_pretrain", "02_teachers"):
        assert tiny.stage(name, *told) == 0, name
    assert tiny.stage("03_distill", *told, "distill.phases=[{terms: {ce: 0}, epochs: 1}, {epochs: 1}]") == 0
    assert "03_distill/gemma/fold0: loss " in capsys.readouterr().out


def test_fitted_weights_are_in_the_manifest_and_the_report(copy: Path) -> None:
    go_on(copy, "distill.weighting=fitted")
    found = run.manifest(copy / "03_distill/gemma/fold1")["metrics"]
    assert set(found["teacher_weights"]) == set(found["teacher_temperatures"]) == {"llama", "qwen"}
    assert sum(found["teacher_weights"].values()) == pytest.approx(1)
    page = (copy / "report.html").read_text(encoding="utf-8")
    for name, weight in found["teacher_weights"].items():
        assert f"{weight:.3f}, T = {found['teacher_temperatures'][name]:.2f}" in page


def test_a_chain_s_students_teach_one_another_out_of_fold(copy: Path) -> None:
    config = tiny.CONFIG.read_text().replace("student:\n  name: gemma", "students:\n- name: gemma")
    small = (
        "- {name: small, init: {architecture: llmkd-hashed, config: {buckets: 50, hidden_size: 16}, "
        "tokenizer: {vocab_size: 340}}, distill: {epochs: 1, view: oof}}\n"
    )
    path = copy.parent / "chain.yaml"
    path.write_text(config.replace("distill: {baseline", small + "distill: {baseline"))
    for name in ("01_pretrain", "03_distill", "04_merge", "06_evaluate"):
        assert tiny.stage(name, f"run={copy}", LABELLED, config=path) == 0, name
    found = json.loads((copy / "06_evaluate" / "metrics.json").read_text())
    assert set(found["teachers"]) == {"llama", "qwen", "gemma"}
    inputs = run.manifest(copy / "03_distill/small/fold0")["inputs"]
    assert "03_distill/gemma/fold1" in inputs
    assert not [name for name in inputs if name.startswith("02_teachers")]
    assert (copy / "03_distill/small-baseline/fold0").is_dir()
    assert not (copy / "03_distill/gemma-baseline/fold0").is_dir() or found["baseline"]["rows"] == 40


def said(copy: Path, directory: Path, **columns: Any) -> Path:
    rows = pq.read_table(copy / "00_prepare" / "rows.parquet").to_pandas()
    rows = rows[~rows.swapped]
    frame = pd.DataFrame({"id": rows.id, **{name: of(rows) for name, of in columns.items()}})
    frame.to_csv(directory / "said.csv", index=False)
    return directory / "said.csv"


def test_another_tool_s_verdicts_teach(copy: Path, tmp_path: Path) -> None:
    path = said(
        copy, tmp_path, verdict=lambda rows: ["a", "b", "tie"] * (len(rows) // 3) + ["a"] * (len(rows) % 3)
    )
    judge = f"{{kind: file, name: judge, path: {path}, verdict: verdict, smoothing: 0.2}}"
    found = go_on(copy, f"teachers=[{judge}]", PRETRAIN, stages=("02_teachers", *REST))
    assert set(found["teachers"]) == {"judge"}
    table = pq.read_table(copy / "02_teachers/judge/fold0/logits.parquet").to_pandas()
    p = np.exp(np.stack(table.logits))
    assert np.allclose(p.max(-1), 0.8)
    by_id = dict(zip(table.id, p.argmax(-1), strict=True))
    some = next(id for id in by_id if id.endswith("#swapped") and by_id[id] == 0)
    assert by_id[some.removesuffix("#swapped")] == 1, "a swapped copy has the mirrored verdict"


def test_rows_missing_from_a_file_are_named(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = said(copy, tmp_path, verdict=lambda rows: ["a"] * len(rows))
    path.write_text("\n".join(path.read_text().split("\n")[:20]) + "\n")
    judge = f"{{kind: file, name: judge, path: {path}, verdict: verdict}}"
    assert tiny.stage("02_teachers", f"run={copy}", f"teachers=[{judge}]", PRETRAIN) == 2
    err = capsys.readouterr().err.strip()
    assert err.count("\n") == 0
    assert str(path) in err
    assert not (copy / "02_teachers" / "judge").exists()


def test_boosted_trees_over_computed_fields_teach_a_text_student(copy: Path) -> None:
    trees = "{kind: lightgbm, name: trees, rounds: 8, params: {num_leaves: 4, min_data_in_leaf: 5}}"
    found = go_on(copy, f"teachers=[{trees}]", PRETRAIN, stages=("02_teachers", *REST))
    assert found["teachers"]["trees"]["rows"] == 96
    assert (copy / "02_teachers/trees/fold1/model.txt").is_file()


def tabular(directory: Path, seed: int, rows: int) -> None:
    random = np.random.default_rng(seed)
    x, c = random.normal(size=(rows, 3)), random.choice(["u", "v", "w"], rows)
    months = random.normal(size=(rows, 3))
    score = x[:, 0] - x[:, 1] + (c == "u") + months[:, 2]
    frame = pd.DataFrame(x, columns=["x0", "x1", "x2"]).assign(c=c, label=(score > 0.3).astype(int))
    frame[["m1", "m2", "m3"]] = months
    frame.to_csv(directory / f"rows{seed}.csv", index=False)


TABULAR = """
run: {run}
seed: 1
precision: fp32
task:
  kind: tabular
  train: {root}/rows1.csv
  test: {root}/rows2.csv
  transfer: {root}/rows3.csv
  labels: ["no", "yes"]
  features: {{numeric: [x0, x1, x2], categorical: [c], steps: {{month: [m1, m2, m3]}}}}
folds: {{count: 2}}
teachers: [{{kind: lightgbm, name: trees, rounds: 20, params: {{num_leaves: 4}}}}]
student:
  name: net
  init: {{architecture: llmkd-tabular-transformer, config: {{TINY}}}}
distill: {{view: oof, baseline: true, epochs: 2, learning_rate: 1.0e-2, batch_rows: 32}}
merge: {{dtype: fp32}}
quantize: null
"""


@pytest.fixture
def table_run(tmp_path: Path) -> tuple[Path, Path]:
    for seed, rows in ((1, 160), (2, 60), (3, 40)):
        tabular(tmp_path, seed, rows)
    path = tmp_path / "tabular.yaml"
    path.write_text(TABULAR.format(run=tmp_path / "run", root=tmp_path).replace("TINY", TINY))
    return path, tmp_path / "run"


def all_stages(path: Path, *overrides: str) -> None:
    for name in (
        "00_prepare",
        "01_pretrain",
        "02_teachers",
        "03_distill",
        "04_merge",
        "05_quantize",
        "06_evaluate",
    ):
        assert tiny.stage(name, *overrides, config=path) == 0, name


def test_trees_teach_a_transformer_over_steps(table_run: tuple[Path, Path]) -> None:
    path, directory = table_run
    all_stages(path)
    found = json.loads((directory / "06_evaluate" / "metrics.json").read_text())
    for name in ("baseline", "student", "merged"):
        assert {"auc", "amex", "log_loss"} <= set(found[name])
    assert found["teachers"]["trees"]["test"]["auc"] > 0.6
    rows = run.manifest(directory / "03_distill/net/fold0")["rows"]
    assert rows["train"] == 80 + 40, "with the transfer rows"
    assert run.manifest(directory / "03_distill/net-baseline/fold0")["rows"]["train"] == 80


def test_two_heads_are_judged_each_and_their_mean(table_run: tuple[Path, Path]) -> None:
    path, directory = table_run
    net = "student.init={architecture: llmkd-tabular, config: {hidden_sizes: [16], heads: 2}}"
    all_stages(path, net, "task.features={numeric: [x0, x1, x2], categorical: [c]}")
    found = json.loads((directory / "06_evaluate" / "metrics.json").read_text())
    assert set(found["outputs"]) == {"hard", "soft", "mean"}
    assert found["outputs"]["mean"]["log_loss"] == pytest.approx(found["merged"]["log_loss"])
    assert len({output["log_loss"] for output in found["outputs"].values()}) == 3
