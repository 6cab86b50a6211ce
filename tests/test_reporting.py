"""What the report says of runs: honest words, nothing that should not leave a run, no stale file."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny_report import (
    TEXT,
    escaped,
    language,
    made,
    page,
    plots,
    rows_of,
    unit,
)

from llmkd.errors import CacheError, RunError
from llmkd.reporting import gather, judged, looks, provenance, words, write_report
from llmkd.reporting.page import document, write


def test_one_file_with_its_sections_in_order(modelless: Path) -> None:
    path = write_report(modelless)
    assert path == modelless / "report.html"
    assert not list(modelless.glob("*.tmp"))
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


def test_it_asks_nothing_of_any_network(modelless: Path, tmp_path: Path) -> None:
    content = write_report(modelless, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in content
    assert not re.findall(r"(?:src|href|action)\s*=", page(tmp_path / "r.html").replace(escaped(), ""))
    assert not re.findall(r"https?://", page(tmp_path / "r.html"))


def test_no_string_of_the_run_becomes_markup(modelless: Path, tmp_path: Path) -> None:
    content = page(write_report(modelless, tmp_path / "r.html"))
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


def test_neither_texts_nor_machine_paths_nor_secrets_leave_the_run(modelless: Path, tmp_path: Path) -> None:
    content = write_report(modelless, tmp_path / "r.html").read_text(encoding="utf-8")
    for word in (TEXT, "/home/someone", "hunter2", str(modelless.parent)):
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


def test_what_was_made_anew_since_is_refused(modelless: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(modelless, tmp_path / "run"))
    shutil.rmtree(root / "05_quantize")
    unit(root, "05_quantize", {"quantize": {"bits": 8}}, ["04_merge"], {}, more=lambda path: path.touch())
    with pytest.raises(RunError, match="05_quantize: made anew since 06_evaluate"):
        write_report(root)


def test_a_changed_byte_is_refused(modelless: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(modelless, tmp_path / "run"))
    path = root / "06_evaluate/metrics.json"
    path.write_text(path.read_text().replace('"rows": 60', '"rows": 61'))
    with pytest.raises(RunError, match=r"metrics\.json"):
        write_report(root)


def test_what_was_deleted_since_is_named(modelless: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(modelless, tmp_path / "run"))
    shutil.rmtree(root / "02_teachers/qwen")
    content = page(write_report(root))
    assert "Gone since stage 06 judged: 02_teachers/qwen/fold0, 02_teachers/qwen/fold1." in content
    assert "teacher qwen" in content, "its scores stand in metrics.json"


def test_other_rows_logits_are_refused(modelless: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(modelless, tmp_path / "run"))
    path = root / "06_evaluate/logits.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(RunError, match=r"logits\.parquet"):
        write_report(root)
    with pytest.raises((RunError, CacheError), match="ids are not the test rows'"):
        judged._artifacts(path, rows_of(modelless)["ids"])


def test_units_left_by_another_config_are_not_shown(modelless: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(modelless, tmp_path / "run"))
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
