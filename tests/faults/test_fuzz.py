"""Loaders of caches, manifests and checkpoints over damaged bytes: the project's own errors, or the truth."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmkd import checkpoint, digests, lock, logits, run, shards
from llmkd.errors import CacheError, RunError
from llmkd.layout import Layout
from llmkd.methods.cached import Cached
from llmkd.objective import HARD
from llmkd.train import fit

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


FLIPS = """
import sys
from pathlib import Path
from llmkd import logits
from llmkd.errors import CacheError
whole, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
footer = int.from_bytes(whole[-8:-4], "little") + 8
for at in range(len(whole) - footer, len(whole)):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    try:
        logits.read(path, "oof", [f"row{n}" for n in range(40)], labels=["a", "b", "tie"])
    except CacheError:
        refused = True
print(refused)
"""


def test_no_byte_of_a_cache_s_footer_ends_the_process(cache: Path, tmp_path: Path) -> None:
    """In a process of its own: Arrow answers some questions about a damaged file by abort()."""
    command = [sys.executable, "-c", FLIPS, str(cache), str(tmp_path / "logits.parquet")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


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


@pytest.mark.parametrize("seed", range(150))
def test_a_cache_of_digests_of_any_bytes_hides_no_damage_and_makes_none(seed: int, unit: Path) -> None:
    """It only saves reading: whole files stay whole, and a changed one is found, whatever it says."""
    random = np.random.default_rng(seed)
    (cache,) = (unit.parent.parent / ".verified").rglob("*.json")
    files, whole, model = run.manifest(unit)["files"], cache.read_bytes(), unit / "model.bin"
    weights = model.read_bytes()
    try:
        cache.write_bytes(damaged(whole, random))
        assert digests.differing(unit, "02_teachers", files) == []
        cache.write_bytes(damaged(cache.read_bytes(), random))
        model.write_bytes(b"weightZ")
        assert digests.differing(unit, "02_teachers", files) == ["model.bin"]
    finally:
        model.write_bytes(weights)
        cache.write_bytes(whole)


@pytest.mark.parametrize(
    "data", [b"[]", b"null", b'{"model.bin": 7}', b'{"model.bin": [[], []]}', b"[" * 100_000, b"\xff\xfe"]
)
def test_a_cache_of_digests_of_any_shape_is_none(data: bytes, unit: Path) -> None:
    (cache,) = (unit.parent.parent / ".verified").rglob("*.json")
    cache.write_bytes(data)
    assert digests.differing(unit, "02_teachers", run.manifest(unit)["files"]) == []


HOLDER = b'{"pid": 1, "host": "here", "since": "now"}'


@pytest.mark.parametrize("seed", range(100))
def test_a_lock_s_words_of_any_bytes_are_told_or_left_out(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "fold0.lock"
    path.write_bytes(damaged(HOLDER, np.random.default_rng(seed)))
    handle = os.open(path, os.O_RDONLY)
    assert lock._holder(handle).startswith(("process ", "another process"))
    os.close(handle)
    with lock.held(tmp_path / "fold0"):  # nobody holds it: what it says does not count
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize("data", [b"[]", b"null", b"7", b"[" * 4096, b"{" * 4096, b"\0" * 64, b'{"pid": 1}'])
def test_a_lock_s_words_of_any_shape_are_left_out(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.lock").write_bytes(data)
    handle = os.open(tmp_path / "a.lock", os.O_RDONLY)
    assert lock._holder(handle) == "another process"
    os.close(handle)


KEY = {"how": "topk", "k": 2, "vocab": 50, "bits": 8, "temperature": 1.0, "teacher": "t"}


@pytest.fixture(scope="module")
def shards_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of five rows each."""
    directory, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    width = Layout("topk", 2, 50, 8, 1.0).token_bytes
    for index in range(2):
        ids, packed = [f"row{index}{i}" for i in range(5)], random.integers(0, 40, (5, 3, width), np.uint8)
        shards.write_shard(directory, index, ids, [*packed], np.arange(5, dtype=np.uint64), KEY)
    shards.finish(directory, 2, KEY)
    return directory


def same_rows(found: shards.Cache, expected: shards.Cache) -> bool:
    pairs = zip(found.rows(np.arange(10)), expected.rows(np.arange(10)), strict=True)
    return all(one is two or bool((one == two).all()) for one, two in pairs)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("seed", range(150))
def test_a_cache_of_next_tokens_of_any_bytes_is_the_one_written_or_refused(
    name: str, seed: int, shards_cache: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(shards_cache, tmp_path / "cache"))
    ids = [f"row{index}{i}" for index in range(2) for i in range(5)]
    expected = shards.open_cache(shards_cache, ids, KEY)
    path = directory / name
    path.write_bytes(damaged(path.read_bytes(), np.random.default_rng(seed)))
    try:
        assert same_rows(shards.open_cache(directory, ids, KEY), expected)
    except CacheError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.json"])
@pytest.mark.parametrize("seed", range(100))
def test_a_shard_of_any_bytes_is_gone_on_with_as_written_or_not_at_all(
    name: str, seed: int, shards_cache: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(shards_cache, tmp_path / "cache"))
    path = directory / name
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, np.random.default_rng(seed)))
    try:
        stands = shards.shard_stands(directory, 1, [f"row1{i}" for i in range(5)], KEY)
    except CacheError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert not stands or path.read_bytes() == whole or name.endswith(".json")


@pytest.mark.parametrize("seed", range(100))
def test_a_whole_training_s_state_of_any_bytes_is_the_one_written_or_none(
    seed: int, trained: tuple[Path, bytes]
) -> None:
    """All that a real training keeps: optimizer, generators, schedule, the best state so far."""
    path, whole = trained
    path.write_bytes(damaged(whole, np.random.default_rng(seed)))
    try:
        assert (checkpoint.read(path.parent) is None) == (path.read_bytes() != whole)
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    directory = tmp_path_factory.mktemp("training")
    method = Cached(tiny.classifier(), HARD)
    more = {"checkpoints": directory / "checkpoint", "checkpoint_minutes": 0, "dev": np.arange(20, 24)}
    batching = {"batch_rows": 10, "batch_tokens": 200}
    fit(method, tiny.examples(), np.arange(20), tiny.training(directory), **batching, **more)
    (path,) = (directory / "checkpoint").iterdir()
    return path, path.read_bytes()
