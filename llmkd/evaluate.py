"""Scores of logits against labels, test-time augmentation, and what quantization changed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Probabilities = NDArray[np.float64]


def softmax(logits: Logits) -> Probabilities:
    """Rows of probabilities, float64. (N, C) -> (N, C)"""
    from scipy.special import softmax as rows

    return rows(logits.astype(np.float64), axis=-1)


def scores(probabilities: Probabilities, labels: NDArray[np.int64]) -> dict[str, float | int]:
    """log_loss (nats), accuracy, ece over the rows with a label, and of two classes auc and amex too;
    {} and rows = 0 where there are none.

    probabilities (N, C), labels (N,) with -1 = none.
    """
    from sklearn.metrics import accuracy_score, log_loss

    known = labels >= 0
    if not known.any():
        return {"rows": 0}
    p, y = probabilities[known].astype(np.float64), labels[known]
    p /= p.sum(-1, keepdims=True)  # float32 probabilities, as known ones are stored, sum to 1 only nearly
    return {
        "log_loss": float(log_loss(y, p, labels=range(p.shape[1]))),
        "accuracy": float(accuracy_score(y, p.argmax(-1))),
        "ece": ece(p, y),
        "rows": int(known.sum()),
        **(ranking(p[:, 1], y) if p.shape[1] == 2 and len(np.unique(y)) == 2 else {}),
    }


def ranking(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float]:
    """auc: the area under the ROC curve; amex: (G + D) / 2, the metric of the American Express
    competition (2022). probabilities (N,) of class 1, labels (N,) of 0 and 1.

    G is the Gini coefficient over its highest value, D the share of class 1 among the top 4 % of the rows,
    where a row of class 0 weighs 20, as it stands for the 20 that were not sampled.
    """
    from sklearn.metrics import roc_auc_score

    order = np.argsort(-probabilities, kind="stable")
    hits = labels[order].astype(np.float64)
    weight = np.where(hits > 0, 1.0, 20.0)
    top = np.cumsum(weight) <= int(0.04 * weight.sum())
    captured = hits[top].sum() / hits.sum()
    auc = float(roc_auc_score(labels, probabilities))  # weights a class do not change it
    return {"auc": auc, "amex": float((2 * auc - 1 + captured) / 2)}


def ece(probabilities: Probabilities, labels: NDArray[np.int64], bins: int = 15) -> float:
    """Expected calibration error: mean |accuracy - confidence| over equal-width bins of the top
    probability, weighted by rows (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    confidence, hit = probabilities.max(-1), probabilities.argmax(-1) == labels
    at = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(at, hit, bins) - np.bincount(at, confidence, bins)
    return float(np.abs(gaps).sum() / len(labels))


def mean_scores(many: Sequence[dict[str, float | int]]) -> dict[str, float | int]:
    """The mean of each score, over folds; their number of rows must agree for it to mean anything."""
    return {key: type(many[0][key])(np.mean([one[key] for one in many])) for key in many[0]}


def unswapped(logits: Logits, mirror: Sequence[int]) -> Logits:
    """Logits of swapped copies, back in the classes of the given order. (N, C) -> (N, C)"""
    return logits[:, list(mirror)]


def both_orders(given: Logits, swapped: Logits, mirror: Sequence[int]) -> Probabilities:
    """Swap test-time augmentation: the mean of both orders' probabilities. (N, C) twice -> (N, C)

    Row i of `swapped` is the copy of row i of `given`.
    """
    return (softmax(given) + softmax(unswapped(swapped, mirror))) / 2


def drift(before: Logits, after: Logits) -> dict[str, float]:
    """What a change of weights did to the logits, (N, C) each: largest and mean absolute difference,
    mean KL(before || after) in nats, and the share of rows with the same top class."""
    from scipy.special import log_softmax  # finite also where a probability underflows to 0

    log_p, log_q = (log_softmax(logits.astype(np.float64), axis=-1) for logits in (before, after))
    return {
        "max_abs_logit": float(np.abs(before - after).max()),
        "mean_abs_logit": float(np.abs(before - after).mean()),
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        "agreement": float((before.argmax(-1) == after.argmax(-1)).mean()),
    }


def bayes(probabilities: Probabilities, labels: NDArray[np.int64]) -> dict[str, float]:
    """The floor where the labels' own probabilities (N, C) are known: the mean entropy, which is the
    exact expectation, and the log loss that these probabilities reach on the labels as drawn."""
    entropy = -(probabilities * np.log(np.clip(probabilities, 1e-300, None))).sum(-1).mean()
    drawn = float(scores(probabilities, labels)["log_loss"])
    return {"bayes_log_loss": float(entropy), "bayes_log_loss_drawn": drawn}


def artifact_logits(
    path: Path | str,
    table: Any,
    kind: str,
    *,
    batch_tokens: int,
    precision: str = "fp32",
    text: Mapping[str, Any],
    trust_remote_code: bool = False,
) -> tuple[Logits, dict[str, float], dict[str, tuple[Logits, float]]]:
    """Logits (N, C) of all rows of a prepared table by a model directory, loaded from disk; its speed; and
    where it has several outputs (exits, heads) each one's logits and rows a second, by name.

    text: template, max_tokens, max_words, as `llmkd.crossfit.text_examples` takes them.
    """
    import torch

    from llmkd import features
    from llmkd.batches import padding_share, sorted_batches
    from llmkd.crossfit import text_examples, training_labels
    from llmkd.ids import Ids
    from llmkd.models.artifact import load_artifact
    from llmkd.models.load import check_budget
    from llmkd.models.outputs import outputs

    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    # one arithmetic for all artifacts, or drift would measure rounding and not quantization
    dtype = torch.float32 if precision == "fp32" else None
    model, reader = load_artifact(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if isinstance(reader, dict):  # a net's features
        examples = features.examples(table, reader, Ids(table["id"]), training_labels(table))
    else:
        check_budget(model.config, str(path), int(text["max_tokens"]))
        examples = text_examples(table, reader, kind, **text)
    logits, speed = timed(model, examples, batch_tokens, precision)
    found = {
        name: timed(output, examples, batch_tokens, precision) for name, output in outputs(model, Path(path))
    }
    batches = sorted_batches(np.arange(len(table)), examples.lengths, batch_tokens)
    shares = {"rows_per_second": speed, "padding_share": padding_share(batches, examples.lengths)}
    return logits, shares, found


def timed(model: Any, examples: Any, batch_tokens: int, precision: str) -> tuple[Logits, float]:
    """Logits (N, C) of all examples, and rows a second."""
    from llmkd.train import predict

    began = time.perf_counter()
    logits = predict(model, examples, np.arange(len(examples.ids)), batch_tokens, precision)
    return logits, round(len(examples.ids) / (time.perf_counter() - began), 1)
