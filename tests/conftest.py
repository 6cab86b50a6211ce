"""What every test shares. The environment is set before torch is imported, by any test or any plugin."""

import os

# Two workers on two cores: threads that spin for a core that is not theirs can stall a run altogether.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
os.environ.update(TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="")

import fcntl
import shutil
from collections.abc import Iterator
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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """All seven stages on tests/tiny.yaml, run once for all workers. Copy it before changing it."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared if worker_id == "master" else shared.parent) / "finished"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "whole").exists():
            for name in STAGES:
                assert tiny.stage(name, f"run={shared / 'run'}") == 0, name
            (shared / "whole").touch()
    return shared / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run in another place, free to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "elsewhere" / "run"))
