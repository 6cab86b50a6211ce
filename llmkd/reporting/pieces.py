"""What a report is put together from: sections, tables, places for plots, names beside their colours."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from llmkd.reporting import looks
from llmkd.reporting.gather import family


def escape(value: Any) -> str:
    return html.escape(str(value))


def section(title: str, says: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<section>\n<h2>{escape(title)}</h2>\n<p class='says'>{escape(says)}</p>\n{body}</section>\n"


def plot(plots: dict[str, Any], name: str, figure: Any, caption: str, *, least: int = 0) -> str:
    """A place for a figure, which is drawn there from `plots`; least: pixels, below which it scrolls."""
    plots[name] = figure
    size = f"height:{int(figure.layout.height)}px;min-width:{least}px"
    return (
        f"<figure><div class='scroll'><div class='plot' id='{name}' style='{size}' role='img' "
        f"aria-label='{escape(caption)}'></div></div><figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    over: Sequence[tuple[str, int]] = (),
    words: Sequence[int] = (),
    strong: int = -1,
) -> str:
    """Cells are HTML already. over: heads above the heads, each with its number of columns; words: columns
    of words, which stand on the left; strong: the row that counts."""

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = [" class='word'" if at in words else "" for at in range(len(row))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    above = "".join(f"<th colspan='{wide}' class='over'>{escape(name)}</th>" for name, wide in over)
    head = (f"<tr>{above}</tr>" if over else "") + f"<tr>{cells([escape(name) for name in heads], 'th')}</tr>"
    body = "\n".join(
        f"<tr{' class=shipped' if at == strong else ''}>{cells(row, 'td')}</tr>"
        for at, row in enumerate(rows)
    )
    return (
        f"<div class='scroll' tabindex='0'><table>\n<thead>{head}</thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>\n"
    )


def dotted(name: str, of: Mapping[str, str]) -> str:
    """A model's name beside its colour."""
    if name not in of:
        return escape(name)
    reading = name.removeprefix(family(name))
    shape = " ring" * ("_tta" in reading) + " turned" * ("_calibrated" in reading)
    return f"<span class='dot c{list(looks.DARK).index(of[name])}{shape}'></span>{escape(name)}"


def missing(what: str) -> str:
    return f"<p class='missing'>{escape(what)}</p>\n"
