"""Each benchmark runs at toy size, and both its sides did the same work. No times are looked at."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark as a module, with the command line given."""

    def module(name: str, *arguments: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{name}.py"), "--quick", *arguments])
        return importlib.import_module(name)

    return module


def measured(load: Any, name: str, rows: Path, *arguments: str) -> list[dict[str, Any]]:
    load(name, "--rows", str(rows), *arguments).main()
    return [json.loads(line) for line in rows.read_text().splitlines()]


def sides(note: str) -> tuple[float, float]:
    """The two figures of a note such as "mean loss 0.5, 0.5"."""
    one, two = note.rpartition(",")[0].split()[-1], note.split()[-1]
    return float(one), float(two)


def test_training_sides_have_the_same_loss(load: Any, tmp_path: Path) -> None:
    rows = measured(load, "training", tmp_path / "rows", "--precision", "fp32", "--lr", "0")
    assert [row["against"] for row in rows] == list(load("training").NAMES.values())
    for row in rows:
        ours, theirs = sides(row["note"])
        assert ours == pytest.approx(theirs, abs=2e-5)
        assert len(row["ratios"]) == 1


@pytest.mark.slow
def test_ranks_train_on_the_same_rows(load: Any, tmp_path: Path) -> None:
    told = ["--precision", "fp32", "--lr", "0", "--ranks", "2", "--peers", "plain2"]
    (row,) = measured(load, "training", tmp_path / "rows", *told)
    ours, theirs = sides(row["note"])
    assert ours == pytest.approx(theirs, abs=2e-5)
    assert row["what"].endswith("2 ranks, fp32, dropout 0.05")


@pytest.mark.slow
def test_peers_take_the_same_steps_by_ranks(load: Any, tmp_path: Path) -> None:
    peers = ["plain2", "plain2-ranks", "trainer", "trainer-ranks"]
    told = ["--precision", "fp32", "--dropout", "0", "--lr", "0.01", "--ranks", "2", "--peers", *peers]
    rows = measured(load, "training", tmp_path / "rows", *told)
    plain, plain_ranks, trainer, trainer_ranks = (sides(row["note"])[1] for row in rows)
    assert plain_ranks == pytest.approx(plain, abs=2e-5)
    assert trainer_ranks == pytest.approx(trainer, abs=2e-5)
    assert [row["against"].split(", ")[-1] for row in rows] == ["2 threads", "2 ranks"] * 2


def test_ranks_by_their_own_seconds_are_refused(load: Any) -> None:
    with pytest.raises(SystemExit, match="--clock cpu with --ranks over 1"):
        load("roof", "--ranks", "2", "--clock", "cpu").main()
    with pytest.raises(SystemExit, match="add --ranks N"):
        load("training", "--peers", "plain2-ranks").main()


RANKS = """
import os, sys, time
from pathlib import Path
number, place = os.environ["RANK"], Path(sys.argv[1])
(place / number).write_text(str(os.getpid()))
print("x" * 200_000, file=sys.stderr)
while number == "0" or not (place / "0").exists():
    time.sleep(0.01)
sys.exit("no such thing")
"""


def test_one_failed_rank_ends_all(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    together = load("together").together
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "ranks.py"), str(tmp_path)])
    with pytest.raises(SystemExit, match=r"rank 1 of 2 ended with 1:\nx+\nno such thing"):
        together("any", 2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "0").read_text()), 0)


CRASHES_ONCE = """
import json, os, signal, sys
from pathlib import Path
crashed = Path(sys.argv[1]) / "crashed"
if not crashed.exists():
    crashed.touch()
    os.kill(os.getpid(), signal.SIGKILL)
print(json.dumps({"found": 1}))
"""


def test_ranks_of_which_one_dies_of_a_signal_begin_once_more(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ranks.py").write_text(CRASHES_ONCE)
    together = load("together").together
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "ranks.py"), str(tmp_path)])
    assert together("any", 1) == [{"found": 1}]
    assert "any: rank 0 of 1 ended with -9; once more" in capsys.readouterr().out


def test_ranks_end_with_the_benchmark(load: Any, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from together import together\n"
    code += f"sys.argv = [{str(tmp_path / 'ranks.py')!r}, {str(tmp_path)!r}]; together('any', 1)"
    benchmark = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    while not (tmp_path / "0").exists() or not (tmp_path / "0").read_text():
        assert time.monotonic() < until, "the rank did not start"
        time.sleep(0.01)
    benchmark.terminate()
    assert benchmark.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "0").read_text()), 0)


@pytest.mark.slow
def test_a_step_has_the_same_loss_whatever_the_ranks(load: Any, tmp_path: Path) -> None:
    told = ["--precision", "fp32", "--ranks"]
    one, two = (measured(load, "roof", tmp_path / n, *told, n)[0]["note"].split(";")[0] for n in "12")
    assert float(one.removeprefix("loss ")) == pytest.approx(float(two.removeprefix("loss ")), abs=2e-5)


def test_teacher_logits_counts_a_quarter_of_the_forwards_and_one_load(load: Any, tmp_path: Path) -> None:
    told = ["--precision", "fp32"]
    rows = {row["what"]: row for row in measured(load, "teacher_logits", tmp_path / "rows", *told)}
    assert rows["cache of 5 folds, fp32, views oof: forwards"]["ratios"] == [0.25]
    assert rows["cache of 5 folds, fp32, views both: forwards"]["ratios"] == [1.25]
    assert rows["cache of 5 folds, fp32, views oof: loads"]["ours"] == "1 loads"
    ours, theirs = sides(rows["cache of 5 folds, fp32, views oof: seconds"]["note"])
    assert ours == pytest.approx(theirs, abs=2e-4)


def test_roof_counts_the_operations_that_run(load: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from llmkd.models.pooling import class_logits

    roof = load("roof")
    student = importlib.import_module("student")
    data = student.examples([np.full(20, 5), np.full(20, 7)])
    model = student.plain_lora(student.classifier(student.TOY, "fp32")).train()
    with FlopCounterMode(display=False) as counter:  # 20 tokens are one block, above the diagonal too
        class_logits(model, **data.inputs(np.arange(2))).sum().backward()
    head = 2 * 2 * 32 * 3 * 3  # of two rows, forward and twice backward
    needed = roof.operations(student.TOY, student.LORA["r"], data.lengths, causal=False)
    assert counter.get_total_flops() == needed + head


def test_roof_counts_a_third_less_of_merged_adapters(load: Any) -> None:
    """Over one layer that learns, of 6 r (I + O) operations a token 4 run, and two to make its weight."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from llmkd.models.lora_linear import _MergedLinear

    roof = load("roof")
    tokens, i, o, r = 40, 16, 24, 4
    x, weight, a, b = (torch.randn(size) for size in ((tokens, i), (o, i), (r, i), (o, r)))
    for learns in (x, a, b):
        learns.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        _MergedLinear.apply(x, weight, None, a, b, 1.0).sum().backward()
    assert counter.get_total_flops() == tokens * (4 * i * o + 4 * r * (i + o)) + 2 * 2 * r * i * o
    lengths, sizes = np.asarray([9, 9]), importlib.import_module("student").TOY
    all_three, merged = (roof.operations(sizes, r, lengths, merged=one) for one in (False, True))
    assert 0.5 < merged / all_three < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roof", "inference", "quantization", "growth", "overhead", "sparse_cache"])
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--rows", str(tmp_path / "rows")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert rows
    assert all(np.isfinite(row["ratios"]).all() for row in rows)
    if name in ("inference", "quantization"):
        for row in rows:
            ours, theirs = sides(row["note"])
            assert ours == pytest.approx(theirs, abs=2e-2)


@pytest.mark.slow
def test_caches_of_a_real_teacher_are_compared_over_texts(load: Any, tmp_path: Path, capsys: Any) -> None:
    model, tokenizer = tiny.causal_lm(vocab_size=300), tiny.tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, words in (("train", 400), ("held", 200)):
        texts = [f"some words to learn {i}" for i in range(words)]
        pd.DataFrame({"text": texts}).to_parquet(tmp_path / f"{name}.parquet")
    paths = {"model": "model", "data": "train.parquet", "held": "held.parquet", "keep": "keep"}
    given = [word for name, path in paths.items() for word in (f"--{name}", str(tmp_path / path))]
    more = [
        "--tokens",
        "1000",
        "--held-tokens",
        "300",
        "--rounds",
        "1",
        "--ways",
        "online",
        "topk",
        "sampled",
    ]
    rows = measured(load, "sparse_cache", tmp_path / "rows", *given, *more)
    said = capsys.readouterr().out
    assert "896 tokens, 2.99 a word of 300" in said
    assert [row["what"].split(":")[0] for row in rows] == ["a student's KL, model teacher"]
    assert np.isfinite(rows[0]["ratios"]).all()
    kept = sorted(path.name for path in (tmp_path / "keep").iterdir())
    assert kept == ["model-held-300.pt", "model-train-1000.pt"]


def test_the_loss_without_logits_is_the_plain_one(load: Any, tmp_path: Path) -> None:
    speed, memory = measured(load, "sequence_loss", tmp_path / "rows", "--rounds", "1")
    ours, theirs = sides(speed["note"])
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert memory["goal"] == "<= 0.1"


@pytest.mark.slow
def test_a_step_beside_its_teacher_has_the_loss_of_whole_logits(load: Any, tmp_path: Path) -> None:
    rows = measured(load, "sequence_step", tmp_path / "rows", "--precision", "fp32", "--lr", "0")
    beside = next(row for row in rows if row["what"].startswith("ours, teacher beside"))
    ours, theirs = sides(beside["note"])
    assert ours > 0.01
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_peer_that_cannot_be_installed_is_told_of(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = load("environment")
    asked = argparse.Namespace(environments=tmp_path)
    failing = [[sys.executable, "-c", "import sys; sys.exit('no such package')"]]
    monkeypatch.setattr(environment.venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(environment, "commands", lambda *_: failing)
    with environment.peer(asked, "nothing") as python:
        assert python is None
    assert capsys.readouterr().out == "nothing: cannot be installed here: no such package\n"
    assert not (tmp_path / "nothing" / "made").exists()


@pytest.mark.slow
def test_ranks_write_every_id_once(load: Any, tmp_path: Path) -> None:
    rows = measured(load, "growth_ranks", tmp_path / "rows")
    assert {row["note"] for row in rows} == {"ids written 40, 40"}


def test_a_ratio_meets_its_goal_or_not(load: Any) -> None:
    row = load("side").Row
    assert row("x", "y", [2.9, 3.1, 3.2], ">= 3", "", "").met
    assert not row("x", "y", [2.9, 2.9, 3.2], ">= 3", "", "").met
    assert row("x", "y", [0.2, 0.3], "<= 0.25", "", "").met
    assert not row("x", "y", [0.2, 0.4], "<= 0.25", "", "").met
    assert row("x", "y", [1.2], "", "", "").met
    assert "| none |" in row("x", "y", [1.2], "", "", "").line()
