"""One temperature that makes a classifier's probabilities mean what they say, fitted on rows it did not see.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2): softmax(logits / T). It moves no row
to another class, so accuracy stays; only how sure the model says it is changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llmkd.evaluate import Logits, Probabilities, scores, softmax
from llmkd.judging import on_view

LIMITS = (0.01, 100.0)
CHANCE = (
    3.84  # twice the log-likelihood's gain, if T = 1, is above it in 5 % of all fits (chi-square, 1 degree)
)


def fit_temperature(logits: Logits, labels: NDArray[np.int64]) -> float:
    """The T of the lowest mean negative log-likelihood of softmax(logits / T), between LIMITS.

    logits (N, C), labels (N,), all known. The likelihood is convex in 1/T, hence has one minimum in log T.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    wide, at = logits.astype(np.float64), np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(wide * np.exp(-log_temperature), axis=-1)[at, labels].mean())

    found = minimize_scalar(loss, bounds=np.log(LIMITS), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def calibrate(table: pa.Table, files: Sequence[Path], labels: Sequence[str]) -> dict[str, Any]:
    """The temperature of a student's folds: {"temperature", "fitted", "rows", "oof": `effect`}.

    From their logits caches, one file a fold: each labelled training row in its given order, by the fold
    that did not see it, though it chose its checkpoint by them, which flatters it a little, and so do
    teachers of the view `oof`, which had seen these rows. It is the folds' temperature: their merged model,
    which uses it, has seen all of these rows and need not have the same.
    A fit that is no better than T = 1 beyond chance (likelihood ratio) is told as "fitted", and the
    temperature is None. So it is where there is nothing to fit: rows without a mistake, whose likelihood
    has no maximum (any lower T is better), or no rows, as one fold leaves; then there is no "oof".
    """
    none: dict[str, Any] = {"temperature": None, "rows": 0}
    if len(files) == 1:
        return none
    rows, logits = on_view(table, files, "oof", labels)
    truth = table["label"].to_numpy().astype(np.int64)[np.concatenate(rows)]
    known, found = truth >= 0, np.concatenate(logits)  # (N, C)
    if not known.any():
        return none
    count = int(known.sum())
    if (found[known].argmax(-1) == truth[known]).all():
        return {**none, "rows": count}
    fitted = fit_temperature(found[known], truth[known])
    changed = effect(softmax(found), softmax(found / fitted), truth)
    gain = 2 * count * (changed["log_loss_before"] - changed["log_loss_after"])
    return {
        "temperature": fitted if gain > CHANCE else None,
        "fitted": fitted,
        "rows": count,
        "oof": changed,
    }


def effect(before: Probabilities, after: Probabilities, labels: NDArray[np.int64]) -> dict[str, float]:
    """ece and log_loss before and after. Probabilities (N, C) each, labels (N,) with -1 = none."""
    told = {"before": scores(before, labels), "after": scores(after, labels)}
    return {f"{name}_{when}": told[when][name] for name in ("ece", "log_loss") for when in told}
