"""What the report says of runs: figures by hand, honest words, nothing that should not leave a run."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkd import logits, run
from llmkd.errors import CacheError, RunError
from llmkd.evaluate import drift, ece, mean_scores, scores, softmax
from llmkd.reporting import figures, gather, judged, looks, provenance, rowwise, words, write_report
from llmkd.reporting.page import document, write

LABELS = ["<script>document.title='taken'</script>", "b & c", "constructor"]
HOSTILE = "<img src=x onerror=alert(1)>"
TEXT = "a text that stays where it is"
TEST, FOLDS = 60, 2
Table = dict[str, Any]


def unit(
    root: Path, place: str, settings: Table, inputs: Sequence[str], metrics: Table, **files: Any
) -> None:
    """A finished unit; files: writers by what they are called, `__` for a slash."""
    digests = {name: run.digest(root / name) for name in inputs}
    stage = place.split("/")[0]
    with run.writing(root / place, stage, settings, digests, 5, alone=True) as made:
        for name, write in files.items():
            path = made.path / name.replace("__", "/").replace("_of_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        made.metrics.update(metrics)
        made.rows["train"] = 40


def history(terms: Sequence[str], fold: int) -> Table:
    entries = [
        {"step": step, "epoch": 0.1 * step, "learning_rate": 0.1, "grad_norm": 1.0, "loss": 1 / step + fold}
        | dict.fromkeys(terms, 2 / step + fold)
        for step in (1, 2, 4)
    ]
    return {"loss": entries, "dev": [{"step": 4, "dev_log_loss": 1.0 + fold}], "best": 1.0, "steps": 4}


def forecasts(truth: np.ndarray, strength: float, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (strength * np.eye(3)[truth] + random.normal(size=(len(truth), 3))).astype(np.float32)


def fixed(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def made(root: Path, *, student: float = 1.0, baseline: float | None = 0.2, artifacts: bool = True) -> Path:
    """A finished classifier's run without a model in it: two teachers, two folds, `student` and `baseline`
    as sure of the labels as told."""
    truth = np.random.default_rng(1).integers(0, 3, TEST)
    ids = [f"row {i} {HOSTILE}" if i % 2 else f"row {i}" for i in range(TEST)]
    table = pa.table(
        {
            "id": [*ids, *(f"t{i}" for i in range(8))],
            "stem": [*ids, *(f"t{i}" for i in range(8))],
            "swapped": [False] * (TEST + 8),
            "part": ["test"] * TEST + ["train"] * 8,
            "fold": [-1] * TEST + [i % FOLDS for i in range(8)],
            "label": [*truth.tolist(), *[0] * 8],
            "text": [TEXT] * (TEST + 8),
        }
    ).replace_schema_metadata({"labels": json.dumps(LABELS)})
    task = {"kind": "classification", "train": "/home/someone/data/train.parquet", "api_key": "hunter2"}
    report = {"labels": LABELS}
    unit(
        root,
        "00_prepare",
        {"task": task},
        [],
        report,
        rows_of_parquet=lambda path: pq.write_table(table, path),
    )

    def fold(
        place: str, settings: Table, found: np.ndarray, inputs: Sequence[str], terms: Sequence[str]
    ) -> None:
        k = settings["fold"]
        cached = {"test": (ids, found)}
        unit(
            root,
            place,
            settings,
            ["00_prepare", *inputs],
            history(terms, k),
            logits_of_parquet=lambda path: logits.write(path, cached, teacher="t", labels=LABELS),
            adapter__model_of_safetensors=lambda path: path.write_bytes(b"0" * (100 + k)),
        )

    metrics: Table = {"teachers": {}, "transductive": False}
    places = []

    def judge(
        name: str, strength: float, settings: Table, seed: int, stage: str, inputs: Any, terms: Any
    ) -> Table:
        found = [forecasts(truth, strength, seed + k) for k in range(FOLDS)]
        for k, one in enumerate(found):
            places.append(f"{stage}/{name}/fold{k}")
            fold(places[-1], {**settings, "fold": k}, one, inputs(k), terms)
        return mean_scores([scores(softmax(one), truth) for one in found])

    for seed, name in ((10, "llama"), (20, "qwen")):
        settings = {"teacher": {"name": name}, "note": HOSTILE, "precision": "fp32"}
        told = judge(name, 2.0, settings, seed, "02_teachers", lambda k: [], ["ce"])
        metrics["teachers"][name] = {**told, "test": told}
    which = {"student": {"name": "gemma"}}
    distill = {"weighting": "fixed", "teacher_weights": {"qwen": 2.0}}
    if baseline is not None:
        settings = {**which, "kind": "baseline"}
        metrics["baseline"] = judge(
            "gemma-baseline", baseline, settings, 30, "03_distill", lambda k: [], ["ce"]
        )
    settings = {**which, "kind": "student", "teachers": ["llama", "qwen"], "distill": distill}
    taught = ["ce", "kl/llama", "kl/qwen"]
    read = lambda k: [f"02_teachers/{name}/fold{k}" for name in ("llama", "qwen")]  # noqa: E731
    metrics["student"] = judge("gemma", student, settings, 40, "03_distill", read, taught)
    unit(root, "04_merge", which, [f"03_distill/gemma/fold{k}" for k in range(FOLDS)], {})
    unit(root, "05_quantize", {"quantize": {"bits": 8}}, ["00_prepare", "04_merge"], {})
    merged = forecasts(truth, student, 50)
    quantized = merged + np.float32(0.01)
    quantized[7, 0] += 1
    for name, found in (("merged", merged), ("quantized", quantized)):
        metrics[name] = scores(softmax(found), truth)
    metrics |= {
        "drift": drift(merged, quantized),
        "latency": {"rows_per_second": 1000.0, "artifacts": {"merged": 1200.0, "quantized": 1000.0}},
        "size_bytes": {"merged": 400, "quantized": 200},
        "calibration": {"temperature": 1.5, "rows": 8},
    }
    p = softmax(quantized)
    order = np.random.default_rng(3).permutation(TEST)
    named = {"id": [ids[at] for at in order], "label": truth[order]}
    both = {"merged": fixed(merged[order]), "quantized": fixed(quantized[order])} if artifacts else {}
    files = {
        "metrics_of_json": lambda path: run.write_json(path, metrics),
        "predictions_of_parquet": lambda path: pq.write_table(
            pa.table(named | {f"p_{name}": p[order, i] for i, name in enumerate(LABELS)}), path
        ),
    }
    if artifacts:
        files["logits_of_parquet"] = lambda path: pq.write_table(pa.table(named | both), path)
    unit(root, "06_evaluate", which, ["00_prepare", "05_quantize", *places], metrics, **files)
    return root


def language(root: Path) -> Path:
    """A finished language model's run, likewise."""
    task = {"task": {"kind": "causal_lm"}}
    unit(root, "00_prepare", task, [], {})
    unit(
        root,
        "01_pretrain/big",
        {},
        [],
        {},
        model__model_of_safetensors=lambda path: path.write_bytes(b"0" * 900),
    )
    which = {"student": {"name": "small"}}
    settings = {**which, "kind": "student", "teachers": ["big"], "fold": 0, "distill": {"weighting": "fixed"}}
    told = {**history(["ce", "kl/big"], 0), "dev": []}
    unit(root, "03_distill/small/fold0", settings, ["00_prepare", "01_pretrain/big"], told)
    unit(root, "04_merge", which, ["03_distill/small/fold0"], {})
    found = {"nll": 2.0, "perplexity": 7.39, "tokens": 500.0, "tokens_per_second": 90.0}
    near = {"kl/big": 0.25, "agreement/big": 0.75}
    metrics = {
        "teachers": {"big": found},
        "before": {**found, **near, "perplexity": 90.0},
        "baseline": {**found, **near, "perplexity": 9.0},
        "student": {**found, **near, "perplexity": 8.0},
        "merged": {**found, **near, "perplexity": 8.0},
        "size_bytes": {"merged": 300},
        "continuations": [{"prompt": f"once {HOSTILE}", "said": {"teacher big": "upon", "merged": HOSTILE}}],
    }
    inputs = ["00_prepare", "03_distill/small/fold0", "04_merge"]
    unit(root, "06_evaluate", which, inputs, {}, metrics_of_json=lambda path: run.write_json(path, metrics))
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("whole") / "run")


def rows_of(root: Path) -> Table:
    data = gather.gather(root)
    return judged.judged(root, data["units"], LABELS, data["student"], [])


def page(path: Path) -> str:
    """The report without plotly's own code."""
    content = path.read_text(encoding="utf-8")
    return re.sub(r'id="plotly">.*?</script>', "", content, flags=re.DOTALL)


def plots(content: str) -> Table:
    found = re.search(r'id="figures">(.*?)</script>', content, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def test_one_file_with_its_sections_in_order(whole: Path) -> None:
    path = write_report(whole)
    assert path == whole / "report.html"
    assert not list(whole.glob("*.tmp"))
    titles = re.findall(r"<h2>(.*?)</h2>", page(path))
    assert titles == [
        "Scores",
        "Log loss",
        "Training",
        "Agreement",
        "Calibration",
        "Size and speed",
        "Confusion",
        "Single rows",
        "Provenance",
    ]
    assert path.stat().st_size < 2.5e6
    there = {"losses", "courses", "agreement", "divergence", "calibration", "size", "speed", "confusion"}
    assert plots(page(path)).keys() == there
    assert re.findall(r"class='plot' id='(\w+)'", page(path)) == [
        "losses",
        "courses",
        "agreement",
        "divergence",
        "calibration",
        "size",
        "speed",
        "confusion",
    ]


def test_where_no_file_can_stand_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is a folder; name a file"):
        write("", tmp_path)
    with pytest.raises(RunError, match=r"there is no folder .*no; make it first"):
        write("", tmp_path / "no" / "r.html")
    assert not list(tmp_path.parent.glob("*.tmp"))


def test_it_asks_nothing_of_any_network(whole: Path, tmp_path: Path) -> None:
    content = write_report(whole, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in content
    assert not re.findall(r"(?:src|href|action)\s*=", page(tmp_path / "r.html").replace(escaped(), ""))
    assert not re.findall(r"https?://", page(tmp_path / "r.html"))


def escaped() -> str:
    return HOSTILE.replace("<", "&lt;").replace(">", "&gt;")


def test_no_string_of_the_run_becomes_markup(whole: Path, tmp_path: Path) -> None:
    content = page(write_report(whole, tmp_path / "r.html"))
    assert "<img" not in content
    assert "<script>document" not in content
    assert escaped() in content
    shown = json.dumps(plots(content))
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    assert "b &amp; c" in shown


def test_no_string_of_a_plot_ends_its_script() -> None:
    name = "</script><b>&amp;"
    drawn = looks.figure([{"type": "scatter", "name": name}], 100)
    content = document("t", "", {"one": drawn})
    assert name not in content
    assert plots(content)["one"]["data"][0]["name"] == name


def test_neither_texts_nor_machine_paths_nor_secrets_leave_the_run(whole: Path, tmp_path: Path) -> None:
    content = write_report(whole, tmp_path / "r.html").read_text(encoding="utf-8")
    for word in (TEXT, "/home/someone", "hunter2", str(whole.parent)):
        assert word not in content
    assert "…/train.parquet" in content


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/data/x.parquet", "…/x.parquet"),
        ("/home/a b/x y.csv", "…/x y.csv"),
        ("~/x.csv", "…/x.csv"),
        ("C:\\data\\x.csv", "…/x.csv"),
        ("file:///data/x.csv", "…/x.csv"),
        ("../shared/x.csv", "../shared/x.csv"),
        ("arena:rows=96,seed=1", "arena:rows=96,seed=1"),
        ("{prompt}\nA: {response_a}/{response_b}", "{prompt}\nA: {response_a}/{response_b}"),
        ("--in /data/a --out=/data/b", "--in …/a --out=…/b"),
        ("https://user:pass@host/a", "https://host/a"),
        (
            {"max_tokens": 7, "hf_token": "x", "api_key": None},
            {"max_tokens": 7, "hf_token": "(hidden)", "api_key": None},
        ),
        ({"hub_token": "x", "token_embedding": 3}, {"hub_token": "(hidden)", "token_embedding": 3}),
        ([{"/data/x": 1}], [{"…/x": 1}]),
    ],
)
def test_a_setting_as_a_stranger_may_see_it(value: Any, shown: Any) -> None:
    assert provenance.public(value) == shown


def test_the_gap_is_paired_over_rows(whole: Path) -> None:
    rows = rows_of(whole)
    losses = {
        name: np.mean(
            [-np.log(softmax(fold)[np.arange(TEST), rows["labels"]]) for fold in rows["folds"][name]], axis=0
        )
        for name in ("student", "baseline")
    }
    difference = losses["baseline"] - losses["student"]
    found = judged.gap(rows)
    assert found == pytest.approx((difference.mean(), difference.std(ddof=1) / TEST**0.5))
    metrics = gather.gather(whole)["metrics"]
    assert found
    assert found[0] == pytest.approx(metrics["baseline"]["log_loss"] - metrics["student"]["log_loss"])


@pytest.mark.parametrize(
    ("student", "baseline", "told"),
    [
        (2.0, 0.0, r"^Distillation paid: .* lower with its teachers \(0"),
        (0.0, 2.0, r"^Distillation did not pay: .* higher with its teachers \(1"),
        (1.0, 1.0, "^Whether distillation paid cannot be told from these rows: "),
        (1.0, None, "it is not known whether distillation paid"),
    ],
)
def test_the_headline_is_honest(tmp_path: Path, student: float, baseline: float | None, told: str) -> None:
    root = made(tmp_path / "run", student=student, baseline=baseline)
    found = re.search(r"<h1>(.*?)</h1>", page(write_report(root)))
    assert found
    assert re.search(told, found[1])
    assert f"{gather.gather(root)['metrics']['quantized']['log_loss']:.4f}" in found[1]


def test_who_is_ahead_is_told_by_sign() -> None:
    assert words.judgement(0.1, 0.01) == "Distillation paid"
    assert words.judgement(-0.1, 0.01) == "Distillation did not pay"
    assert "cannot be told" in words.judgement(0.019, 0.01)
    assert words.judgement(-0.1, None) == "In this one run distillation did not pay"
    assert "cannot be told" in words.judgement(0.1, float("nan"))  # of one row


def test_the_table_and_the_dots_show_what_metrics_say(whole: Path) -> None:
    data, content = gather.gather(whole), page(write_report(whole))
    assert list(data["scores"]) == [
        "teacher llama",
        "teacher qwen",
        "baseline",
        "student",
        "merged",
        "quantized",
    ]
    losses = plots(content)["losses"]["data"]
    for name, row in data["scores"].items():
        assert f"</span>{name}</td><td>{row['log_loss']:.4f}</td><td>{row['accuracy']:.4f}</td>" in content
    assert losses[1]["x"] == pytest.approx([row["log_loss"] for row in data["scores"].values()])
    assert len(losses[0]["x"]) == 4 * FOLDS


def judged_sizes(settings: Table, files: Table, teachers: Sequence[str] = ()) -> Table:
    """The sizes told of a run of one student's fold and nothing else."""
    unit = {"stage": gather.DISTILL, "settings": {"kind": "student", "fold": 0, **settings}, "files": files}
    metrics = {"size_bytes": {}, "teachers": {name: {} for name in teachers}}
    return gather.sizes({"03_distill/gemma/fold0": unit}, metrics, "gemma")


def test_a_base_outside_the_run_is_sized_by_its_files_or_its_known_shape(tmp_path: Path) -> None:
    adapter = {"adapter/adapter_model.safetensors": {"bytes": 1000}}
    (tmp_path / "model.safetensors").write_bytes(b"0" * 300)
    for model, base in (("google/gemma-2-2b-it", 2 * 2_614_341_888), (str(tmp_path), 300)):
        found = judged_sizes({"student": {"name": "gemma", "model": model}}, adapter)
        assert found == {"student": base + 1000}
    assert judged_sizes({"student": {"name": "gemma", "model": "no/one"}}, adapter) == {"student": None}
    assert judged_sizes({"student": {"name": "gemma", "model": None}}, adapter) == {"student": None}
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")  # what lies there now tells nothing
    assert judged_sizes({"student": {"name": "gemma", "model": str(tmp_path)}}, adapter) == {"student": None}


def test_a_teacher_beside_the_student_is_sized_too(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 300)
    settings = {"student": {"name": "gemma"}, "online": [{"name": "near", "model": str(tmp_path)}]}
    whole = {"adapter/model.safetensors": {"bytes": 70}}
    found = judged_sizes(settings, whole, ["near", "far"])
    assert found == {"student": 70, "teacher near": 300, "teacher far": None}


def test_nearly_equal_accuracies_are_not_stretched_apart() -> None:
    points = {"merged": (10.0, 1.0), "quantized": (5.0, 1.0)}
    of = looks.colours(list(points))
    drawn = figures.scatter(points, of, across="size", up="accuracy", unit="B")
    assert drawn.layout.yaxis.range == (0.98, 1.02)
    far = {"merged": (10.0, 1.0), "quantized": (5.0, 0.5)}
    assert figures.scatter(far, of, across="size", up="accuracy", unit="B").layout.yaxis.range is None


def test_ticks_of_a_logarithmic_axis_are_numbers_in_full() -> None:
    values = {"teacher big": 7.4, "before": 90.0}
    of = looks.colours(list(values))
    axis = figures.dots(values, {}, of, what="perplexity", log=True).layout.xaxis
    assert {"10", "20", "50", "100"} <= set(axis.ticktext)
    assert not {"3", "9", "90"} & set(axis.ticktext)
    near = {"merged": (1200.0, 0.5), "quantized": (1000.0, 0.5)}
    drawn = figures.scatter(near, looks.colours(list(near)), across="speed", up="accuracy", unit="rows/s")
    seen = [word for word in drawn.layout.xaxis.ticktext if 708 < float(word.replace(",", "")) < 1695]
    assert seen == ["1,000", "1,500"]


def test_a_model_has_one_colour(whole: Path) -> None:
    drawn = plots(page(write_report(whole)))
    names = list(gather.gather(whole)["scores"])
    of = looks.colours(names)
    assert len(set(of.values())) == len(names)
    assert drawn["losses"]["data"][1]["marker"]["color"] == [of[name] for name in names]
    assert {trace["name"]: trace["marker"]["color"] for trace in drawn["size"]["data"]} == of
    assert set(re.findall(r"#[0-9a-f]{6}", json.dumps(drawn))) <= looks.DARK.keys()
    assert looks.colours(["quantized", "quantized_tta_calibrated", "x", "x"]).keys() == {
        "quantized",
        "quantized_tta_calibrated",
        "x",
    }
    assert looks.colours(["quantized_tta"])["quantized_tta"] == of["quantized"]


def test_courses_of_a_term_fold_by_fold_and_their_mean(whole: Path) -> None:
    content = page(write_report(whole))
    assert re.findall(r"<option value='(.*?)'>", content) == ["dev_log_loss", "loss", "ce", "kl"]
    traces = [trace for trace in plots(content)["courses"]["data"] if trace["meta"] == "kl"]
    names = ["student from llama", "student from qwen"]
    assert [trace["name"] for trace in traces] == [name for name in names for _ in range(FOLDS + 1)]
    first, second, mean = traces[:3]
    assert first["y"] == [2, 1, 0.5]
    assert mean["y"] == pytest.approx([(a + b) / 2 for a, b in zip(first["y"], second["y"], strict=True)])
    shown = [trace["meta"] for trace in plots(content)["courses"]["data"] if trace["visible"] is True]
    assert set(shown) == {"dev_log_loss"}


def test_phases_follow_one_another_and_peers_have_their_own_courses() -> None:
    phases = [history(["gemma/ce", "bert/ce", "bert/kl/llama", "exit1/ce"], 0), history(["ce"], 0)]
    settings = {"kind": "student", "student": {"name": "gemma"}, "fold": 0, "peers": [{"name": "bert"}]}
    manifest = {"stage": "03_distill", "settings": settings, "metrics": {"phases": phases}}
    found = list(gather.curves({"03_distill/gemma/fold0": manifest}, "gemma", ["llama"]))
    by = {(one["model"], one["term"], one["against"]): one["steps"] for one in found}
    assert by["student", "loss", None] == [1, 2, 4, 5, 6, 8]
    assert by["peer bert", "ce", None] == [1, 2, 4]
    assert by["peer bert", "kl", "teacher llama"] == [1, 2, 4]
    assert by["student", "exit1/ce", None] == [1, 2, 4]


def test_agreement_by_hand(whole: Path) -> None:
    p = judged.means(rows_of(whole), "quantized")
    same, divergence = judged.agreement(p)
    a, b = list(p).index("teacher llama"), list(p).index("student")
    left, right = p["teacher llama"], p["student"]
    assert same[a, b] == np.mean(left.argmax(1) == right.argmax(1))
    assert divergence[a, b] == pytest.approx(np.mean(np.sum(left * np.log(left / right), axis=1)))
    assert np.allclose(np.diag(divergence), 0)
    assert np.allclose(np.diag(same), 1)


def test_reliability_sums_up_to_the_ece(whole: Path) -> None:
    rows = rows_of(whole)
    p, labels = rows["shipped"], np.where(np.arange(TEST) % 5, rows["labels"], -1)
    found = {name: np.array(values) for name, values in judged.reliability(p, labels).items()}
    known = labels >= 0
    assert found["rows"].sum() == known.sum()
    gaps = np.abs(found["accuracy"] - found["confidence"]) * found["rows"]
    assert gaps.sum() / known.sum() == pytest.approx(ece(p[known], labels[known]))


def test_confusion_counts_every_labelled_row_once(whole: Path) -> None:
    rows = rows_of(whole)
    labels = np.where(np.arange(TEST) % 5, rows["labels"], -1)
    found = judged.confusion(rows["shipped"], labels)
    assert found.sum() == (labels >= 0).sum()
    assert found[1, 2] == np.sum((labels == 1) & (rows["shipped"].argmax(1) == 2))


def test_of_many_classes_the_commonest_mistakes_are_told() -> None:
    many, truth = [f"class {i}" for i in range(rowwise.CELLS + 1)], np.repeat(np.arange(4), 5)
    p = np.eye(len(many))[np.where(truth == 3, 7, truth)]
    rows = {"shipped": p, "labels": truth, "name": "quantized"}
    content = rowwise.confusion(rows, many, {})
    assert "<td>class 3</td><td class='word'>class 7</td><td>5</td><td>100.0%</td>" in content
    assert content.count("<tr>") == 2


def test_rows_are_joined_by_id_and_the_most_moved_stands_first(whole: Path) -> None:
    rows = rows_of(whole)
    p = softmax(rows["logits"]["quantized"])
    np.testing.assert_allclose(p, rows["shipped"], atol=1e-6)
    size = np.abs(rows["logits"]["merged"] - rows["logits"]["quantized"]).max(axis=1)
    first, *rest = judged.most(rows, size, {"quantized": p})
    assert first["id"] == rows["ids"][7]
    assert first["size"] == pytest.approx(1.01, abs=1e-5)
    assert len(rest) == judged.SHOWN - 1
    assert first["sides"]["quantized"] == pytest.approx(rows["shipped"][7].tolist(), abs=1e-6)


def test_rows_weighed_anew_each_have_weights_that_sum_to_the_fixed_ones(whole: Path) -> None:
    names = ["teacher llama", "teacher qwen"]
    found = judged.row_weights(rows_of(whole), names, "entropy", [1.0, 1.0])
    assert sum(found) == pytest.approx(2)
    assert all(0.5 < weight < 1.5 for weight in found)


def test_without_the_artifacts_logits_it_says_what_is_missing(tmp_path: Path) -> None:
    content = page(write_report(made(tmp_path / "run", artifacts=False)))
    assert content.count("06_evaluate has no logits.parquet; stage 06 run anew writes it.") == 2
    assert [trace["name"] for trace in plots(content)["calibration"]["data"]] == [
        "perfectly calibrated",
        "quantized",
    ]


def test_the_calibrated_curve_is_at_the_temperature_found(whole: Path) -> None:
    content = page(write_report(whole))
    curves = {trace["name"]: trace for trace in plots(content)["calibration"]["data"]}
    rows = rows_of(whole)
    expected = judged.reliability(softmax(rows["logits"]["quantized"] / 1.5), rows["labels"])
    assert curves["quantized_calibrated"]["x"] == pytest.approx(expected["confidence"], rel=1e-5)
    assert curves.keys() == {"perfectly calibrated", "merged", "quantized", "quantized_calibrated"}


def test_a_language_model_s_report(tmp_path: Path) -> None:
    content = page(write_report(language(tmp_path / "run")))
    found = re.search(r"<h1>(.*?)</h1>", content)
    assert found
    assert found[1].startswith("In this one run distillation paid: on 500 targets of test texts")
    assert "8.00 with its teacher and 9.00 on hard tokens alone" in found[1]
    assert "75.0% of the places" in found[1]
    assert f"<blockquote>once {escaped()} …</blockquote>" in content
    assert "<img" not in content
    assert list(plots(content)) == ["losses", "courses", "size", "speed"]
    assert "900 B" in content


def test_a_run_that_is_not_judged_is_told_how(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"06_evaluate.*python stages/06_evaluate\.py"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_was_made_anew_since_is_refused(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(root / "05_quantize")
    unit(root, "05_quantize", {"quantize": {"bits": 8}}, ["04_merge"], {}, more=lambda path: path.touch())
    with pytest.raises(RunError, match="05_quantize: made anew since 06_evaluate"):
        write_report(root)


def test_a_changed_byte_is_refused(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "run"))
    path = root / "06_evaluate/metrics.json"
    path.write_text(path.read_text().replace('"rows": 60', '"rows": 61'))
    with pytest.raises(RunError, match=r"metrics\.json"):
        write_report(root)


def test_what_was_deleted_since_is_named(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(root / "02_teachers/qwen")
    content = page(write_report(root))
    assert "Gone since stage 06 judged: 02_teachers/qwen/fold0, 02_teachers/qwen/fold1." in content
    assert "teacher qwen" in content, "its scores stand in metrics.json"


def test_other_rows_logits_are_refused(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "run"))
    path = root / "06_evaluate/logits.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(RunError, match=r"logits\.parquet"):
        write_report(root)
    with pytest.raises((RunError, CacheError), match="ids are not the test rows'"):
        judged._artifacts(path, rows_of(whole)["ids"])


def test_units_left_by_another_config_are_not_shown(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.copytree(root / "02_teachers/qwen", root / "02_teachers/old")
    assert "02_teachers/old" not in page(write_report(root))


def test_a_whole_run_s_report(copy: Path) -> None:
    content = page(write_report(copy))
    metrics = json.loads((copy / "06_evaluate/metrics.json").read_text())
    drawn = plots(content)
    assert f"{metrics['quantized']['log_loss']:.4f}" in content
    assert {
        "losses",
        "courses",
        "agreement",
        "divergence",
        "calibration",
        "size",
        "confusion",
    } <= drawn.keys()
    models = {trace["name"] for trace in drawn["courses"]["data"] if trace["meta"] == "dev_log_loss"}
    assert models == {"teacher llama", "teacher qwen", "student", "baseline"}
    table = pq.read_table(copy / "00_prepare/rows.parquet")
    for text in table["prompt"].to_pylist()[:20]:
        assert text not in content
