"""The report in a real browser: drawn, quiet, as wide as a phone, in the colours asked for, asking nobody."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_report import LABELS, language, made

from llmkd.reporting import looks, write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium on this machine: apt-get install chromium"
)

# A window is never as narrow as a phone, a frame in it may be.
FRAME = """<body style="margin:0">
<iframe src="report.html" style="width:390px;height:9000px;border:0"></iframe><pre></pre><script>
const frame = document.querySelector('iframe');
const seen = document => ({
  plots: [...document.querySelectorAll('.plot')].map(plot => plot.id),
  drawn: [...document.querySelectorAll('.plot')].filter(plot =>
    plot.querySelector('.scatterlayer path[d]:not([d=""]), .heatmaplayer image')).map(plot => plot.id),
  wide: [...document.querySelectorAll('.main-svg')].map(svg => svg.getBoundingClientRect().width),
  page: [document.documentElement.scrollWidth, document.documentElement.clientWidth],
  title: document.title,
  asked: frame.contentWindow.performance.getEntriesByType('resource').length,
  ink: document.querySelector('#losses .ytick text').style.fill,
  labels: [...document.querySelectorAll('#confusion .ytick text')].map(text => text.textContent),
  legend: [...document.querySelectorAll('#courses .legendtext')].map(text => text.textContent),
});
async function look() {
  const inner = frame.contentDocument;
  while (inner.documentElement.dataset.drawn !== 'yes') await new Promise(done => setTimeout(done, 50));
  const found = {first: seen(inner)};
  const select = inner.querySelector('select');
  select.value = 'kl';
  select.dispatchEvent(new Event('change'));
  await new Promise(done => setTimeout(done, 500));
  found.second = seen(inner);
  document.querySelector('pre').textContent = JSON.stringify(found);
}
frame.onload = look;
</script>"""


def look(root: Path, profile: Path, scheme: str) -> tuple[dict[str, Any], list[str]]:
    """What the page holds before and after `kl` is picked, and what the console said."""
    frame = root / "frame.html"
    frame.write_text(FRAME)
    write_report(root)
    assert BROWSER
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--allow-file-access-from-files",  # the frame's own page is looked into
            f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=20000",
            "--window-size=600,1000",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found
    assert found[1], done.stderr
    console = [line for line in done.stderr.split("\n") if "CONSOLE" in line]
    return dict(json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))), console


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


def test_every_plot_is_drawn_on_a_phone_in_the_dark(tmp_path: Path) -> None:
    found, console = look(made(tmp_path / "run"), tmp_path / "profile", "dark")
    first, second = found["first"], found["second"]
    assert console == []
    assert first["drawn"] == first["plots"]
    assert len(first["plots"]) == 8
    assert max(first["wide"]) <= 390
    assert first["page"] == [390, 390]
    assert first["title"] == "llmkd: run", "no string of the run was run"
    assert first["asked"] == 0
    assert first["ink"] == rgb(looks.DARK[looks.INK])
    assert first["labels"] == [looks.cut(name, 24) for name in LABELS]
    assert first["legend"] == ["teacher llama", "teacher qwen", "student", "baseline"]
    assert second["legend"] == ["student from llama", "student from qwen"]


def test_a_language_model_s_plots_are_drawn_in_the_light(tmp_path: Path) -> None:
    found, console = look(language(tmp_path / "run"), tmp_path / "profile", "light")
    assert console == []
    assert found["first"]["drawn"] == found["first"]["plots"] == ["losses", "courses", "size", "speed"]
    assert found["first"]["page"] == [390, 390]
    assert found["first"]["ink"] == rgb(looks.INK)
    assert found["second"]["legend"] == ["student from big"]
