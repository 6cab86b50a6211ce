"""The cache of a teacher's next-token distributions: safetensors shards of packed rows, and a manifest.

A shard `shard-00000.safetensors` holds whole rows: packed (tokens, bytes) uint8, offsets (rows + 1,), each
row's digest, and the rows' ids. Its entry `shard-00000.json` is written after it, the manifest after all
of them: an interrupted run keeps every shard that has its entry.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkd.batches import Examples, Rows
from llmkd.errors import CacheError
from llmkd.layout import Layout
from llmkd.packing import unpack
from llmkd.sparse import Sparse

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MANIFEST = "manifest.json"
FORMAT = 2  # of the packed bytes: how `llmkd.packing` lays them out
REMEDY = "remove the directory and write it anew"
Key = Mapping[str, Any]  # what a cache was made from: the layout's fields and `fingerprint`'s, by name


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """sha256 of the tokenizer (words, merges, special tokens) and of its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    if backend is not None:  # a call with padding or truncation leaves them behind in it
        plain = {**json.loads(words), "padding": None, "truncation": None}
        words = json.dumps(plain, sort_keys=True)
    words += json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return {"tokenizer": _sha(words.encode()), "template": _sha(template.encode())}


def cache_key(layout: Layout, teacher: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a cache must have been made from to be read, or to be gone on with."""
    return {**asdict(layout), "format": FORMAT, "teacher": teacher, **fingerprint(tokenizer)}


def row_digests(examples: Examples, rows: Rows) -> NDArray[np.uint64]:
    """64 bits of each row's tokens and target mask: the same id over another text is another row."""
    found = []
    for row in rows:
        at = np.array([row])
        parts = [examples.inputs(at)["input_ids"]]
        if "targets" in examples.beside:
            parts.append(examples.beside["targets"](at)["mask"])
        content = b"".join(part.numpy().tobytes() for part in parts)
        found.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
    return np.array(found, dtype=np.uint64)


def write_shard(
    directory: Path, index: int, ids: Sequence[str], rows: Sequence[NDArray[np.uint8]],
    digests: NDArray[np.uint64], key: Key,
) -> None:  # fmt: skip
    """Rows' packed tokens, (T_i, bytes) each, as shard `index`; its entry last, both atomically."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    path = _shard(directory, index)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    tensors = {"packed": np.concatenate(list(rows)), "offsets": offsets, "digests": digests.view(np.int64)}
    beside = path.with_suffix(".tmp")
    save_file(tensors, beside, metadata={"ids": json.dumps(list(ids))})
    os.replace(beside, path)
    size = {"rows": len(ids), "tokens": int(offsets[-1]), "bytes": path.stat().st_size}
    _write_json(path.with_suffix(".json"), {**size, "sha256": _sha(path.read_bytes()), "key": dict(key)})


def shard_stands(directory: Path, index: int, ids: Sequence[str], key: Key) -> bool:
    """Whether shard `index` is finished and whole, and holds these rows.

    Raises CacheError where it was made from something else than `key`.
    """
    path = _shard(directory, index)
    if not path.with_suffix(".json").is_file() or not path.is_file():
        return False
    entry = _read_json(path.with_suffix(".json"), sha256=str)
    _check_key(path, entry["key"], key)
    return bool(entry["sha256"] == _sha(path.read_bytes())) and _ids(path) == list(ids)


def finish(directory: Path, count: int, key: Key, counts: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Write the manifest over shards 0 to count - 1, and return it. `counts`: what else is worth noting."""
    entries = []
    for index in range(count):
        entry = _read_json(_shard(directory, index).with_suffix(".json"), rows=int, tokens=int, bytes=int)
        _check_key(_shard(directory, index), entry.pop("key"), key)
        entries.append({"file": _shard(directory, index).name, **entry})
    totals = {name: sum(entry[name] for entry in entries) for name in ("rows", "tokens", "bytes")}
    per_token = round(totals["bytes"] / max(totals["tokens"], 1), 2)
    manifest = {**totals, "bytes_per_token": per_token, **(counts or {}), "key": dict(key), "shards": entries}
    _write_json(directory / MANIFEST, manifest)
    return manifest


@dataclass(frozen=True)
class Cache:
    """An open cache: rows by their place in the ids it was opened with. Shards are memory-mapped."""

    layout: Layout
    packed: Sequence[Any]  # by shard: a slice of the file, read when indexed
    shard: NDArray[np.int64]  # (N,)
    bounds: NDArray[np.int64]  # (N, 2): a row's tokens in its shard

    def rows(self, rows: Rows) -> Sparse:
        """The rows' tokens one after the other: ids (n, K), weights (n, K), tail (n,)."""
        found = [self.packed[self.shard[row]][slice(*self.bounds[row].tolist())] for row in rows]
        return unpack(np.concatenate(found), self.layout)


def open_cache(
    directory: Path, ids: Sequence[str], key: Key, digests: NDArray[np.uint64] | None = None
) -> Cache:
    """A finished cache, joined to `ids` by id.

    Raises CacheError where it is not finished, a shard is missing, truncated or changed, it was made from
    something else than `key`, or its rows are not exactly these (nor, with `digests`, their tokens).
    """
    from safetensors import safe_open

    if not (directory / MANIFEST).is_file():
        raise CacheError(f"{directory}: not a finished cache (no {MANIFEST}); let stage 02 finish it")
    manifest = _read_json(directory / MANIFEST, shards=list)
    _check_key(directory, manifest["key"], key)
    where: dict[str, tuple[int, int, int, int]] = {}
    packed = []
    for index, entry in enumerate(manifest["shards"]):
        path = _shard(directory, index)
        _check_file(path, entry)
        handle = safe_open(path, framework="numpy")
        offsets, marks = handle.get_tensor("offsets"), handle.get_tensor("digests").view(np.uint64)
        packed.append(handle.get_slice("packed"))
        for row, id in enumerate(_ids(path)):
            if id in where:
                raise CacheError(f"{path}: row {id!r} stands in the cache twice; {REMEDY}")
            where[id] = (index, int(offsets[row]), int(offsets[row + 1]), int(marks[row]))
    _check_rows(directory, where, ids, digests)
    at = [where[id] for id in ids]
    layout = Layout(**{name: key[name] for name in Layout.__dataclass_fields__})
    shards = np.array([place[0] for place in at], dtype=np.int64)
    return Cache(
        layout, packed, shards, np.array([place[1:3] for place in at], dtype=np.int64).reshape(-1, 2)
    )


def with_cache(examples: Examples, teacher: str, cache: Cache) -> Examples:
    """Examples whose batches carry the teacher's distributions at their targets, beside, by its name.

    The cache must have been opened with examples.ids.
    """

    def of(rows: Rows) -> dict[str, Tensor]:
        found = cache.rows(rows)._asdict()
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    return replace(examples, beside={**examples.beside, teacher: of})


def _check_key(path: Path, found: Key, key: Key) -> None:
    for name, value in key.items():
        if found.get(name) != value:
            was = f"another {name}" if name in ("tokenizer", "template") else f"{name} {found.get(name)!r}"
            wanted = "this run's" if name in ("tokenizer", "template") else repr(value)
            raise CacheError(f"{path}: made with {was}, not {wanted}; {REMEDY}")


def _check_file(path: Path, entry: Any) -> None:
    if (
        not isinstance(entry, dict)
        or entry.get("file") != path.name
        or not {"bytes", "sha256"} <= entry.keys()
    ):
        raise CacheError(f"{path.parent / MANIFEST}: damaged; {REMEDY}")
    if not path.is_file():
        raise CacheError(f"{path}: missing; run stage 02 anew, it keeps the other shards")
    if path.stat().st_size != entry["bytes"]:
        size = path.stat().st_size
        raise CacheError(
            f"{path}: {size} bytes, not the {entry['bytes']} written; remove it, run stage 02 anew"
        )
    if _sha(path.read_bytes()) != entry["sha256"]:
        raise CacheError(f"{path}: its bytes are not those written (sha256); remove it and run stage 02 anew")


def _check_rows(
    directory: Path,
    where: Mapping[str, tuple[int, ...]],
    ids: Sequence[str],
    digests: NDArray[np.uint64] | None,
) -> None:
    missing = [id for id in ids if id not in where]
    if missing:
        raise CacheError(
            f"{directory}: lacks {len(missing)} of {len(ids)} rows, first {missing[0]!r}; {REMEDY}"
        )
    if len(where) > len(ids):
        raise CacheError(f"{directory}: has {len(where) - len(ids)} rows that are not this run's; {REMEDY}")
    for id, digest in zip(ids, digests if digests is not None else (), strict=digests is not None):
        if where[id][3] != int(digest):
            raise CacheError(f"{directory}: row {id!r} was cached with other tokens or targets; {REMEDY}")


def _shard(directory: Path, index: int) -> Path:
    return directory / f"shard-{index:05d}.safetensors"


def _ids(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as handle:
        ids: list[str] = json.loads(handle.metadata()["ids"])
    return ids


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(beside, path)


def _read_json(path: Path, **kinds: type) -> dict[str, Any]:
    """A JSON object with a `key`, and with further entries of these kinds. Raises CacheError."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        content = {}
    wanted = {"key": dict, **kinds}
    whole = isinstance(content, dict) and all(
        isinstance(content.get(name), kind) for name, kind in wanted.items()
    )
    if not whole:
        raise CacheError(f"{path}: missing or damaged; {REMEDY}")
    return content


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
