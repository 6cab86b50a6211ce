"""Stages as forks: nothing tells one from a process of its own, and where none is safe there is none."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny

from llmkd import interrupt, libraries
from llmkd.cli import forks, processes, run, states
from llmkd.config import load

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="stages are forked on Linux alone"),
    pytest.mark.usefixtures("no_thread_to_wait_for"),
]

FACTS = """
import json, os, pathlib, random, signal, sys
import numpy, scipy.linalg, sklearn.model_selection, torch
from threadpoolctl import threadpool_info
from llmkd import interrupt
interrupt.heard  # the module, as stages import it
facts = dict(
    name=__name__, file=__file__, argv=sys.argv, path=sys.path[0], environment=dict(os.environ),
    group=os.getpgrp() == os.getpid(), stdin=sys.stdin.read(), main=sys.modules["__main__"].__file__,
    handlers=[str(signal.getsignal(number)) for number in interrupt.SIGNALS], asked=interrupt.asked(),
    deferring=interrupt._deferring, blocked=sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    threads=torch.get_num_threads(),
    pools={pool["filepath"]: pool["num_threads"] for pool in threadpool_info()},
    stdout=[sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__],
)
seeds = [random.random(), numpy.random.rand(), torch.rand(1).item()]
pathlib.Path(sys.argv[1]).write_text(json.dumps([facts, seeds]))
"""
WAITING = "print('words'); import atexit; atexit.register(print, 'words at exit')"
ENDINGS = {
    "well": ("print('words')", 0),
    "none": ("raise SystemExit", 0),
    "code": ("sys.exit(7)", 7),
    "long": ("sys.exit(260)", 4),
    "words": ("sys.exit('words')", 1),
    "error": (f"{WAITING}; raise ValueError('words')", 1),
    "interrupted": (f"{WAITING}; raise KeyboardInterrupt", -signal.SIGINT),
    "killed": ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
    "terminated": ("os.kill(os.getpid(), 15)", -signal.SIGTERM),
    "at exit": ("import atexit; atexit.register(print, 'words at exit')", 0),
    "a thread": ("threading.Timer(0.2, print, ['words of a thread']).start()", 0),
}


def ended(start: processes.Start, script: Path, *words: str, **more: str) -> int:
    command = [str(script), *words] if start is forks.start else [sys.executable, str(script), *words]
    environment = {**processes.surroundings(1), **more}
    with interrupt.heard(), interrupt.deferred():
        return start(command, environment, False).wait()


def test_a_fork_is_as_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the fork's threads are set, the process's are read when it imports them
    import sklearn.model_selection  # noqa: F401
    import torch  # noqa: F401

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name)
    (tmp_path / "stage.py").write_text(FACTS)
    found: list[Any] = []
    given = {**processes.surroundings(1), "OMP_NUM_THREADS": "2"}
    for start in (forks.start, forks.start, processes.start):
        note = tmp_path / "note"
        assert ended(start, tmp_path / "stage.py", str(note), OMP_NUM_THREADS="2") == 0
        found.append(json.loads(note.read_text()))
        note.unlink()
    facts = [facts for facts, _ in found]
    pools = [fact.pop("pools") for fact in facts]
    assert set(pools[2].values()) == {2}
    assert len(pools[2]) > 2, "numpy's, scipy's and torch's at least"
    assert [pool | pools[2] for pool in pools[:2]] == pools[:2], "this process may have more of them"
    # libraries add words of their own while they are imported, wherever that was
    assert all(given.items() <= fact.pop("environment").items() for fact in facts)
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["threads"] == 2
    assert all(len({seeds[place] for _, seeds in found}) == 3 for place in range(3)), "each has its own"


@pytest.mark.parametrize(("body", "code"), ENDINGS.values(), ids=ENDINGS)
def test_a_fork_ends_as_a_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], body: str, code: int
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    script = tmp_path / "stage.py"
    script.write_text(f"import os, sys, threading\n{body}\n")
    said = []
    for start in (forks.start, processes.start):
        assert ended(start, script) == code
        out, err = capfd.readouterr()
        said.append((out, err.splitlines()[-1:]))
    assert said[0] == said[1]


def test_what_waits_to_be_written_is_written_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stage.py").write_text("print('after')")
    sys.stdout.write("before\n")
    assert ended(forks.start, tmp_path / "stage.py") == 0
    assert capfd.readouterr().out == "before\nafter\n"


def test_bars_are_off_where_the_environment_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import tqdm  # noqa: F401  it has read the environment

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    (tmp_path / "stage.py").write_text("from tqdm.auto import tqdm\nlist(tqdm([1], 'bar'))")
    ended(forks.start, tmp_path / "stage.py")
    assert "bar" in capfd.readouterr().err
    ended(forks.start, tmp_path / "stage.py", TQDM_DISABLE="1")
    assert not capfd.readouterr().err


def test_a_device_or_a_thread_or_another_system_rules_forks_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    assert forks.possible(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert not forks.possible(tmp_path)
    (tmp_path / "nvidia0").unlink()
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert not forks.possible(tmp_path)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not forks.possible(tmp_path)


def test_threads_that_a_fork_would_be_without_rule_it_out() -> None:
    script = """if True:
        from llmkd.cli import forks
        assert forks.ready(["numpy", "pyarrow"]), "theirs know of forks"
        import torch
        assert torch.get_num_threads() == 2
        assert forks.ready(["torch"]), "it has started none"
        torch.rand(500, 500) @ torch.rand(500, 500)
        assert not forks.ready(["torch"]), "OpenMP's"
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_fork_that_fails_and_a_thread_that_ends_rule_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: Path) -> str:
        raise ProcessLookupError(3, "No such process")

    def full() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(threading, "active_count", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", gone)
        assert not forks.ready(())
    monkeypatch.setattr(os, "fork", full)
    assert not forks.ready(())


def test_a_warning_of_threads_does_not_lose_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = os.fork

    def warned() -> int:  # as from Python 3.12 on
        if pid := fork():
            warnings.warn("this process is multi-threaded", DeprecationWarning, stacklevel=2)
        return pid

    monkeypatch.setattr(os, "fork", warned)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    (tmp_path / "stage.py").write_text(
        "import warnings\nassert any(how[0] == 'error' for how in warnings.filters)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forks.ready(())
        assert ended(forks.start, tmp_path / "stage.py") == 0


def test_libraries_are_imported_for_what_is_due_alone(finished: Path) -> None:
    def needed(stage: str, *overrides: str, **flags: list[str]) -> Any:
        return run.needed(load(tiny.CONFIG, [f"run={finished}", *overrides]), stage, flags)

    assert not any(needed(stage) for stage in ("prepare", "pretrain", "teachers", "distill", "evaluate"))
    assert needed("prepare", "seed=9") == libraries.ROWS
    assert needed("distill", "distill.epochs=3") == libraries.ALL
    assert needed("merge", "distill.epochs=3") == (), "its inputs are stale, which the stage will tell"
    assert needed("teachers", "run=/nowhere") == ()
    assert needed("teachers", "teachers.qwen.epochs=9", teacher=["qwen"], fold=["1"]) == libraries.ALL
    assert needed("teachers", "teachers.qwen.epochs=9", teacher=["llama"]) == ()
    assert needed("distill", "distill.epochs=3", model=["llama"]) == libraries.ALL, "of another stage"
    assert run.needed(load(tiny.CONFIG), "evaluate", {"artifact": ["a"]}) == libraries.ALL


def test_what_a_stages_flags_leave_of_its_units() -> None:
    def meant(unit: str, **only: str) -> bool:
        return states.meant(unit, {flag: [value] for flag, value in only.items()})

    assert meant("merge")
    assert meant("pretrain/gemma", model="gemma")
    assert not meant("pretrain/gemma", model="llama")
    assert meant("distill/gemma-baseline/fold1", student="gemma", only="baseline", fold="1")
    assert not meant("distill/gemma-baseline/fold1", only="student")
    assert not meant("distill/gemma-baseline/fold1", fold="0")
    assert not meant("distill/gemma/fold1", only="baseline")
    assert not meant("distill/gemma/fold1", student="llama")


def test_a_finished_run_begun_again_imports_no_library(finished: Path) -> None:
    words = ["run", "--config", str(tiny.CONFIG), f"run={finished}"]
    script = f"import sys; from llmkd.cli import main; main({words}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") > 7


@pytest.mark.slow
def test_forks_and_processes_make_the_same_files(tmp_path: Path) -> None:
    for way in ("forks", "processes"):
        words = ["run", "--config", str(tiny.CONFIG), "-j", "2", f"run={tmp_path / way}"]
        script = f"from llmkd.cli import forks, main; possible = forks.possible() and {way == 'forks'}\n"
        script += f"assert {way!r} == 'processes' or possible, 'not on this machine'\n"
        script += f"forks.possible = lambda: possible; main({words})"
        done = subprocess.run([sys.executable, "-c", script], cwd=tiny.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    made = [contents(tmp_path / way) for way in ("forks", "processes")]
    assert len(made[0]) > 30
    assert made[0] == made[1]


def contents(root: Path) -> dict[str, str]:
    """sha256 by name of all caches, weights, tokenizers and predictions."""
    kinds = ("*.parquet", "*.safetensors", "tokenizer.json", "config.json")
    files = sorted(path for kind in kinds for path in root.rglob(kind))
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }
