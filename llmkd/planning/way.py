"""How a model is held and trained, as far as memory and work go by it; its parameters and their bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd.planning.shapes import Shape

# a weight's bytes as it is held; nf4: 4 bits, and per 64 weights a scale of 8 bits, per 256 of these one of
# 32 (double quantization, Dettmers et al. 2023, arXiv 2305.14314, section 3)
HELD = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": (4 + 8 / 64 + 32 / (64 * 256)) / 8}
Micro = tuple[int, int]  # a micro-batch: rows, tokens of its longest row


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed file says of sharding; stage 0 is plain data parallelism."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: float = 5e8  # DeepSpeed's reduce_bucket_size, in numbers
    buckets: int = 1
    live: float = 1e9  # stage3_max_live_parameters
    prefetch: float = 5e7


@dataclass(frozen=True)
class Way:
    """How a model is held and trained. classes: None for a language model. compared: whether that one's words
    are held against teachers'. states: whether hidden states of all tokens are looked at, as by exits and
    feature pairs. device: cuda or cpu, whose kernels keep other
    tensors: dropout's mask is a byte or a number."""

    load_in: str
    lora: Mapping[str, Any] | None
    precision: str
    classes: int | None
    checkpointing: bool = False
    zero: Zero = Zero()
    ranks: int = 1
    compared: bool = False
    states: bool = False
    device: str = "cuda"


def read_zero(path: str | None) -> Zero:
    """The sharding that a DeepSpeed config asks for, with DeepSpeed's own defaults."""
    if path is None:
        return Zero()
    asked = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})

    def number(name: str, default: float) -> float:
        value = asked.get(name, default)
        return default if value == "auto" else float(value)

    def offloaded(name: str) -> bool:
        return (asked.get(name) or {}).get("device", "none") != "none"

    stage = int(asked.get("stage", 0))
    contiguous = bool(asked.get("contiguous_gradients", True))
    overlapping = bool(asked.get("overlap_comm", False)) and stage < 3
    return Zero(
        stage=stage,
        offload_optimizer=offloaded("offload_optimizer"),
        offload_weights=offloaded("offload_param"),
        bucket=number("reduce_bucket_size", 5e8),
        buckets=(1 + overlapping) * contiguous,
        live=number("stage3_max_live_parameters", 1e9),
        prefetch=number("stage3_prefetch_bucket_size", 5e7),
    )


def adapters(shape: Shape, lora: Mapping[str, Any]) -> int:
    """Parameters of LoRA (Hu et al. 2021, arXiv 2106.09685): r (inputs + outputs) a layer."""
    return sum(often * lora["r"] * (i + o) for often, i, o in shape.targeted(lora["targets"]))


def trained(shape: Shape, way: Way) -> int:
    """Parameters that learn: all of them, or the adapter's and a classifier's head."""
    if not way.lora or not shape.hidden:
        return shape.backbone + (shape.head(way.classes) if shape.hidden else 0)
    return adapters(shape, way.lora) + (shape.head(way.classes) if way.classes is not None else 0)


def held(shape: Shape, way: Way, load_in: str | None = None) -> float:
    """Bytes of the base: the blocks' linear layers as they are loaded, all else in at most bf16; no adapter.

    A classifier's head is in float32 and counted by `trained`, a language model's belongs to the base.
    """
    kind = load_in or way.load_in
    rest = 4.0 if kind == "fp32" else 2.0
    blocks = shape.layers * shape.block
    head = shape.head(None) if way.classes is None and shape.hidden else 0
    return blocks * HELD[kind] + (shape.backbone - blocks + head) * rest
