"""The seven stages as a user runs them: what they leave, what they skip, what they refuse."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from conftest import STAGES

from llmkd import run

UNITS = [
    "00_prepare",
    *(f"01_pretrain/{name}" for name in ("llama", "qwen", "gemma")),
    *(f"02_teachers/{name}/fold{fold}" for name in ("llama", "qwen") for fold in (0, 1)),
    *(f"03_distill/{name}/fold{fold}" for name in ("gemma", "gemma-baseline") for fold in (0, 1)),
    "04_merge",
    "05_quantize",
    "06_evaluate",
]


def metrics(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "06_evaluate" / "metrics.json").read_text())
    return found


def remade(before: dict[str, tuple[int, bytes]], directory: Path) -> set[str]:
    """The units whose files changed since `before`."""
    after = tiny.snapshot(directory)
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {unit for unit in UNITS if any(name.startswith(f"{unit}/") for name in names)}


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_every_unit_is_finished_and_nothing_is_left_over(finished: Path) -> None:
    assert sorted(str(path.parent.relative_to(finished)) for path in finished.rglob(run.MANIFEST)) == sorted(
        UNITS
    )
    for unit in UNITS:
        manifest = run.manifest(finished / unit)
        assert manifest["stage"] == unit.split("/")[0]
        assert (manifest["seed"], manifest["ranks"]) == (3, 1)
        for name, entry in manifest["files"].items():
            assert run.file_entry(finished / unit / name) == entry
    whole = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_dir()}
    assert not [name for name in whole if not any((finished / name).iterdir()) or "partial" in name]


def test_every_unit_says_how_many_rows_it_saw(finished: Path) -> None:
    assert run.manifest(finished / "00_prepare")["rows"] == {"train": 192, "test": 80}
    for name, views in (
        ("02_teachers/qwen", {"oof", "in_sample", "test"}),
        ("03_distill/gemma", {"oof", "test"}),
    ):
        rows = [run.manifest(finished / name / f"fold{fold}")["rows"] for fold in (0, 1)]
        assert set(rows[0]) == {"train", *views}
        assert rows[0]["oof"] + rows[1]["oof"] == 192
        assert [row["train"] + row["oof"] for row in rows] == [192, 192]
        assert rows[0]["test"] == 80


def test_metrics_hold_what_is_promised(finished: Path) -> None:
    found = metrics(finished)
    score = {"log_loss", "accuracy", "ece", "rows"}
    for name in ("llama", "qwen"):
        assert score <= set(found["teachers"][name]) & set(found["teachers"][name]["test"])
        assert found["teachers"][name]["rows"] == 96
    for name in ("baseline", "student", "merged", "quantized", "quantized_tta"):
        assert score <= set(found[name])
        assert found[name]["rows"] == 40
        assert 0 < found[name]["log_loss"] < 3
    assert set(found["drift"]) == {"max_abs_logit", "mean_abs_logit", "kl", "agreement"}
    assert set(found["size_bytes"]) == {"merged", "quantized"}
    assert found["latency"]["artifacts"].keys() == {"merged", "quantized"}
    assert found["latency"]["rows_per_second"] == found["latency"]["artifacts"]["quantized"] > 0
    assert 0 <= found["padding_share"] < 0.1
    assert 0.5 < found["bayes_log_loss"] < 1.1
    assert abs(found["quantized"]["log_loss"] - found["merged"]["log_loss"]) < 0.01
    assert found["merged"]["log_loss"] != found["quantized"]["log_loss"]


def test_predictions_are_of_every_test_row_once(finished: Path) -> None:
    table = pq.read_table(finished / "06_evaluate" / "predictions.parquet")
    rows = pq.read_table(finished / "00_prepare" / "rows.parquet").to_pylist()
    assert table["id"].to_pylist() == [
        row["id"] for row in rows if row["part"] == "test" and not row["swapped"]
    ]
    names = [name for name in table.column_names if name.startswith("p_")]
    for row in table.to_pylist():
        assert sum(row[name] for name in names) == pytest.approx(1)


def test_the_student_logs_every_term_and_the_baseline_has_no_teacher(finished: Path) -> None:
    terms = {"ce", "kl/llama", "kl/qwen", "cosine/llama", "cosine/qwen"}
    known = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    for name, expected in (("gemma", terms), ("gemma-baseline", {"ce"})):
        for entry in run.manifest(finished / f"03_distill/{name}/fold0")["metrics"]["loss"]:
            assert set(entry) - known == expected


def test_the_artifact_holds_no_calibration_text(finished: Path) -> None:
    rows = pq.read_table(finished / "00_prepare" / "rows.parquet").to_pylist()
    texts = {row[field].encode() for row in rows for field in ("prompt", "response_a", "response_b")}
    for path in (finished / "05_quantize" / "model").iterdir():
        data = path.read_bytes()
        assert not [text for text in texts if len(text) > 20 and text in data], path
    config = json.loads((finished / "05_quantize" / "model" / "config.json").read_text())
    assert "dataset" not in config["quantization_config"]


def test_artifacts_of_one_name_are_judged_each_for_itself(copy: Path) -> None:
    own = (copy / "06_evaluate" / "metrics.json").read_bytes()
    models = [copy / "04_merge" / "model", copy / "05_quantize" / "model"]
    assert tiny.stage("06_evaluate", f"run={copy}", *(f"--artifact={model}" for model in models)) == 0
    found = [json.loads((path / "metrics.json").read_text()) for path in copy.glob("06_evaluate-model-*")]
    whole = json.loads(own)
    losses = {metrics["artifact"]["log_loss"] for metrics in found}
    assert losses == {whole["merged"]["log_loss"], whole["quantized"]["log_loss"]}
    assert len(found) == 2
    assert (copy / "06_evaluate" / "metrics.json").read_bytes() == own


def test_an_artifact_of_other_classes_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, own = copy / "04_merge" / "model", copy.parent / "theirs"
    shutil.copytree(model, own)
    (own / "llmkd.json").unlink()
    config = json.loads((own / "config.json").read_text())
    for names, code in ((["b", "a", "tie"], 2), (["LABEL_0", "LABEL_1", "LABEL_2"], 0)):
        numbers = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        (own / "config.json").write_text(json.dumps({**config, **numbers}))
        assert tiny.stage("06_evaluate", f"run={copy}", f"--artifact={own}") == code
    assert "its classes are ['b', 'a', 'tie'], not ['a', 'b', 'tie']" in capsys.readouterr().err
    assert len(list(copy.glob("06_evaluate-theirs-*/metrics.json"))) == 1


def test_an_artifact_without_a_pad_token_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(shutil.copytree(copy / "04_merge" / "model", copy.parent / "padless"))
    told = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps({**told, "pad_token": None}))
    assert tiny.stage("06_evaluate", f"run={copy}", f"--artifact={own}") == 2
    assert f"{own}: its tokenizer has no pad token; set one and save it again" in one_error(capsys)


def test_a_model_is_pretrained_on_no_labels_of_the_training_rows(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It starts every fold, and so would know those of the rows that a fold holds out."""
    assert (
        tiny.stage("01_pretrain", f"run={copy}", "--model=qwen", "pretrain.1.data=arena:rows=96,seed=1") == 2
    )
    assert "pretrain.1.data = arena:rows=96,seed=1: every row stands in task.train too" in one_error(capsys)


def test_no_file_names_this_machine(finished: Path) -> None:
    for path in (path for path in finished.rglob("*") if path.is_file()):
        assert str(finished).encode() not in path.read_bytes(), path


def test_a_moved_run_is_skipped_whole(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny.snapshot(copy)
    for name in STAGES:
        assert tiny.stage(name, f"run={copy}") == 0
    assert tiny.snapshot(copy) == before
    out = capsys.readouterr().out
    assert out.count("done\n") == 1 + 3 + 2 + 1 + 1 + 1 + 1
    assert "made anew" not in out


def test_a_changed_teacher_is_made_anew_with_all_that_rests_on_it(copy: Path) -> None:
    before, change = tiny.snapshot(copy), "teachers.qwen.learning_rate=1e-3"
    for name in ("00_prepare", "01_pretrain", "02_teachers"):
        assert tiny.stage(name, f"run={copy}", change) == 0
    assert remade(before, copy) == {"02_teachers/qwen/fold0", "02_teachers/qwen/fold1"}
    before = tiny.snapshot(copy)
    assert tiny.stage("03_distill", f"run={copy}", change, "--fold", "1") == 0
    assert remade(before, copy) == {"03_distill/gemma/fold1"}


def test_a_changed_evaluation_is_all_that_is_made_anew(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny.snapshot(copy)
    for name in STAGES:
        assert tiny.stage(name, f"run={copy}", "evaluate.tta=none") == 0
    assert remade(before, copy) == {"06_evaluate"}
    assert f"{copy / '06_evaluate'}: config or inputs changed, made anew" in capsys.readouterr().out
    assert "quantized_tta" not in metrics(copy)


def test_a_part_is_made_alone(finished: Path, tmp_path: Path) -> None:
    for name in ("00_prepare", "01_pretrain"):
        shutil.copytree(finished / name, tmp_path / name)
    assert tiny.stage("02_teachers", f"run={tmp_path}", "--teacher", "qwen", "--fold", "1") == 0
    assert [path.name for path in (tmp_path / "02_teachers").iterdir()] == ["qwen"]
    assert [path.name for path in (tmp_path / "02_teachers" / "qwen").iterdir()] == ["fold1"]
    made, whole = (run.manifest(root / "02_teachers/qwen/fold1") for root in (tmp_path, finished))
    assert made["fingerprint"] == whole["fingerprint"]
    assert made["metrics"]["best"] == pytest.approx(whole["metrics"]["best"], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        (
            "01_pretrain",
            ["--model", "bert"],
            "--model bert: there is no such model; choose among llama",
        ),
        ("02_teachers", ["--teacher", "gemma"], "--teacher gemma: there is no such teacher"),
        ("02_teachers", ["--fold", "2"], "--fold 2: there is no such fold; choose among 0, 1"),
        ("03_distill", ["--only", "teacher"], "--only teacher: there is no such only"),
    ],
)
def test_a_part_that_is_not_there_is_refused(
    name: str, flags: list[str], message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.stage(name, f"run={finished}", *flags) == 2
    assert message in one_error(capsys)


@pytest.mark.parametrize("number", range(1, 7))
def test_a_stage_without_its_inputs_names_the_command(
    number: int, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in STAGES[: number - 1]:
        shutil.copytree(finished / name, tmp_path / name)
    before = tiny.snapshot(tmp_path)
    assert tiny.stage(STAGES[number], f"run={tmp_path}") == 2
    assert f"run: python stages/{STAGES[number - 1]}.py --config" in one_error(capsys)
    assert tiny.snapshot(tmp_path) == before


def test_a_wrong_config_tells_all_its_faults(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny.snapshot(finished, partial=True)
    wrong = ["distill.epochs=-1", "task.max_tokens=2", "folds.count=many", "student.lor.r=3", "merge.how=sum"]
    for name in STAGES:
        assert tiny.stage(name, f"run={finished}", *wrong) == 2
        lines = capsys.readouterr().err.splitlines()
        for path in ("distill.epochs", "task.max_tokens", "folds.count", "student.lor", "merge.how"):
            assert [line for line in lines if re.match(rf"error: .*tiny\.yaml: {path}\b", line)], path
        assert any("= -1" in line for line in lines)
    assert tiny.snapshot(finished, partial=True) == before


def test_a_failing_training_touches_nothing_finished(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny.snapshot(copy)
    broken = "teachers.llama.learning_rate=1e38"
    assert tiny.stage("02_teachers", f"run={copy}", broken, "teachers.llama.clip=0") == 2
    assert "not finite" in one_error(capsys)
    assert tiny.snapshot(copy) == before
    assert tiny.stage("02_teachers", f"run={copy}") == 0
    assert tiny.snapshot(copy) == before


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_cache_is_refused(how: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = copy / "02_teachers" / "qwen" / "fold0" / "logits.parquet"
    cache.write_bytes(cache.read_bytes()[:-9]) if how == "cut" else cache.unlink()
    before = tiny.snapshot(copy)
    assert tiny.stage("03_distill", f"run={copy}", "distill.epochs=1") == 2
    assert f"{cache}: missing or not of the" in (error := one_error(capsys))
    assert "run: python stages/02_teachers.py" in error
    assert tiny.snapshot(copy) == before


def test_logits_of_other_rows_are_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = [f"run={copy}", "task.train=arena:rows=96,seed=77"]
    assert tiny.stage("00_prepare", *changed) == 0
    assert tiny.stage("03_distill", *changed) == 2
    assert "01_pretrain/gemma: made from other rows" in one_error(capsys)
    assert tiny.stage("01_pretrain", *changed) == 0
    before = tiny.snapshot(copy)
    assert tiny.stage("03_distill", *changed) == 2
    assert "made from another config or other inputs" in one_error(capsys)
    assert tiny.snapshot(copy) == before


def test_a_full_student_taught_out_of_fold(copy: Path) -> None:
    """No adapters: whole models are saved and averaged; teachers that did not see a row teach it."""
    changes = [
        f"run={copy}",
        "student.lora=null",
        "distill.view=oof",
        "distill.baseline=false",
        "quantize=null",
    ]
    for name in STAGES[3:]:
        assert tiny.stage(name, *changes) == 0
    for fold in (0, 1):
        manifest = run.manifest(copy / f"03_distill/gemma/fold{fold}")
        taught = {name for name in manifest["inputs"] if name.startswith("02_")}
        assert taught == {f"02_teachers/{name}/fold{1 - fold}" for name in ("llama", "qwen")}
        assert "adapter/model.safetensors" in manifest["files"]
    found = metrics(copy)
    assert {"student", "merged", "merged_tta"} <= set(found)
    assert not {"baseline", "quantized", "drift"} & set(found)


def test_teachers_over_quantized_bases_and_a_student_of_four_bits(copy: Path) -> None:
    before, names = metrics(copy), ("llama", "qwen")
    floats = [run.manifest(copy / f"02_teachers/{name}/fold0")["metrics"]["best"] for name in names]
    changes = [f"run={copy}", "teachers.llama.load_in=nf4", "teachers.qwen.load_in=int8", "quantize.bits=4"]
    for name in STAGES[2:]:
        assert tiny.stage(name, *changes) == 0
    for name, best in zip(names, floats, strict=True):
        manifest = run.manifest(copy / f"02_teachers/{name}/fold0")
        assert manifest["metrics"]["best"] == pytest.approx(best, abs=0.1)
        assert manifest["metrics"]["best"] != pytest.approx(best, abs=1e-5)  # the base has been rounded
        assert manifest["rows"]["oof"] + manifest["rows"]["train"] == 192
    packing = json.loads((copy / "05_quantize/model/config.json").read_text())["quantization_config"]
    assert packing["bits"] == 4
    found = metrics(copy)
    assert found["size_bytes"]["quantized"] < before["size_bytes"]["quantized"]
    assert found["drift"]["mean_abs_logit"] > 2 * before["drift"]["mean_abs_logit"]
    assert found["quantized"]["rows"] == found["merged"]["rows"] == 40


def test_one_fold_trained_on_everything(tmp_path: Path) -> None:
    changes = [
        f"run={tmp_path}",
        "folds={count: 1}",
        "pretrain=[]",
        "quantize=null",
        "distill.baseline=false",
    ]
    changes += ["views=[in_sample]", "evaluate.tta=none"]
    for name in STAGES:
        assert tiny.stage(name, *changes) == 0
    manifest = run.manifest(tmp_path / "03_distill/gemma/fold0")
    assert manifest["rows"] == {"train": 192, "test": 80}
    assert manifest["metrics"]["dev"] == []
    found = metrics(tmp_path)
    assert "oof" not in found["student"]
    assert found["merged"]["log_loss"] == pytest.approx(found["student"]["log_loss"], abs=0.01)


def test_texts_from_a_csv_with_an_encoder_for_a_teacher(tmp_path: Path) -> None:
    """Classification, words for labels, own column names; a Bert teaches a Llama."""
    for part, count in (("train", 60), ("test", 20)):
        lines = ["review,verdict"]
        lines += [f'"row {i} is {word}, {word}",{word}' for i in range(count) for word in ("good", "bad")]
        (tmp_path / f"{part}.csv").write_text("\n".join(lines), encoding="utf-8")
    sizes = "hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2"
    config = tmp_path / "texts.yaml"
    config.write_text(
        f"""
run: {tmp_path / "run"}
precision: fp32
task:
  kind: classification
  train: {tmp_path / "train.csv"}
  test: {tmp_path / "test.csv"}
  columns: {{text: review}}
  label: verdict
  labels: [bad, good]
  max_tokens: 32
folds: {{count: 2}}
teachers:
  - name: bert
    init: {{architecture: bert, config: {{{sizes}}}, tokenizer: {{vocab_size: 320}}}}
    lora: {{r: 4, alpha: 8, dropout: 0}}
    learning_rate: 1.0e-2
    batch_rows: 8
    epochs: 3
student:
  name: llama
  init: {{architecture: llama, config: {{{sizes}}}, tokenizer: {{vocab_size: 320}}}}
  lora: {{r: 4, alpha: 8, dropout: 0}}
distill: {{epochs: 3, learning_rate: 1.0e-2, batch_rows: 8}}
quantize: null
""",
        encoding="utf-8",
    )
    for name in STAGES:
        assert tiny.stage(name, config=config) == 0, name
    found = metrics(tmp_path / "run")
    assert found["merged"]["rows"] == 40
    assert found["student"]["log_loss"] < 0.69
    table = pq.read_table(tmp_path / "run" / "06_evaluate" / "predictions.parquet")
    assert table.column_names == ["id", "label", "p_bad", "p_good"]
