"""Sequence distillation by several processes: two ranks under DeepSpeed reach what one process reaches."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from safetensors.numpy import load_file
from test_ranks import command, sharded, start, wait
from tiny_lm import CONFIG, SIZES, TIED, go

from llmkd import run
from llmkd.tasks.arena import texts

LORA = "student.lora={r: 4, alpha: 8, dropout: 0}"
ONLINE = "distill.cache=null"
UNTIED = "student.init.config.tie_word_embeddings=false"
NAMES = {LORA: "lora", ONLINE: "online", UNTIED: "untied"}
LARGER = SIZES + ", initializer_range: 0.1"  # gradients as small as rounding would make Adam's steps random
FOLD = "run/03_distill/small/fold0"
TOLD = ("distill.baseline=false", "distill.batch_tokens=150")  # several micro-batches a step


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher has been asked."""
    root = tmp_path_factory.mktemp("captured")
    said = texts(50, 1)
    pd.DataFrame({"text": said[:40]}).to_parquet(root / "train.parquet")
    pd.DataFrame({"text": said[40:]}).to_parquet(root / "test.parquet")
    (root / "lm.yaml").write_text(CONFIG.format(root=root, sizes=LARGER, tied=TIED))
    assert go(root, stages=("00_prepare", "01_pretrain", "02_teachers")) == 0
    return root


def begun(captured: Path, root: Path) -> Path:
    """The same run in another place, over the same texts."""
    shutil.copytree(captured, root)
    config = (captured / "lm.yaml").read_text()
    (root / "lm.yaml").write_text(config.replace(f"run: {captured}/run", f"run: {root}/run"))
    return root


def ranks(launcher: str, root: Path, stage: str, *options: str) -> str:
    argv = command(launcher, stage, *options)
    return wait(start([str(root / "lm.yaml") if word == str(tiny.CONFIG) else word for word in argv]))


def same(one: Path, two: Path, file: str) -> None:
    """Both students met the same losses and end with the same weights."""
    mine, theirs = (run.manifest(root / FOLD) for root in (one, two))
    assert (mine["ranks"], theirs["ranks"]) == (1, 2)
    assert mine["fingerprint"] == theirs["fingerprint"]
    assert mine["rows"] == theirs["rows"]
    for term in ("loss", "ce", "kl/big"):
        found = [[entry[term] for entry in manifest["metrics"]["loss"]] for manifest in (mine, theirs)]
        assert found[0] == pytest.approx(found[1], abs=1e-3), term
    weights = [load_file(root / FOLD / "adapter" / file) for root in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(weights[1][name], tensor, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("zero", "options"),
    [
        (2, []),
        (3, [UNTIED, ONLINE]),
        pytest.param(2, [LORA], marks=pytest.mark.slow),
        pytest.param(3, [LORA], marks=pytest.mark.slow),
        pytest.param(3, [], marks=pytest.mark.slow),
        pytest.param(3, [LORA, ONLINE, UNTIED], marks=pytest.mark.slow),
        pytest.param(2, [ONLINE], marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(NAMES.get, value)) or "full",
)
def test_two_ranks_reach_one_process(zero: int, options: list[str], captured: Path, tmp_path: Path) -> None:
    one, two = (begun(captured, tmp_path / name) for name in ("one", "two"))
    if UNTIED in options:
        for root in (one, two):
            assert go(root, UNTIED, stages=("01_pretrain",)) == 0
    assert go(one, *TOLD, *options, stages=("03_distill",)) == 0
    ranks("deepspeed", two, "03_distill", *TOLD, *options, f"distill.deepspeed={sharded(tmp_path, zero)}")
    same(one, two, "adapter_model.safetensors" if LORA in options else "model.safetensors")


@pytest.mark.slow
def test_zero_3_learns_from_the_student_s_own_words(captured: Path, tmp_path: Path) -> None:
    """Both ranks say words of their own; what they draw is not what one process draws."""
    root = begun(captured, tmp_path / "two")
    way = (ONLINE, "distill.on_policy=1", f"distill.deepspeed={sharded(tmp_path, 3)}", *TOLD)
    ranks("deepspeed", root, "03_distill", *way)
    losses = [entry["on_policy/kl/big"] for entry in run.manifest(root / FOLD)["metrics"]["loss"]]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_held_out_rows_are_judged_by_two_ranks_as_by_one(captured: Path, tmp_path: Path) -> None:
    roots = [begun(captured, tmp_path / name) for name in ("one", "two")]
    way = ("folds.count=2", *TOLD)
    for root in roots:
        assert go(root, "folds.count=2", stages=("00_prepare", "01_pretrain", "02_teachers")) == 0
    assert go(roots[0], *way, stages=("03_distill",)) == 0
    ranks("deepspeed", roots[1], "03_distill", *way, f"distill.deepspeed={sharded(tmp_path, 3)}")
    found = [run.manifest(root / FOLD)["metrics"]["dev"] for root in roots]
    assert [one["dev_log_loss"] for one in found[0]] == pytest.approx(
        [one["dev_log_loss"] for one in found[1]], abs=1e-3
    )
    same(*roots, "model.safetensors")
