"""One HTML file from what a run says: plain text and tables, plots beside them, nothing fetched."""

from __future__ import annotations

import base64
import html
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from llmkd.errors import RunError
from llmkd.reporting import looks
from llmkd.reporting.assets import SCRIPT, STYLE
from llmkd.reporting.gather import family, gather

# The browser itself refuses every request: what is in the file is all there is.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


def page(run: Path) -> str:
    """The whole report of a run as HTML. Raises RunError, CacheError."""
    from llmkd.reporting import sections

    data = gather(run)
    plots: dict[str, Any] = {}
    body = (sections.language if data["causal"] else sections.classifier)(run, data, plots)
    return document(f"llmkd: {data['name']}", body, plots)


def document(title: str, body: str, plots: Mapping[str, Any]) -> str:
    # plotly writes no < or > into its JSON, so no string of it can end the script that it stands in
    drawn = "{" + ",".join(f'"{name}":{plot.to_json()}' for name, plot in plots.items()) + "}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>{STYLE}{_swatches()}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="figures">{drawn}</script>
<script type="application/json" id="dark">{json.dumps(looks.DARK)}</script>
<script type="text/plain" id="plotly">{_plotly()}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


@cache
def _plotly() -> str:
    """plotly.js, packed to two fifths of its size; every browser since 2023 can unpack it."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(zlib.compress(get_plotlyjs().encode(), 9)).decode()


def write(content: str, path: Path) -> Path:
    """Under its name only when whole. Raises RunError where no file can have that name."""
    if path.is_dir():
        raise RunError(f"{path}: is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise RunError(f"{path}: there is no folder {path.parent}; make it first")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    return path


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


def _swatches() -> str:
    def rules(colours: Iterable[str]) -> str:
        return "".join(
            f".c{at}{{background:{one};border-color:{one}!important}}" for at, one in enumerate(colours)
        )

    return f"{rules(looks.DARK)}@media (prefers-color-scheme:dark){{{rules(looks.DARK.values())}}}"


def missing(what: str) -> str:
    return f"<p class='missing'>{escape(what)}</p>\n"
