"""The report's figures: what is drawn of scores, sizes and courses, and in which colours."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_report import (
    FOLDS,
    Table,
    history,
    page,
    plots,
)

from llmkd.reporting import figures, gather, looks, write_report


def judged_sizes(settings: Table, files: Table, teachers: Sequence[str] = ()) -> Table:
    """The sizes told of a run of one student's fold and nothing else."""
    unit = {"stage": gather.DISTILL, "settings": {"kind": "student", "fold": 0, **settings}, "files": files}
    metrics = {"size_bytes": {}, "teachers": {name: {} for name in teachers}}
    return gather.sizes({"03_distill/gemma/fold0": unit}, metrics, "gemma")


def test_the_table_and_the_dots_show_what_metrics_say(modelless: Path) -> None:
    data, content = gather.gather(modelless), page(write_report(modelless))
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


def test_a_model_has_one_colour(modelless: Path) -> None:
    drawn = plots(page(write_report(modelless)))
    names = list(gather.gather(modelless)["scores"])
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


def test_courses_of_a_term_fold_by_fold_and_their_mean(modelless: Path) -> None:
    content = page(write_report(modelless))
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
