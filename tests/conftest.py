"""What every test shares. The environment is set before torch is imported, by any test or any plugin."""

import os

# Two workers on two cores: threads that spin for a core that is not theirs can stall a run altogether.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
os.environ.update(TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="")

import fcntl
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny

STAGES = ("00_prepare", "01_pretrain", "02_teachers", "03_distill", "04_merge", "05_quantize", "06_evaluate")


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """DeepSpeed and the launchers' variables must not leak from one test into the next."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def no_thread_to_wait_for() -> Iterator[None]:
    """A test before may have imported gptqmodel: its log has a thread, and at its end a fork of this process
    would wait for that. (A run forks only where there is no such thread.)"""
    every = [(one, one.peek()) for one in list(weakref.finalize._registry)]  # type: ignore[attr-defined]
    kept = [one for one, found in every if found and "logbar" in str(getattr(found[1], "__module__", ""))]
    for one in kept:
        one.atexit = False
    yield
    for one in kept:
        one.atexit = True


def once(factory: pytest.TempPathFactory, worker: str, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of this name, filled once for all workers."""
    shared = factory.getbasetemp()
    shared = (shared if worker == "master" else shared.parent) / name
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "whole").exists():
            fill(shared)
            (shared / "whole").touch()
    return shared


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """All seven stages on tests/tiny.yaml, run once for all workers. Copy it before changing it."""

    def fill(root: Path) -> None:
        for name in STAGES:
            assert tiny.stage(name, f"run={root / 'run'}") == 0, name

    return once(tmp_path_factory, worker_id, "finished", fill) / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run in another place, free to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "elsewhere" / "run"))


@pytest.fixture(scope="session")
def finished_lm(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A run of sequence distillation, with its texts and its lm.yaml, likewise."""
    from tiny_lm import begin

    return once(tmp_path_factory, worker_id, "finished_lm", begin)


@pytest.fixture
def copy_lm(finished_lm: Path, tmp_path: Path) -> Path:
    """It in another place, over the same texts."""
    root = Path(shutil.copytree(finished_lm, tmp_path / "copy"))
    config = (finished_lm / "lm.yaml").read_text()
    (root / "lm.yaml").write_text(config.replace(f"run: {finished_lm}/run", f"run: {root}/run"))
    return root


@pytest.fixture(scope="session")
def modelless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished classifier's run without a model in it, to report on. Copy it before changing it."""
    from tiny_report import made

    return made(tmp_path_factory.mktemp("modelless") / "run")
