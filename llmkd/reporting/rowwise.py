"""The report's sections that read single test rows: how models differ, row by row, and in what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkd.evaluate import ece, scores, softmax
from llmkd.reporting import figures, judged, looks, words
from llmkd.reporting.gather import family, folds_of
from llmkd.reporting.pieces import dotted, escape, missing, plot, section, table

Plots = dict[str, Any]
CLASSES = 6  # of a single row's probabilities, at most
CELLS = 60  # classes, at most, of a matrix of confusions
NO_LOGITS = "06_evaluate has no logits.parquet; stage 06 run anew writes it."


def losses(data: dict[str, Any], rows: dict[str, Any], of: Mapping[str, str], plots: Plots) -> str:
    values = {name: row["log_loss"] for name, row in data["scores"].items()}
    folds = {
        name: judged.row_losses(found, rows["labels"]).mean(axis=1).tolist()
        for name, found in rows["folds"].items()
        if found.shape[0] > 1
    }
    floor = data["metrics"].get("bayes_log_loss")
    drawn = figures.dots(values, folds, of, what="log loss (lower is better)", floor=floor)
    caption = "Log loss of every model on the test rows; the further left the better."
    caption += " Faint dots are single folds." if folds else ""
    readings = " ".join(name.removeprefix(family(name)) for name in values)
    caption += " Rings are both orders of a pair averaged." if "_tta" in readings else ""
    caption += " Diamonds are at the fitted temperature." if "_calibrated" in readings else ""
    caption += " No model is expected left of the dashed line." if floor is not None else ""
    return section("Log loss", "Every model of the run on one axis.", plot(plots, "losses", drawn, caption))


def agreement(data: dict[str, Any], rows: dict[str, Any], plots: Plots) -> str:
    there = judged.means(rows, rows["name"])
    found = {name: there[name] for name in data["scores"] if name in there}
    same, divergence = (values.tolist() for values in judged.agreement(found))
    names = list(found)
    shares = [[f"{value:.1%}" for value in row] for row in same]
    nats = [[f"{value:.3f}" for value in row] for row in divergence]
    pictures = []
    for name, values, shown, caption in (
        ("agreement", same, shares, "Share of the test rows on which both have the same top class."),
        (
            "divergence",
            divergence,
            nats,
            "Mean KL(row's model || column's model) in nats; 0: the same forecast.",
        ),
    ):
        drawn = figures.heat(_off_diagonal(values), shown, names)
        pictures.append(plot(plots, name, drawn, caption, least=figures.breadth(len(names))))
    return section(
        "Agreement",
        "Each two models on the same test rows; a model's forecast is the mean of its folds' probabilities.",
        *pictures,
        _weights(data, rows),
    )


def _off_diagonal(values: list[list[float]]) -> list[list[float | None]]:
    """Without what each model has with itself, which would take most of the colours' range."""
    return [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(values)]


def _weights(data: dict[str, Any], rows: dict[str, Any]) -> str:
    units = [data["units"][place] for place in folds_of(data["units"], data["student"]).get("student", [])]
    names = units[0]["settings"].get("teachers", []) if units else []
    if not names:
        return ""
    distill = units[0]["settings"]["distill"]
    fitted = [unit["metrics"] for unit in units if "teacher_weights" in unit["metrics"]]
    models = [f"teacher {name}" for name in names]
    fixed = [distill["teacher_weights"].get(name, 1.0) for name in names]
    heads = ["teacher", "weight"]
    cells = [[escape(name), f"{weight:g}"] for name, weight in zip(names, fixed, strict=True)]
    if fitted:
        heads = ["teacher", *(f"fold {at}" for at in range(len(fitted)))]
        cells = [[escape(name), *(_fitted(fold, name) for fold in fitted)] for name in names]
    elif distill["weighting"] in ("confidence", "entropy", "ce") and set(models) <= rows["folds"].keys():
        heads.append("mean weight on test rows")
        found = judged.row_weights(rows, models, distill["weighting"], fixed)
        cells = [[*row, f"{weight:.3f}"] for row, weight in zip(cells, found, strict=True)]
    says = escape(words.WEIGHINGS.get(distill["weighting"], distill["weighting"]))
    return f"<h3>How the teachers were weighed</h3>\n<p class='says'>{says}</p>\n{table(heads, cells)}"


def _fitted(fold: Mapping[str, Any], name: str) -> str:
    return f"{fold['teacher_weights'][name]:.3f}, T = {fold['teacher_temperatures'][name]:.2f}"


def calibration(data: dict[str, Any], rows: dict[str, Any], of: Mapping[str, str], plots: Plots) -> str:
    found = {name: softmax(logits) for name, logits in rows["logits"].items()}
    told, note = data["metrics"].get("calibration", {}), ""
    if not found:
        found = {rows["name"]: rows["shipped"]}
        note = missing(f"What quantization did to the calibration is not shown: {NO_LOGITS}")
    elif temperature := told.get("temperature"):
        name = f"{data['shipped']}_calibrated"
        found[name] = softmax(rows["logits"][data["shipped"]] / np.float32(temperature))
        of = {**of, name: of[data["shipped"]]}
        note = (
            f"<p>Calibrated is at a temperature of {temperature:.4f}, fitted on {told['rows']:,} rows that "
            "the folds did not see.</p>\n"
        )
    known = rows["labels"] >= 0
    curves = {name: judged.reliability(p, rows["labels"]) for name, p in found.items()}
    cells = []
    for name, p in found.items():
        loss = scores(p, rows["labels"])["log_loss"]
        cells.append([dotted(name, of), f"{ece(p[known], rows['labels'][known]):.4f}", f"{loss:.4f}"])
    caption = "Below the diagonal a model is surer than it is right; larger dots hold more rows."
    return section(
        "Calibration",
        "Whether 70% sure means right in 70% of the cases: rows are binned by their top probability.",
        plot(plots, "calibration", figures.reliability(curves, of), caption),
        table(["on test rows", "ECE", "log loss"], cells),
        note,
    )


def confusion(rows: dict[str, Any], labels: list[str], plots: Plots) -> str:
    counts = judged.confusion(rows["shipped"], rows["labels"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    says = f"What the shipped artifact ({rows['name']}) takes for what."
    if len(labels) > CELLS:
        return section("Confusion", says, _most_confused(counts, shares, labels))
    shown = [
        [f"{count:,}<br>{share:.1%}" for count, share in zip(*both, strict=True)]
        for both in zip(counts.tolist(), shares.tolist(), strict=True)
    ]
    drawn = figures.heat(shares.tolist(), shown, labels, zmin=0, zmax=1)
    caption = (
        "Rows by label (down) and by the artifact's top class (across); shares are of each label's rows."
    )
    return section(
        "Confusion", says, plot(plots, "confusion", drawn, caption, least=figures.breadth(len(labels)))
    )


def _most_confused(counts: NDArray[np.int64], shares: NDArray[np.float64], labels: list[str]) -> str:
    """The commonest mistakes, where there are too many classes for a matrix that could be read."""
    wrong = np.where(np.eye(len(labels), dtype=bool), 0, counts)
    places = [divmod(at, len(labels)) for at in np.argsort(-wrong, axis=None, kind="stable")[:20].tolist()]
    rows = [
        [*(escape(looks.cut(labels[at], 40)) for at in (i, j)), f"{wrong[i, j]:,}", f"{shares[i, j]:.1%}"]
        for i, j in places
        if wrong[i, j]
    ]
    return table(["label", "taken for", "rows", "of the label's"], rows, words=(1,))


def differing(data: dict[str, Any], rows: dict[str, Any], labels: list[str]) -> str:
    both = rows["logits"]
    if {"merged", "quantized"} <= both.keys():
        size = np.abs(both["merged"] - both["quantized"]).max(axis=-1)
        sides = {name: softmax(both[name]) for name in ("merged", "quantized")}
        drift = _rows_table(judged.most(rows, size, sides), labels, "logit moved by")
    elif "drift" in data["metrics"]:
        drift = missing(f"Single rows are not shown: {NO_LOGITS}")
    else:
        drift = missing("Nothing was quantized, so nothing drifted.")
    names = [name for name in rows["folds"] if name in data["teachers"]]
    apart = missing("The student reads no teacher's logits that lie in this run.")
    if names:
        theirs = np.mean([softmax(rows["folds"][name]).mean(axis=0) for name in names], axis=0)
        own = rows["shipped"]
        found = judged.most(rows, judged.divergence(theirs, own), {"teachers": theirs, rows["name"]: own})
        apart = _rows_table(found, labels, "KL (nats)")
    return section(
        "Single rows",
        "By id, with labels and probabilities; their texts stand by id in 00_prepare/rows.parquet.",
        "<h3>Moved most by quantization</h3>\n",
        drift,
        "<h3>Where the student is furthest from its teachers' mean</h3>\n",
        apart,
    )


def _rows_table(found: list[dict[str, Any]], labels: list[str], size: str) -> str:
    shown = min(len(labels), CLASSES)
    sides = list(found[0]["sides"])
    rows = []
    for row in found:
        told = [f"{p[at]:.3f}" for p in row["sides"].values() for at in range(shown)]
        label = escape(looks.cut(labels[row["label"]], 40)) if row["label"] >= 0 else ""
        rows.append([escape(looks.cut(row["id"], 60)), label, f"{row['size']:.4f}", *told])
    rest = f"<p class='says'>The first {shown} of {len(labels)} classes.</p>\n" if len(labels) > shown else ""
    heads = ["id", "label", size, *[looks.cut(name, 20) for name in labels[:shown]] * len(sides)]
    return table(heads, rows, over=[("", 3), *((side, shown) for side in sides)], words=(1,)) + rest
