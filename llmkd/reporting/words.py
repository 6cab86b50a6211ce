"""What the report says in words, computed from the figures: whether it paid first of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WEIGHINGS = {
    "fixed": "Every teacher counted by a fixed weight.",
    "fitted": "Weights and temperatures fitted to out-of-fold logits, fold by fold.",
    "confidence": "Anew on every row, by each teacher's top probability.",
    "entropy": "Anew on every row, by the entropy of each teacher's forecast.",
    "ce": "Anew on every row, by the probability each teacher gives the label.",
}


def judgement(gap: float, error: float | None) -> str:
    """gap: by how much the student is better than the same one on labels alone. It counts as known only
    where it is over two of its standard errors, which a single row has not; without one it is this run's."""
    if error is None:
        return f"In this one run distillation {'paid' if gap > 0 else 'did not pay'}"
    if not abs(gap) > 2 * error:
        return "Whether distillation paid cannot be told from these rows"
    return "Distillation paid" if gap > 0 else "Distillation did not pay"


def shipped_name(data: Mapping[str, Any]) -> str:
    unit = data["units"].get("05_quantize")
    return f"{unit['settings']['quantize']['bits']}‑bit student" if unit else "merged student"


def headline(data: Mapping[str, Any], gap: tuple[float, float] | None) -> str:
    """A classifier's result in one sentence. gap: of `llmkd.reporting.judged.gap`."""
    metrics, name = data["metrics"], shipped_name(data)
    loss = metrics[data["shipped"]]["log_loss"]
    rows = f"{metrics[data['shipped']]['rows']:,} test rows"
    parts = []
    if best := best_teacher(data, "log_loss"):
        parts.append(_beside(loss, best[1], f"its best teacher ({best[0]}, {best[1]:.4f})"))
    if "bayes_log_loss" in metrics:
        parts.append(
            _beside(loss, metrics["bayes_log_loss"], f"the Bayes floor ({metrics['bayes_log_loss']:.4f})")
        )
    place = f", {' and '.join(parts)}" if parts else ""
    if gap is None:
        return (
            f"The {name} reaches a log loss of {loss:.4f} on {rows}{place}; without a baseline it is not "
            "known whether distillation paid."
        )
    student, baseline = metrics["student"]["log_loss"], metrics["baseline"]["log_loss"]
    how = "lower" if gap[0] > 0 else "higher"
    company = {0: "as distilled", 1: "with its teacher"}.get(len(data["teachers"]), "with its teachers")
    return (
        f"{judgement(*gap)}: on {rows} the student's log loss is {abs(gap[0]):.4f} ± {gap[1]:.4f} {how} "
        f"{company} ({student:.4f}) than on labels alone ({baseline:.4f}), and the {name} ends at "
        f"{loss:.4f}{place}."
    )


def best_teacher(data: Mapping[str, Any], score: str) -> tuple[str, float] | None:
    found = {name: row[score] for name, row in data["scores"].items() if name in data["teachers"]}
    if not found:
        return None
    name = min(found, key=found.__getitem__)
    return name.removeprefix("teacher "), found[name]


def _beside(loss: float, other: float, name: str) -> str:
    return f"{abs(loss - other):.4f} {'above' if loss >= other else 'below'} {name}"


def notes(data: Mapping[str, Any]) -> list[str]:
    """What a reader of the headline should know beside it."""
    metrics, found = data["metrics"], []
    if "drift" in metrics and not data["causal"]:
        moved = metrics["quantized"]["log_loss"] - metrics["merged"]["log_loss"]
        drift = metrics["drift"]
        found.append(
            f"Quantization moved the log loss by {_signed(moved)}: logits are off by "
            f"{drift['mean_abs_logit']:.4f} on average and {drift['max_abs_logit']:.4f} at most, the top "
            f"class is the same on {drift['agreement']:.2%} of the rows, in {_share(metrics)} of the bytes."
        )
    if "drift" in metrics and data["causal"]:
        found.append(
            f"Quantized against merged: KL {metrics['drift']['kl']:.1e}, the same top word at "
            f"{metrics['drift']['agreement']:.2%} of the targets, in {_share(metrics)} of the bytes."
        )
    tta = f"{data['shipped']}_tta"
    if tta in metrics:
        found.append(
            f"With both orders of a pair averaged the artifact's log loss is {metrics[tta]['log_loss']:.4f}."
        )
    if metrics.get("transductive"):
        found.append(
            "Transductive: the student learnt from its teachers' predictions on these very test rows, never "
            "from their labels."
        )
    if data["causal"]:
        found.append("One run with one seed; how far perplexity varies with either is not known from it.")
    else:
        paired = "± is one standard error over the test rows, paired. " if "baseline" in metrics else ""
        found.append(
            f"Scores of teachers, baseline and student are means of their folds. {paired}"
            "One run does not say how far another seed would differ."
        )
    return found


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−") if abs(value) >= 0.00005 else "less than 0.0001"


def _share(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['size_bytes']['quantized'] / metrics['size_bytes']['merged']:.2f}"


def language_headline(data: Mapping[str, Any]) -> str:
    """A language model's result in one sentence."""
    metrics, name = data["metrics"], shipped_name(data)
    end = metrics[data["shipped"]]
    targets = f"{end['tokens']:,.0f} targets of test texts"
    best = best_teacher(data, "perplexity")
    place = f" (its teacher {best[0]}: {best[1]:.2f})" if best else ""
    before = (
        f", down from {metrics['before']['perplexity']:,.2f} before training" if "before" in metrics else ""
    )
    close = ""
    if best and f"agreement/{best[0]}" in end:
        same, kl = end[f"agreement/{best[0]}"], end[f"kl/{best[0]}"]
        close = f" and says its teacher's top word in {same:.1%} of the places (KL {kl:.3f})"
    if "baseline" not in metrics:
        return (
            f"The {name} reaches a perplexity of {end['perplexity']:.2f} on {targets}{place}{before}{close}; "
            "without a baseline it is not known whether distillation paid."
        )
    student, baseline = metrics["student"]["perplexity"], metrics["baseline"]["perplexity"]
    return (
        f"{judgement(baseline - student, None)}: on {targets} the student reaches a perplexity of "
        f"{student:.2f} with its teacher and {baseline:.2f} on hard tokens alone; the {name} ends at "
        f"{end['perplexity']:.2f}{place}{close}."
    )
