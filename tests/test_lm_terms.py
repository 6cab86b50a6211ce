"""Every further divergence, of a teacher that runs beside its student, through a whole run of stage 03."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lm import go, rows

from llmkd import run
from llmkd.losses import LABELLED, LOSSES
from llmkd.models.artifact import load_artifact

FURTHER = [name for name in LOSSES if name not in ("ce", "kl")]
EPOCHS = 6  # of one step each, over all rows: what is logged first is the untrained student's
QUICK = ("reverse_kl", "dkd", "tvd")


def by_hand(root: Path, term: str) -> tuple[float, float]:
    """ce and the term, means over all next tokens of the training rows, row by row from whole logits."""
    teacher, student = (
        load_artifact(root / f"run/01_pretrain/{name}/model", causal=True)[0] for name in ("big", "small")
    )
    examples, _ = rows(root, "train")
    hard, soft = [], []
    for row in range(len(examples.ids)):
        inputs = examples.inputs(np.array([row]))
        words = inputs["input_ids"][0, 1:]  # (T,)
        with torch.no_grad():
            q, p = (one(**inputs).logits[0, :-1].double() for one in (student, teacher))  # (T, V)
        labels = {"labels": words} if term in LABELLED else {}
        hard += LOSSES["ce"](q, words).tolist()
        soft += LOSSES[term](q, p, 2.0, **labels).tolist()
    return float(np.mean(hard)), float(np.mean(soft))


@pytest.mark.parametrize(
    "term", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FURTHER]
)
def test_a_divergence_begins_at_its_formula_and_falls(copy_lm: Path, term: str) -> None:
    way = ("distill.cache=null", "distill.baseline=false", "distill.temperature=2", "distill.batch_rows=40")
    terms = f"distill.terms={{kl: 0, {term}: 3}}"
    assert go(copy_lm, *way, terms, f"distill.epochs={EPOCHS}", stages=("03_distill",)) == 0
    first, *_, last = run.manifest(copy_lm / "run/03_distill/small/fold0")["metrics"]["loss"]
    hard, soft = by_hand(copy_lm, term)
    assert first["ce"] == pytest.approx(hard, rel=1e-4)
    assert first[f"{term}/big"] == pytest.approx(soft, rel=1e-3)
    assert first["loss"] == pytest.approx((hard + 3 * soft) / 4, rel=1e-3)
    assert last[f"{term}/big"] < first[f"{term}/big"]
    assert not [name for name in first if name.startswith("kl/")]
