"""Sequence students fold by fold: held-out rows choose each one's state, and the merge is their mean."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STAGES
from safetensors.torch import load_file
from tiny_lm import go, metrics, rows_of

from llmkd import lm, lm_rows, run
from llmkd.config import load
from llmkd.generation import evaluate_lm
from llmkd.inputs import base, prepared
from llmkd.loading import load_model
from llmkd.models.lora import load_trained


def folds(root: Path) -> list[Path]:
    return [root / f"run/03_distill/small/fold{fold}" for fold in (0, 1)]


def test_held_out_rows_choose_each_fold_s_best_state_and_the_merge_is_the_mean(copy_lm: Path) -> None:
    """Two folds with LoRA, the teacher asked once; a learning rate that soon makes the student worse."""
    way = ("folds.count=2", "student.lora={r: 4, alpha: 8, dropout: 0}", "distill.learning_rate=50")
    more = ("distill.evaluations=5", "distill.epochs=3", "distill.schedule=constant", "quantize=null")
    assert go(copy_lm, *way, *more) == 0
    assert [path.name for path in (copy_lm / "run/02_teachers/big").iterdir()] == ["fold0"]
    config = load(copy_lm / "lm.yaml", list(way))
    train, _ = rows_of(config, "train")
    numbers = lm_rows.fold_numbers(train, prepared(config)[0])
    judged, worse = [], 0
    for fold, path in enumerate(folds(copy_lm)):
        manifest = run.manifest(path)
        found = [one["dev_log_loss"] for one in manifest["metrics"]["dev"]]
        assert manifest["rows"]["train"] == (numbers != fold).sum() > 0
        assert manifest["metrics"]["best"] == min(found)
        worse += min(found) < found[-1]
        student = lm_student(config, path)
        held = np.flatnonzero(numbers == fold)
        assert nll(student, train, held) == pytest.approx(min(found), abs=1e-5)
        test = rows_of(config, "test")[0]
        judged.append(nll(student, test, np.arange(len(test.ids))))
    assert worse
    assert metrics(copy_lm)["student"]["nll"] == pytest.approx(np.mean(judged), abs=1e-5)
    one, two = (load_file(path / "adapter/adapter_model.safetensors") for path in folds(copy_lm))
    base = load_file(copy_lm / "run/01_pretrain/small/model/model.safetensors")
    merged, adapted = load_file(copy_lm / "run/04_merge/model/model.safetensors"), 0
    for name, weight in merged.items():
        down, up = (f"base_model.model.{name.removesuffix('.weight')}.lora_{which}.weight" for which in "AB")
        if down in one:
            adapted += 1
            deltas = [8 / 4 * fold[up] @ fold[down] for fold in (one, two)]
            torch.testing.assert_close(weight - base[name], sum(deltas) / 2, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(weight, base[name])
    assert adapted == 7


def test_factors_are_averaged_one_by_one(copy_lm: Path) -> None:
    way = ("folds.count=2", "student.lora={r: 4, alpha: 8, dropout: 0}", "distill.baseline=false")
    assert go(copy_lm, *way, "merge.how=factors", "distill.learning_rate=0.1", stages=STAGES[:5]) == 0
    one, two = (load_file(path / "adapter/adapter_model.safetensors") for path in folds(copy_lm))
    before = load_file(copy_lm / "run/01_pretrain/small/model/model.safetensors")
    merged = load_file(copy_lm / "run/04_merge/model/model.safetensors")
    adapted = [
        name for name in merged if f"base_model.model.{name.removesuffix('weight')}lora_A.weight" in one
    ]
    assert len(adapted) == 7
    for name in merged.keys() - set(adapted):
        assert torch.equal(merged[name], before[name])
    apart = 0.0
    for name in adapted:
        down, up = (f"base_model.model.{name.removesuffix('weight')}lora_{which}.weight" for which in "AB")
        expected = 8 / 4 * ((one[up] + two[up]) / 2) @ ((one[down] + two[down]) / 2)
        torch.testing.assert_close(merged[name] - before[name], expected, rtol=1e-4, atol=1e-6)
        exact = 8 / 4 * (one[up] @ one[down] + two[up] @ two[down]) / 2
        apart += float((exact - expected).norm() / exact.norm())
    assert apart > 0.1, "the folds diverge, and then it matters"


def test_folds_in_full_and_packed_are_averaged(copy_lm: Path) -> None:
    way = ("folds.count=2", "task.pack=true", "distill.baseline=false")
    assert go(copy_lm, *way, stages=STAGES[:5]) == 0
    config = load(copy_lm / "lm.yaml", list(way))
    train, _ = rows_of(config, "train")
    table = prepared(config)[0]
    counts = [run.manifest(path)["rows"]["train"] for path in folds(copy_lm)]
    assert sum(counts) == len(train.ids), "each block is one fold's"
    starts: dict[str, set[int]] = {}
    for text, fold in zip(table["text"].to_pylist(), table["fold"].to_pylist(), strict=True):
        starts.setdefault(text[:12], set()).add(fold)
    tokenizer = lm.tokenizer_of(config)
    for row, fold in enumerate(lm_rows.fold_numbers(train, table)):
        ids, places = (train.inputs(np.array([row]))[name][0] for name in ("input_ids", "position_ids"))
        for at in torch.nonzero(places == 0)[1:, 0].tolist():  # the first may be the rest of a text
            said = tokenizer.decode(ids[at : at + 12], skip_special_tokens=True)[:12]
            assert fold in starts.get(said, {fold})
    merged = load_file(copy_lm / "run/04_merge/model/model.safetensors")
    parts = [load_file(path / "adapter/model.safetensors") for path in folds(copy_lm)]
    for name, weight in parts[0].items():
        torch.testing.assert_close(merged[name], (weight + parts[1][name]) / 2)
        assert not torch.equal(weight, parts[1][name])


def lm_student(config: Any, fold: Path) -> Any:
    source = base(config, config.student)[0]
    model, _ = load_model(config, config.student, source, (), "fp32")
    load_trained(model, fold / "adapter")
    return model


def nll(model: Any, examples: Any, chosen: Any) -> float:
    return evaluate_lm(model, examples, chosen, batch_tokens=500, vocab=320)["nll"]
