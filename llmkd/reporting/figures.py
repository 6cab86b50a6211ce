"""The report's plots, in plotly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

from llmkd.reporting.gather import family
from llmkd.reporting.looks import FAINT, HIGH, INK, LOW, figure, logarithmic, quantity, text, tick_values

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down", "x")
NAMED = "<extra>%{fullData.name}</extra>"  # beside a hover label
TERMS = {
    "dev_log_loss": "log loss on development rows",
    "loss": "training loss (weighted sum)",
    "ce": "cross-entropy with the labels",
    "kl": "KL from each teacher",
    "cosine": "cosine distance to each teacher",
}


def dots(
    values: Mapping[str, float],
    folds: Mapping[str, Sequence[float]],
    of: Mapping[str, str],
    *,
    what: str,
    floor: float | None = None,
    log: bool = False,
) -> go.Figure:
    """One line a model, best read from the left: its value, faintly its folds', and the floor as a line."""
    names = list(values)
    spread = [(at, value, name) for at, name in enumerate(names) for value in folds.get(name, ())]
    faint = go.Scatter(
        x=[value for _, value, _ in spread],
        y=[at for at, _, _ in spread],
        mode="markers",
        marker={"size": 6, "opacity": 0.45, "color": [of[name] for _, _, name in spread]},
        hovertemplate="one fold: %{x:.4f}<extra></extra>",
    )
    rings = ["_tta" in name.removeprefix(family(name)) for name in names]
    shapes = ["diamond" if name.endswith("_calibrated") else "circle" for name in names]
    full = go.Scatter(
        x=list(values.values()),
        y=list(range(len(names))),
        mode="markers+text",
        marker={
            "size": 13,
            "color": [of[name] for name in names],
            "symbol": [shape + "-open" * ring for shape, ring in zip(shapes, rings, strict=True)],
            "line": {"width": [3 if ring else 0 for ring in rings]},
        },
        text=[f"{value:,.2f}" if log else f"{value:.4f}" for value in values.values()],
        textposition="top center",
        textfont={"size": 11, "color": FAINT},
        cliponaxis=False,
        customdata=[text(name, 200) for name in names],
        hovertemplate="%{customdata}: %{x:.4f}<extra></extra>",
    )
    every = [*values.values(), *(value for _, value, _ in spread), *([] if floor is None else [floor])]
    room = (max(every) - min(every)) * 0.1 or 0.01
    across = logarithmic(every) if log else {"range": [min(every) - room, max(every) + room]}
    drawn = figure(
        [faint, full],
        96 + 38 * len(names),
        showlegend=False,
        xaxis={"title": {"text": what}, "nticks": 5} | across,
        yaxis={
            "tickvals": list(range(len(names))),
            "ticktext": [text(name) for name in names],
            "range": [len(names) - 0.4, -0.75],
        },
    )
    if floor is not None:
        line = {"color": FAINT, "dash": "dash", "width": 1.5}
        drawn.add_vline(x=floor, line=line)
        drawn.add_annotation(
            x=floor,
            y=1,
            yref="paper",
            text=f"Bayes floor {floor:.4f}",
            font={"size": 12, "color": FAINT},
            showarrow=False,
            xanchor="left",
            yanchor="bottom",
            xshift=-8,
        )
    return drawn


def courses(curves: Sequence[Mapping[str, Any]], of: Mapping[str, str]) -> tuple[go.Figure, dict[str, str]]:
    """Every term's course by model: each fold faint, their mean full. Only the first term is shown; each
    trace's `meta` names its own. Also the terms and what they are called."""
    there = {curve["term"] for curve in curves}
    terms = [*(term for term in TERMS if term in there), *sorted(there - TERMS.keys())]
    traces = []
    for term in terms:
        lines: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
        for curve in curves:
            if curve["term"] == term:
                lines.setdefault((curve["model"], curve["against"]), []).append(curve)
        for (model, against), folds in lines.items():
            name = f"{model} from {against.removeprefix('teacher ')}" if against else model
            look = {"meta": term, "visible": term == terms[0], "legendgroup": f"{model}/{against}"}
            dash = "dot" if model == "baseline" else "solid"
            traces += _line(folds, text(name, 40), {"color": of[against or model], "dash": dash}, look)
    drawn = figure(
        traces,
        420,
        xaxis={"title": {"text": "optimizer step"}, "rangemode": "tozero"},
        hovermode="closest",
        showlegend=True,
    )
    return drawn, {term: TERMS.get(term, term) for term in terms}


def _line(
    folds: Sequence[Mapping[str, Any]], name: str, line: dict[str, Any], look: dict[str, Any]
) -> list[go.Scatter]:
    alone = len(folds) == 1
    traces = [
        go.Scatter(
            x=fold["steps"],
            y=fold["values"],
            name=name,
            mode="lines+markers",
            opacity=1 if alone else 0.35,
            showlegend=alone,
            line={**line, "width": 2.5 if alone else 1},
            marker={"size": 5 if alone else 3},
            hovertemplate=f"fold {int(fold['fold'])}, step %{{x}}: %{{y:.4f}}" + NAMED,
            **look,
        )
        for fold in folds
    ]
    if not alone:  # entries stand at the same shares of a training, if not at the very same steps
        many = range(min(len(fold["steps"]) for fold in folds))
        steps, values = (
            [sum(fold[what][i] for fold in folds) / len(folds) for i in many] for what in ("steps", "values")
        )
        mean = go.Scatter(
            x=steps,
            y=values,
            name=name,
            mode="lines+markers",
            line={**line, "width": 2.5},
            marker={"size": 5},
            hovertemplate="mean of folds, step %{x:.0f}: %{y:.4f}" + NAMED,
            **look,
        )
        traces.append(mean)
    return traces


def heat(
    values: Sequence[Sequence[float | None]],
    shown: Sequence[Sequence[str]],
    names: Sequence[str],
    **more: Any,
) -> go.Figure:
    """A square matrix as coloured cells with `shown` written in them, where they are few enough to read."""
    count = len(names)
    few, longest = count <= 12, 24 if count <= 4 else 14
    trace = go.Heatmap(
        z=values,
        x=list(range(count)),
        y=list(range(count)),
        text=shown,
        texttemplate="%{text}" if few else None,
        textfont={"size": 12 if count <= 6 else 10, "color": INK},
        colorscale=[[0, LOW], [1, HIGH]],
        showscale=False,
        hoverongaps=False,
        xgap=2 if few else 1,
        ygap=2 if few else 1,
        customdata=[[f"{text(row, 200)} / {text(column, 200)}" for column in names] for row in names],
        hovertemplate="%{customdata}: %{text}<extra></extra>",
        **more,
    )
    ticks = {
        "tickvals": list(range(count)),
        "ticktext": [text(name, longest) for name in names],
        "showgrid": False,
        "showline": False,
        "tickfont": {"size": 12 if few else 10},
    }
    across, down = {**ticks, "side": "top"}, {**ticks, "autorange": "reversed"}
    return figure([trace], min(140 + 50 * count, 820), xaxis=across, yaxis=down)


def breadth(count: int) -> int:
    """Pixels that a matrix of `count` columns needs at least; on a phone it scrolls."""
    return 110 + (46 if count <= 12 else 12) * count


def reliability(found: Mapping[str, Mapping[str, Sequence[float]]], of: Mapping[str, str]) -> go.Figure:
    """Accuracy over confidence; a dot's area is its bin's rows, and the diagonal is perfect calibration."""
    least = min(min(one["confidence"]) for one in found.values())
    start = max(0.0, round(least - 0.05, 1))
    diagonal = go.Scatter(
        x=[start, 1],
        y=[start, 1],
        mode="lines",
        line={"color": FAINT, "width": 1.5, "dash": "dash"},
        name="perfectly calibrated",
        hoverinfo="skip",
    )
    # a broad line below a narrow one, as the two nearly coincide where quantization is good
    traces = [diagonal]
    for name, one in found.items():
        dash, symbol, width, opacity = "solid", "circle", 2.0, 1.0
        if name.endswith("_calibrated"):
            dash, symbol = "dot", "diamond"
        elif name == "merged" and "quantized" in found:
            width, opacity = 7.0, 0.5
        largest = max(one["rows"])
        curve = go.Scatter(
            x=list(one["confidence"]),
            y=list(one["accuracy"]),
            mode="lines+markers",
            name=text(name),
            line={"color": of[name], "width": width, "dash": dash},
            opacity=opacity,
            marker={
                "symbol": symbol,
                "size": [5 + 11 * (rows / largest) ** 0.5 for rows in one["rows"]],
                "line": {"width": 0},
            },
            customdata=list(one["rows"]),
            hovertemplate="confidence %{x:.3f}, accuracy %{y:.3f}, %{customdata} rows" + NAMED,
        )
        traces.append(curve)
    return figure(
        traces,
        420,
        xaxis={"title": {"text": "mean confidence (top probability)"}, "range": [start, 1.02]},
        yaxis={"title": {"text": "accuracy"}},
        showlegend=True,
    )


def scatter(
    points: Mapping[str, tuple[float, float]],
    of: Mapping[str, str],
    *,
    across: str,
    up: str,
    unit: str,
    lower: bool = False,
) -> go.Figure:
    """Points by name over a logarithmic axis; told apart by colour and symbol, as names would overlap.

    unit: "B", "kB", ... are put to ticks of bytes. lower: less is better on the vertical axis, which is
    logarithmic then, and stands on its head.
    """
    marks = dict(zip(of, cycle(SYMBOLS), strict=False))  # a model's is the same in every plot
    traces = [
        go.Scatter(
            x=[x],
            y=[y],
            mode="markers",
            name=text(name),
            marker={"size": 14, "color": of[name], "symbol": marks[name]},
            hovertemplate=f"%{{x:,}} {unit}, %{{y:.4f}}" + NAMED,
        )
        for name, (x, y) in points.items()
    ]
    ticks = tick_values([x for x, _ in points.values()])
    ends = [
        math.log10(min(x for x, _ in points.values())) - 0.15,
        math.log10(max(x for x, _ in points.values())),
    ]
    written = [quantity(tick, unit) for tick in ticks]
    heights = [y for _, y in points.values()]
    vertical = {"autorange": "reversed", **logarithmic(heights)} if lower else {}
    if not lower and max(heights) - min(heights) < 0.02:  # plotly would stretch nearly equal ones apart
        middle = (max(heights) + min(heights)) / 2
        vertical = {"range": [middle - 0.02, middle + 0.02]}
    return figure(
        traces,
        400,
        xaxis={
            "title": {"text": across},
            "type": "log",
            "tickvals": ticks,
            "ticktext": written,
            "range": [ends[0], ends[1] + 0.15],
        },
        yaxis={"title": {"text": up}, **vertical},
        showlegend=True,
    )
