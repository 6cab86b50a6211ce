"""Every command in README.md and docs/ is executed, page by page and in order, as it is written.

What stands in for a reader's files, models and machines is in stand_ins.py. Slow: `make docs-check`.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import stand_ins
import tiny
from test_docs import BEGINS, PAGES, QUOTED, failing, scripts

from llmkd import cli

# These alone are not executed.
LEFT_OUT = {
    "make test": "what CI runs; these tests are among them",
    "python benchmarks --prefs prefs.parquet --imdb imdb.parquet --environments DIRECTORY": (
        "hours, and environments made by pip; it is executed with --quick instead"
    ),
    "python benchmarks --short --threads 4 --prefs prefs.parquet --imdb imdb.parquet --environments DIRECTORY": (  # noqa: E501
        "the same, with fewer rows"
    ),
    "pip install wandb": "wants a package index; a package that notes its calls stands in",
    "pip install mlflow": "the same",
    "wandb login": "wants an account",
    "mlflow ui --backend-store-uri sqlite:///runs/demo/tracking/mlflow.db": "a program of that package",
}
FINISHED = "llmkd run --config configs/demo.yaml"
UNTRAINED = "rm -rf runs/demo/03_distill runs/demo/06_evaluate"
# Where a page shows a command apart from those that come before it: what its reader has done.
BEFORE = {
    "llmkd init messages.csv --test held-out.csv": (
        "mv messages.yaml own.yaml; head -n 60 messages.csv > held-out.csv"
    ),
    "llmkd plan --config messages.yaml": "test ! -e own.yaml || mv own.yaml messages.yaml",
    "llmkd run --config configs/demo.yaml -j 4": "rm -rf runs/demo",
    "make -j4 teachers distill CONFIG=configs/demo.yaml": "rm -rf runs/demo",
    "llmkd verify runs/demo": FINISHED,
    "llmkd report runs/demo": FINISHED,
    "tensorboard --logdir runs/demo/tracking": FINISHED,
    "CUDA_VISIBLE_DEVICES=0 python": "llmkd run --config configs/lmsys.yaml prepare pretrain",
    "deepspeed --hostfile hosts ": "rm -rf runs/demo/03_distill/*/fold0",
    "deepspeed --hostfile hostfile": "rm -rf runs/lmsys/02_teachers/*/fold1 runs/lmsys/03_distill/*/fold1",
    "torchrun --nnodes 4": "rm -rf runs/lmsys/03_distill/*/fold2",
    "srun torchrun": "rm -rf runs/lmsys/02_teachers/*/fold2",
    "srun python": "rm -rf runs/lmsys/02_teachers/*/fold3",
    "WANDB_PROJECT=arena llmkd": UNTRAINED,
    "MLFLOW_TRACKING_URI=http://localhost:5000 llmkd": UNTRAINED,
}
BENCHMARKS = tiny.ROOT / "benchmarks" / "README.md"  # its table names scripts beside it
LIMIT = 1800  # seconds of one script, on a machine that does much besides


def told(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    if page == BENCHMARKS:
        text = re.sub(r"`(\w+\.py -)", r"`python benchmarks/\1", text)
    return scripts(text)


TOLD = [page for page in (*PAGES, BENCHMARKS) if told(page)]


def test_no_command_is_left() -> None:
    """By a plain search of a page for what looks like one; nor is any left out that no page has."""
    shown = {page: " ".join(" ".join(told(page)).split()) for page in TOLD}
    for page in TOLD:
        text = QUOTED.sub("", page.read_text(encoding="utf-8"))
        shown[page] += "".join(command for command, _ in failing(text))
        lines = re.findall(rf"(?:^|`|\$ )({BEGINS}[^`\n\\]+)", text, re.MULTILINE)
        left = [line for line in lines if " ".join(line.split()) not in shown[page]]
        assert lines
        assert not left, page
    for command in (*LEFT_OUT, *BEFORE):
        assert any(command in words for words in shown.values()), command


def whole(script: str) -> str:
    """A script without what is left out, and with what a reader fills in: `KEY=...`, CONFIG, RUN, N. Of a
    command that is only named, its help."""
    kept = [line for line in script.splitlines() if re.sub(r"\s+#.*", "", line) not in LEFT_OUT]
    config = re.search(r"configs/(\w+)\.yaml", script)
    script = re.sub(r"([\w.]+\.model)=\.\.\.", r"\1=sentence-transformers/all-MiniLM-L6-v2", "\n".join(kept))
    script = re.sub(r"([\w.]+\.(\w+))=\.\.\.", rf"\1=rows/{config[1] if config else ''}/\2.parquet", script)
    for word, stands in (("CONFIG", "tests/tiny.yaml"), ("RUN", "runs/demo"), ("N", "2")):
        script = re.sub(rf"(?<=\s){word}(?=\s|$)", stands, script)
    named = re.fullmatch(r"(?:llmkd) (\w+)", script)
    return f"{script} --help" if named and named[1] in cli.COMMANDS else script


def ran(script: str, place: Path, environment: dict[str, str]) -> tuple[int, str]:
    """A script's exit code, and all that it said. Nothing that it started outlives it."""
    began = time.monotonic()
    shell = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = shell.communicate(timeout=LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    print(f"{time.monotonic() - began:6.1f} s  {script}", flush=True)
    return shell.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("page", TOLD, ids=lambda page: str(page.relative_to(tiny.ROOT)))
def test_a_page_runs(page: Path, tmp_path: Path) -> None:
    environment = stand_ins.checkout(tmp_path)
    for script in told(page):
        for begins, before in BEFORE.items():
            if re.search(rf"^{re.escape(begins)}", script, re.MULTILINE):
                assert ran(before, tmp_path, environment)[0] == 0, before
        code, said = ran(whole(script), tmp_path, environment)
        assert code == 0, f"{script}\n{said[-6000:]}"
    for command, shown in failing(page.read_text(encoding="utf-8")):
        assert ran(command, tmp_path, environment) == (2, shown)


@pytest.mark.slow
def test_the_demo_runs_with_all_its_rows(tmp_path: Path) -> None:
    environment = stand_ins.checkout(tmp_path)
    shutil.copy(tiny.ROOT / "configs" / "demo.yaml", tmp_path / "configs" / "demo.yaml")
    code, said = ran("make demo", tmp_path, environment)
    assert code == 0, said[-6000:]
    assert re.search(r"^quantized_tta +0\.\d+ +0\.\d+ +0\.\d+ +2000$", said, re.MULTILINE)
