"""What a run will need: jobs, advice and text of whole configs."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from llmkd import config as configs
from llmkd.errors import ConfigError, LlmkdError, ModelError
from llmkd.layout import Layout
from llmkd.planning import lookup, plan, table
from llmkd.planning.jobs import Plan
from llmkd.planning.stages import distilling

SHIPPED = sorted((tiny.ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("method", ["cached", "feature", "self_distillation"])
def test_a_student_is_planned_with_the_states_that_its_method_looks_at(method: str) -> None:
    pair = "distill.features=[{teacher: llama, teacher_layer: 1, student_layer: 1}]"
    found = configs.load(tiny.CONFIG, [f"distill.method={method}", *([pair] if method == "feature" else [])])
    ways = {job.what: job.way for job in distilling(Plan(found, 1, {}), found.student)}
    assert ways["student"] is not None
    assert ways["baseline"] is not None
    assert (ways["student"].states, ways["baseline"].states) == (method != "cached", False)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.ROOT)
    config = configs.load(path)
    found = plan(config, rows={"task.train": 10_000, "task.test": 1000})
    assert json.loads(json.dumps(found)) == found
    assert {model["name"] for model in found["models"]} == {model.name for model in config.models}
    assert {job["stage"] for job in found["jobs"]} >= {"03", "04", "06"}
    for job in found["jobs"]:
        if job["memory"]:
            parts = sum(value for name, value in job["memory"].items() if name != "peak")
            assert 0 < job["memory"]["peak"] <= parts + 6  # each part is rounded
    lines = table(found).split("\n")
    assert max(map(len, lines)) <= 110
    assert sum(line.startswith("03") for line in lines) == sum(job["stage"] == "03" for job in found["jobs"])


def test_a_teacher_s_average_over_shifts_is_a_pass_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its logits are cached; its training and the student do as much as without it."""
    monkeypatch.chdir(tiny.ROOT)
    rows = {"task.train": 10_000, "task.test": 1000}
    asked = (f"teachers.large.average_shifts={most}" for most in (0, 2))
    plain, averaged = (plan(configs.load("configs/mnist.yaml", [one]), rows=rows) for one in asked)
    for one, other in zip(plain["jobs"], averaged["jobs"], strict=True):
        times = 25 if (one["stage"], one["what"]) == ("02", "logits") else 1
        for name in ("tokens", "flops"):
            assert other[name] == pytest.approx(times * one[name]), (one["stage"], one["what"])
        assert other["disk"] == one["disk"]
    assert averaged["totals"]["flops"] > plain["totals"]["flops"]


def lmsys(monkeypatch: pytest.MonkeyPatch, *overrides: str, **more: Any) -> dict[str, Any]:
    monkeypatch.chdir(tiny.ROOT)
    config = configs.load("configs/lmsys.yaml", overrides)
    rows = {"task.train": 57_477, "task.test": 5000, "pretrain.0.data": 60_000}
    return plan(config, devices=8, rows=rows, **more)


def test_the_reference_recipe_fits_eight_cards_of_80_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lmsys(monkeypatch)
    assert found["problems"] == []
    trained = next(job for job in found["jobs"] if (job["stage"], job["name"]) == ("02", "llama3-70b"))
    assert trained["steps"] == 5 * -(-(57_477 * 2 * 4 // 5) // 64)
    assert trained["tokens"] == pytest.approx(57_477 * 2 * 4 * 1024, rel=0.001)
    assert trained["memory"]["weights"] == pytest.approx(37.4e9 + 4 * 828e6, rel=0.01)
    assert trained["hours"] == pytest.approx(trained["flops"] / (8 * 312e12 * 0.4 * 3600))
    assert found["totals"]["unknown"] == 0


@pytest.mark.parametrize(("how", "k"), [("topk", 19), ("sampled", 21)])
def test_a_cache_of_next_words_takes_what_its_layout_says(
    how: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.ROOT)
    config = configs.load("configs/causal_lm.yaml", [f"distill.cache.how={how}", f"distill.cache.k={k}"])
    jobs = plan(config, rows={"task.train": 1000, "task.test": 10})["jobs"]
    (cache,) = [job for job in jobs if job["what"] == "cache"]
    assert cache["disk"] == Layout(how, k, 1000).token_bytes * cache["tokens"]


def test_advice_is_enough_where_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = ["distill.gradient_checkpointing=false", "student.lora=null", "student.load_in=auto"]
    found = lmsys(monkeypatch, *tight)
    problem = next(one for one in found["problems"] if one["what"] == "student")
    assert problem["peak"] > problem["limit"] >= problem["then"]
    assert any(change.startswith("distill.deepspeed=") for change in problem["changes"])
    after = lmsys(monkeypatch, *tight, *problem["changes"])
    assert not [one for one in after["problems"] if one["what"] == "student"]
    peak = next(job for job in after["jobs"] if job["what"] == "student")["memory"]["peak"]
    assert peak == problem["then"]
    assert "do not fit" in table(found)


def test_what_no_setting_mends_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lmsys(monkeypatch, memory_gb=16)
    problem = next(one for one in found["problems"] if (one["name"], one["what"]) == ("llama3-70b", "train"))
    assert problem["then"] > problem["limit"]
    assert "more memory" in table(found)
    mended = next(one for one in found["problems"] if one["name"] == "gemma2-9b" and one["what"] == "student")
    assert "student.load_in=nf4" in mended["changes"]


def test_rows_nobody_knows_are_in_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.ROOT)
    found = plan(configs.load("configs/sst2.yaml", ["run=nowhere"]))
    train = next(job for job in found["jobs"] if job["what"] == "train")
    assert train["steps"] is train["hours"] is train["flops"] is None
    assert train["memory"]["peak"] > 22.7e6 * 16
    assert found["totals"]["unknown"] > 0
    assert any("say --rows task.train=N" in line for line in found["assumptions"])
    assert "?" in table(found)


def test_lengths_are_measured_where_the_data_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tiny.ROOT)
    texts = ["word " * 8 + "end."] * 90  # 44 characters
    data = {"sentence": texts, "label": [0, 1] * 45}
    pq.write_table(pa.table(data), tmp_path / "train.parquet")
    pq.write_table(pa.table(data), tmp_path / "test.parquet")
    where = [f"task.{part}={tmp_path / part}.parquet" for part in ("train", "test")]
    found = plan(configs.load("configs/sst2.yaml", [*where, f"run={tmp_path}"]))
    train = next(job for job in found["jobs"] if job["what"] == "train")
    assert train["tokens"] == 2 * 45 * 11  # two folds of half the rows, 44 characters at 4 a token
    assert any("4 characters a token" in line for line in found["assumptions"])


def test_a_finished_run_took_about_the_steps_that_were_planned(finished: Path) -> None:
    found = plan(configs.load(tiny.CONFIG, [f"run={finished}"]))
    steps = {}
    for path in finished.glob("0[23]_*/*/fold*/manifest.json"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        steps.setdefault(path.parent.parent.name, []).append(manifest["metrics"].get("steps", 0))
    told = {job["name"]: job["steps"] for job in found["jobs"] if job["what"] in ("train", "student")}
    assert told
    for name, planned in told.items():
        # folds are planned alike, and groups make them differ by some rows: a step each at most
        assert abs(planned - sum(steps[name])) <= len(steps[name]), name
    assert any("of stage 00" in line for line in found["assumptions"])
    assert any("by its tokenizer" in line for line in found["assumptions"])


def test_a_run_of_another_config_tells_nothing(finished: Path) -> None:
    change = ["task.train=arena:rows=960,seed=1", "student.init.config.hidden_size=64"]
    found, fresh = (
        plan(configs.load(tiny.CONFIG, [f"run={where}", *change])) for where in (finished, "none/yet")
    )
    assert found["models"][-1] == fresh["models"][-1]
    told = [next(job for job in one["jobs"] if job["what"] == "student") for one in (found, fresh)]
    assert told[0]["steps"] == told[1]["steps"]
    assert any("1,920 rows in arena:" in line for line in found["assumptions"])
    said = plan(configs.load(tiny.CONFIG, [f"run={finished}"]), rows={"task.train": 5000})
    assert any("task.train: 5,000 rows assumed" in line for line in said["assumptions"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 0}, "devices = 0"),
        ({"memory_gb": -1.0}, "memory_gb"),
        ({"memory_gb": float("nan")}, "memory_gb = nan"),
        ({"tflops": float("inf")}, "tflops = inf"),
        ({"efficiency": 1.5}, "efficiency = 1.5"),
        ({"rows": {"task.trian": 5}}, "rows task.trian: there is no such file"),
        ({"rows": {"task.train": 0}}, "at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan(configs.load(tiny.CONFIG), **arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"someone/else-7b: .*config\.json") as caught:
        lmsys(monkeypatch, "student.model=someone/else-7b")
    assert "\n" not in str(caught.value)


def test_a_damaged_config_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(LlmkdError, match="is not JSON"):
        lookup.named(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(LlmkdError, match="hidden_size"):
        lookup.named(str(tmp_path))
