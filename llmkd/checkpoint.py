"""A checkpoint of a training, or of a quantization's block: one safetensors file, found whole or not at all.

Its name ends in the digest of its bytes: what a full disk, a kill or a flipped bit left is never read. It
also says which unit it is of, and of which part of it: a whole one of another run is not gone on with.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmkd import ranks
from llmkd.digests import file_entry
from llmkd.run import CHECKPOINT, NOTE

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = re.compile(r"step(\d{9})-([0-9a-f]{64})\.safetensors")


def write(directory: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Tensors and facts (JSON) under their name when they are on the disk; only then the older ones go."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / "next.tmp"
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(whole, beside, metadata={"facts": json.dumps(facts), "place": _place(directory)})
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    path = directory / f"step{step:09d}-{file_entry(beside)['sha256']}.safetensors"
    os.replace(beside, path)
    for older in directory.iterdir():
        if older != path and NAME.fullmatch(older.name):
            older.unlink()


def read(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and facts of the last whole checkpoint, the same one on every rank; None without one."""
    from safetensors import safe_open

    name = ranks.gather(_last(directory) if ranks.is_main() else None)[0]
    if name is None:
        return None
    with safe_open(directory / name, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118


def _last(directory: Path) -> str | None:
    if not directory.is_dir():
        return None
    for path in sorted(directory.iterdir(), reverse=True):
        match = NAME.fullmatch(path.name)
        if not match:
            continue
        damaged = file_entry(path)["sha256"] != match[2]
        if not damaged and _told(path) == _place(directory):
            return path.name
        why = "damaged (sha256)" if damaged else "not this unit's own"
        print(f"{path}: {why}, left aside: the work goes on from before it", flush=True)
    return None


def _place(directory: Path) -> str:
    """What a checkpoint's unit is made from, and where in it the checkpoint lies; "" outside a run's unit."""
    for unit in (directory, *directory.parents):
        if unit.name == CHECKPOINT and (unit / NOTE).is_file():
            return f"{(unit / NOTE).read_text(encoding='utf-8')} {directory.relative_to(unit).as_posix()}"
    return ""


def _told(path: Path) -> str | None:
    """The place that a checkpoint says it is of; None of a file that is none, whatever it is called."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("place")
    except SafetensorError:
        return None


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix/`, without it."""
    start = len(prefix) + 1
    return {name[start:]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}


def over(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def buffers(method: nn.Module) -> dict[str, Tensor]:
    """What a method changes while it learns and no gradient reaches: running means and the like."""
    saved = method.state_dict().keys()
    return {name: tensor for name, tensor in method.named_buffers() if name in saved}


def extra_state(method: nn.Module) -> Any:
    """What else a method counts, by torch's own hook (`get_extra_state`); JSON."""
    return method.get_extra_state() if _has_extra(method) else None


def load_extra(method: nn.Module, buffered: dict[str, Tensor], extra: Any) -> None:
    own = buffers(method)
    for name, tensor in buffered.items():
        own[name].copy_(tensor)
    if _has_extra(method) and extra is not None:
        method.set_extra_state(extra)


def _has_extra(method: nn.Module) -> bool:
    return type(method).get_extra_state is not torch.nn.Module.get_extra_state


def optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], Any]:
    """A torch optimizer's tensors, {"<parameter>/<name>": tensor}, and its groups."""
    state = optimizer.state_dict()
    tensors = {
        f"{at}/{name}": torch.as_tensor(value)
        for at, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def load_optimizer(optimizer: Any, tensors: dict[str, Tensor], groups: Any) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        at, key = name.split("/")
        state.setdefault(int(at), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> dict[str, Any]:
    """All generators that a step may draw from, as JSON."""
    kind, words, *rest = np.random.get_state(legacy=True)
    found = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(words).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return found


def load_random(state: dict[str, Any]) -> None:
    def tensor(text: str) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(state["cuda"]))
