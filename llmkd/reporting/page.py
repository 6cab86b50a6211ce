"""One HTML file from what a run says: plain text and tables, plots beside them, nothing fetched."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from llmkd.errors import RunError
from llmkd.reporting import looks, sections
from llmkd.reporting.assets import SCRIPT, STYLE
from llmkd.reporting.gather import gather
from llmkd.reporting.pieces import escape

# The browser itself refuses every request: what is in the file is all there is.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


def page(run: Path) -> str:
    """The whole report of a run as HTML. Raises RunError, CacheError."""
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


def _swatches() -> str:
    def rules(colours: Iterable[str]) -> str:
        return "".join(
            f".c{at}{{background:{one};border-color:{one}!important}}" for at, one in enumerate(colours)
        )

    return f"{rules(looks.DARK)}@media (prefers-color-scheme:dark){{{rules(looks.DARK.values())}}}"
