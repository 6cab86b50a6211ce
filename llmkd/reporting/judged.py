"""Single test rows for the report, by id: what each model gave them, where two of them differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import log_softmax

from llmkd import judging, logits
from llmkd import run as runs
from llmkd.errors import RunError
from llmkd.evaluate import Probabilities, softmax
from llmkd.ids import Ids
from llmkd.reporting.gather import EVALUATE, PREPARE, REMEDY, Units, folds_of

COLUMNS = ("id", "stem", "swapped", "part", "fold", "label", "bayes")  # never a text
BINS = 15  # as `llmkd.evaluate.ece` has them
SHOWN = 10  # rows of a table of the most different
Labels = NDArray[np.int64]


def judged(
    run: Path, units: Units, labels: Sequence[str], student: str, peers: Sequence[str]
) -> dict[str, Any]:
    """The test rows in their given order: {"ids" (N,), "labels" (N,) with -1 = none, "folds": {model: each
    fold's logits (F, N, C)}, "shipped": probabilities (N, C) as the artifact is used, "logits": {"merged",
    "quantized": (N, C)} where stage 06 left them}.

    Raises CacheError or RunError where a file is not of these rows.
    """
    runs.digest(run / PREPARE)
    file = pq.ParquetFile(run / PREPARE / "rows.parquet")
    table = file.read(columns=[name for name in COLUMNS if name in file.schema_arrow.names])
    test = judging.TestRows(table, units[PREPARE]["settings"]["task"]["kind"], len(labels))
    everything = Ids(test.table["id"])
    ids = np.asarray(list(everything.of(test.given)), dtype=object)
    places = {name: [run / place for place in found] for name, found in folds_of(units, student).items()}
    for peer in peers:
        places[f"peer {peer}"] = [place / "peers" / peer for place in places["student"]]
    caches = {name: [place / "logits.parquet" for place in found] for name, found in places.items()}
    folds = {
        name: np.stack([logits.read(one, "test", everything, labels=labels)[test.given] for one in found])
        for name, found in caches.items()
    }
    return {
        "ids": ids,
        "labels": test.labels,
        "folds": folds,
        "shipped": _by_id(run / EVALUATE / "predictions.parquet", ids, labels),
        "logits": _artifacts(run / EVALUATE / "logits.parquet", ids),
    }


def _positions(path: Path, found: Sequence[str], ids: NDArray[np.object_]) -> list[int]:
    where = {id: row for row, id in enumerate(found)}
    if len(where) != len(found) or where.keys() != set(ids.tolist()):
        raise RunError(f"{path}: its ids are not the test rows'; {REMEDY}")
    return [where[id] for id in ids]


def _by_id(path: Path, ids: NDArray[np.object_], labels: Sequence[str]) -> Probabilities:
    table = pq.read_table(path)
    at = _positions(path, table["id"].to_pylist(), ids)
    return np.stack([table[f"p_{name}"].to_numpy() for name in labels], axis=1)[at]  # (N, C)


def _artifacts(path: Path, ids: NDArray[np.object_]) -> dict[str, NDArray[np.float32]]:
    if not path.is_file():
        return {}
    table = pq.read_table(path)
    at = _positions(path, table["id"].to_pylist(), ids)
    names = [name for name in table.column_names if name not in ("id", "label")]
    return {name: np.asarray(table[name].to_pylist(), dtype=np.float32)[at] for name in names}


def means(rows: Mapping[str, Any], shipped: str) -> dict[str, Probabilities]:
    """Each model's probabilities (N, C): the mean of its folds', and of the artifact as it is used."""
    found = {name: softmax(folds).mean(axis=0) for name, folds in rows["folds"].items()}
    return found | {shipped: rows["shipped"]}


def row_losses(folds: NDArray[np.float32], labels: Labels) -> NDArray[np.float64]:
    """Each fold's negative log likelihood of each labelled row, (F, N, C) and (N,) -> (F, n)."""
    known = np.flatnonzero(labels >= 0)
    return -log_softmax(folds.astype(np.float64), axis=-1)[:, known, labels[known]]  # type: ignore[no-any-return]


def gap(rows: Mapping[str, Any]) -> tuple[float, float] | None:
    """Baseline's less student's log loss, each the mean of its folds, and the standard error of this
    difference over the test rows (paired); None without a baseline."""
    if not {"baseline", "student"} <= rows["folds"].keys():
        return None
    baseline, student = (
        row_losses(rows["folds"][name], rows["labels"]).mean(0) for name in ("baseline", "student")
    )
    difference = baseline - student  # (n,)
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def divergence(p: Probabilities, q: Probabilities) -> NDArray[np.float64]:
    """KL(p || q) of each row in nats. (N, C) twice -> (N,)"""
    return (p * (np.log(np.clip(p, 1e-300, None)) - np.log(np.clip(q, 1e-300, None)))).sum(-1)  # type: ignore[no-any-return]


def agreement(found: Mapping[str, Probabilities]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each two models the share of rows with the same top class, and the mean KL(row || column).

    -> (M, M) twice
    """
    every = list(found.values())
    same = [[float((p.argmax(-1) == q.argmax(-1)).mean()) for q in every] for p in every]
    return np.array(same), np.array([[float(divergence(p, q).mean()) for q in every] for p in every])


def reliability(p: Probabilities, labels: Labels) -> dict[str, list[float]]:
    """Of each bin of the top probability that has rows: mean confidence, accuracy and rows."""
    known = labels >= 0
    confidence, hit = p[known].max(-1), p[known].argmax(-1) == labels[known]
    at = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(at, minlength=BINS)
    there = count > 0
    told = np.bincount(at, confidence, BINS)[there] / count[there]
    true = np.bincount(at, hit, BINS)[there] / count[there]
    return {"confidence": told.tolist(), "accuracy": true.tolist(), "rows": count[there].tolist()}


def confusion(p: Probabilities, labels: Labels) -> NDArray[np.int64]:
    """Rows by label and by top class, (C, C)."""
    known, classes = labels >= 0, p.shape[1]
    at = labels[known] * classes + p[known].argmax(-1)
    return np.bincount(at, minlength=classes**2).reshape(classes, classes)


def most(
    rows: Mapping[str, Any], size: NDArray[np.floating], sides: Mapping[str, Probabilities]
) -> list[dict[str, Any]]:
    """The rows where `size` (N,) is largest, largest first: id, label, size and each side's probabilities."""
    order = np.argsort(-size, kind="stable")[:SHOWN]
    return [
        {
            "id": str(rows["ids"][at]),
            "label": int(rows["labels"][at]),
            "size": float(size[at]),
            "sides": {name: p[at].tolist() for name, p in sides.items()},
        }
        for at in order.tolist()
    ]


def row_weights(
    rows: Mapping[str, Any], names: Sequence[str], weighting: str, fixed: Sequence[float]
) -> list[float]:
    """The mean weight of each teacher over the test rows, where every row is weighed anew."""
    import torch

    from llmkd.evaluate import softmax as probabilities
    from llmkd.weights import by_row

    mixed = [np.log(np.clip(probabilities(rows["folds"][name]).mean(0), 1e-300, None)) for name in names]
    stacked = torch.as_tensor(np.stack(mixed, axis=1))  # (N, T, C)
    return by_row(weighting, stacked, torch.as_tensor(rows["labels"]), fixed).mean(0).tolist()  # type: ignore[no-any-return]
