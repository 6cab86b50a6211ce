"""Loaders of caches, manifests and checkpoints over damaged bytes: the project's own errors, or the truth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkd import checkpoint, logits, run
from llmkd.errors import CacheError, RunError

IDS = [f"row{i}" for i in range(40)]
LABELS = ["a", "b", "tie"]


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """A few bytes changed, a piece cut out, doubled or put in, or the end lost."""
    found = bytearray(data)
    at, size = int(random.integers(len(data))), int(random.integers(1, 64))
    way = random.integers(5)
    if way == 0:
        for place in random.integers(len(data), size=int(random.integers(1, 8))):
            found[place] = int(random.integers(256))
    elif way == 1:
        del found[at : at + size]
    elif way == 2:
        found[at:at] = found[at : at + size]
    elif way == 3:
        found[at:at] = random.bytes(size)
    else:
        del found[at:]
    return bytes(found)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "logits.parquet"
    values = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    logits.write(path, {"oof": (IDS, values), "test": (IDS[:5], values[:5])}, teacher="t", labels=LABELS)
    return path


@pytest.mark.parametrize("seed", range(300))
def test_a_logits_cache_of_any_bytes_is_read_or_refused(seed: int, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "logits.parquet"
    path.write_bytes(damaged(cache.read_bytes(), np.random.default_rng(seed)))
    try:
        found = logits.read(path, "oof", IDS, labels=LABELS)
    except CacheError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert str(path) in str(error)  # noqa: PT017
        return
    assert found.shape == (40, 3)
    assert np.isfinite(found).all()


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "02_teachers" / "fold0"
    with run.writing(directory, "02_teachers", {"a": [1, 2.5]}, {"b": "c"}, 0, alone=True) as made:
        (made.path / "model.bin").write_bytes(b"weights")
    return directory


@pytest.mark.parametrize("seed", range(300))
def test_a_manifest_of_any_bytes_is_the_one_written_or_refused(seed: int, unit: Path) -> None:
    path = unit / run.MANIFEST
    whole, expected = path.read_bytes(), run.manifest(unit)
    path.write_bytes(damaged(whole, np.random.default_rng(seed)))
    try:
        assert run.manifest(unit) == expected
    except RunError as error:
        assert "\n" not in str(error)  # noqa: PT017
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "data",
    [[], None, 7, "x", {"files": []}, {"files": {"x": {}}}, {"files": {}, "seal": None}, {"seal": {"a": 1}}],
)
def test_a_manifest_of_any_shape_is_refused(data: Any, tmp_path: Path) -> None:
    (tmp_path / run.MANIFEST).write_text(json.dumps(data))
    for check in (run.manifest, run.digest):
        with pytest.raises(RunError, match="damaged"):
            check(tmp_path)


def test_a_manifest_of_a_hundred_thousand_brackets_is_refused(tmp_path: Path) -> None:
    (tmp_path / run.MANIFEST).write_text("[" * 100_000)
    with pytest.raises(RunError, match="damaged"):
        run.manifest(tmp_path)


@pytest.mark.parametrize("seed", range(100))
def test_a_checkpoint_of_any_bytes_is_the_one_written_or_none(seed: int, tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 1, {"a": torch.arange(9.0)}, {"b": [1, None, 0.1]})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, np.random.default_rng(seed)))
    assert (checkpoint.read(tmp_path) is None) == (path.read_bytes() != whole)
