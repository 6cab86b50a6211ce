"""What all of the report's plots and tables share: one colour a model, names, numbers, a plot's frame."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from llmkd.reporting.gather import family

# A light page's colours and, beside them, a dark page's. The page's script puts one in the other's place.
INK, FAINT, GRID, LOW, HIGH = "#1c2430", "#5b6675", "#e3e7ee", "#eef3f9", "#7fb0e2"
OWN = {"baseline": "#7d858e", "student": "#0a8f6c", "merged": "#2497cd", "quantized": "#0b3f8f"}
OTHERS = ("#b8790c", "#8c1fd6", "#7d1212", "#e0527f", "#47153d", "#7a5a33")
# Apart for the colour-blind as well (CIE76 7 or more under Machado's 2009 matrices), 3:1 on their page.
DARK = {
    INK: "#e6eaf0",
    FAINT: "#98a3b3",
    GRID: "#2a323d",
    LOW: "#1b232e",
    HIGH: "#2f68ab",
    "#7d858e": "#9aa4af",
    "#0a8f6c": "#1fb890",
    "#2497cd": "#8ed9fb",
    "#0b3f8f": "#4a8df0",
    "#b8790c": "#f9b224",
    "#8c1fd6": "#d99bff",
    "#7d1212": "#d9603b",
    "#e0527f": "#ffb3c7",
    "#47153d": "#8f6aa8",
    "#7a5a33": "#a98d5f",
}
NARROW = 3  # greatest by least of a range that 1, 2 and 5 times powers of ten would hardly meet
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'


def colours(models: Sequence[str]) -> dict[str, str]:
    """Each model's colour: the run's own have theirs, the others take turns. Both orders' is the model's."""
    others = dict.fromkeys(name for name in models if family(name) not in OWN)
    turns = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    return {name: OWN.get(family(name)) or turns[name] for name in models}


def text(name: str, longest: int = 24) -> str:
    """A name as plotly may show it, which reads some HTML; cut to what a phone has room for."""
    return html.escape(cut(name, longest), quote=False)


def cut(name: str, longest: int) -> str:
    """A name without its middle, as ends tell `-7b` and `-70b` apart."""
    end = (longest - 1) // 2
    return name if len(name) <= longest else name[: longest - 1 - end] + "…" + name[-end:]


def figure(traces: Sequence[Any], height: int, **layout: Any) -> go.Figure:
    axis = {
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "automargin": True,
        "ticks": "",
        "title": {"font": {"size": 13, "color": FAINT}},
    }
    base = {
        "template": "none",
        "height": height,
        "margin": {"l": 8, "r": 16, "t": 28, "b": 14},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 13, "color": INK},
        "hoverlabel": {"font": {"family": FONT, "size": 13}},
        "dragmode": False,  # a finger on a phone scrolls the page
        "xaxis": axis,
        "yaxis": axis,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
    }
    return go.Figure(list(traces), base).update_layout(**layout)


def quantity(value: float, unit: str) -> str:
    """A number of bytes in the unit it is best read in; of anything else, with its thousands."""
    if unit != "B":
        return f"{value:,.0f}"
    for prefix in ("", "k", "M"):
        if value < 1000:
            return f"{value:.4g} {prefix}B"
        value /= 1000
    return f"{value:,.4g} GB"


def logarithmic(values: Sequence[float]) -> dict[str, Any]:
    """An axis; plotly's own ticks would read 9, 10, 2, 3 where they go over a power of ten."""
    if max(values) <= NARROW * min(values):
        return {"type": "log", "nticks": 6}
    ticks = tick_values(values)
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}


def tick_values(values: Sequence[float]) -> list[float]:
    """1, 2, 5 times powers of ten over the range of `values`; the powers alone where that is wide, and more
    where it is narrow."""
    low, high = math.floor(math.log10(min(values)) - 0.15), math.ceil(math.log10(max(values)) + 0.15)
    steps: tuple[float, ...] = (1, 2, 5) if high - low <= 4 else (1,)
    if max(values) <= NARROW * min(values):
        steps = (1, 1.5, 2, 3, 5, 7)
    return [step * 10.0**power for power in range(low, high + 1) for step in steps]
