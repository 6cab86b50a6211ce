"""Bytes on one accelerator while a model is trained or run, part by part.

Activations are counted as Korthikanti et al. count them (2022, arXiv 2205.05198, section 4): the tensors
that each operation keeps for its backward pass, here as transformers, PEFT and autocast really keep them.
Sharding is ZeRO's (Rajbhandari et al. 2020, arXiv 1910.02054, section 5), with the buffers that DeepSpeed
adds. How near that comes to measured peaks: docs/plan.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd.planning.shapes import Shape

# a weight's bytes as it is held; nf4: 4 bits, and per 64 weights a scale of 8 bits, per 256 of these one of
# 32 (double quantization, Dettmers et al. 2023, arXiv 2305.14314, section 3)
HELD = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": (4 + 8 / 64 + 32 / (64 * 256)) / 8}
CHUNK = 128  # of llmkd.chunked, which must not be imported here: it imports torch
QUERIES = 128  # of llmkd.models.blocks, likewise
NUMBERS = 2**18  # of a block in llmkd.models.passes, on one thread
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
    """How a model is held and trained. classes: None for a language model. states: whether hidden states of
    all tokens are looked at, as by exits and feature pairs. device: cuda or cpu, whose kernels keep other
    tensors: dropout's mask is a byte or a number."""

    load_in: str
    lora: Mapping[str, Any] | None
    precision: str
    classes: int | None
    checkpointing: bool = False
    zero: Zero = Zero()
    ranks: int = 1
    chunked: bool = False
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


def states(shape: Shape, way: Way) -> dict[str, float]:
    """Bytes of weights, gradients, Adam's two moments and buffers on a rank; `host`: of offloading, a rank.

    T trained parameters in float32 (4 T), N ranks, F bytes of a frozen base. Without DeepSpeed
    F + 4 T, 4 T, 8 T, and DDP's copy of the gradients. ZeRO-1 and 2 also keep a float32 master copy of the
    shard: optimizer 12 T / N; ZeRO-2 shards gradients, 4 T / N; ZeRO-3 weights too, (F + 4 T) / N, and
    gathers up to stage3_max_live_parameters of them. A bucket of reduce_bucket_size numbers stands beside.
    """
    count, n, zero = trained(shape, way), way.ranks, way.zero
    frozen = held(shape, way) if way.lora and shape.hidden else 0.0
    weights, gradients, optimizer = frozen + 4.0 * count, 4.0 * count, 8.0 * count
    buffers = gradients if n > 1 and not zero.stage else 0.0
    host = 0.0
    if zero.stage:
        optimizer = 12.0 * count / n
        buffers = 4.0 * zero.bucket * zero.buckets
    if zero.stage >= 2:
        gradients /= n
    if zero.stage == 3:
        buffers += gathered(weights, count + (shape.backbone if frozen else 0), way)
        weights /= n
    if zero.offload_weights:
        host, weights = host + weights, 0.0
    if zero.offload_optimizer:
        host, optimizer, gradients = host + optimizer + gradients, 0.0, 0.0
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "buffers": buffers,
        "host": host,
    }


def gathered(weights: float, count: int, way: Way) -> float:
    """Bytes of those of `count` weights that ZeRO-3 holds whole at a time."""
    share = min(1.0, (way.zero.live + way.zero.prefetch) / count)
    return weights * share if way.ranks > 1 else 0.0


def resting(shape: Shape, way: Way) -> dict[str, float]:
    """`states` once a training is over: no gradients; DeepSpeed's engine stays, with its moments."""
    parts = states(shape, way)
    bucket = 4.0 * way.zero.bucket * way.zero.buckets if way.zero.stage else parts["buffers"]
    kept = parts["optimizer"] if way.zero.stage else 0.0
    return {**parts, "gradients": 0.0, "optimizer": kept, "buffers": parts["buffers"] - bucket, "head": 0.0}


def frozen(shape: Shape, way: Way, active: float) -> dict[str, float]:
    """The parts of a model that only runs, whole on every rank."""
    parts = dict.fromkeys(("gradients", "optimizer", "buffers", "head", "host"), 0.0)
    head = 4.0 * shape.head(way.classes) if way.classes is not None and shape.hidden else 0.0
    return {**parts, "weights": held(shape, way) + head, "activations": active}


def block_saved(shape: Shape, way: Way, length: int) -> float:
    """Bytes a token that one block keeps for its backward pass, in rows of `length` tokens.

    H hidden, m intermediate, a = heads x head_dim, e bytes of the arithmetic (2 in bf16). Korthikanti's
    34 s b h + 5 a s^2 b (their equation 1) is the case of a GPT in 16 bits; here, term by term:
    inputs of linear layers (`_inputs`); norms, `_norm`; a gated MLP 3 m e, or 2 where it is this package's,
    GELU m e; queries, keys (repeated to all heads), values 3 a e; the result a e where no linear layer keeps
    it; the scores where attention is a matrix, `_scores`; dropout's masks.
    """
    e = 2 if way.precision == "bf16" else 4
    h, m, a = shape.hidden, shape.intermediate, shape.attention
    full = way.lora is None
    if shape.encoder:
        residual = 4 if way.device == "cuda" or e == 4 or full else 2  # CUDA's autocast norms in float32
        masks = 2 * h * (1 if way.device == "cuda" else e) if shape.hidden_dropout else 0
        norms = 2 * h * residual + masks
    else:
        norms = (4 if shape.family == "gemma2" else 2) * h * _norm(shape, way)
    act = (2 if _tuned(shape, way) else 3 if shape.gated else 1) * m * e
    math = not shape.eager and way.device == "cpu" and shape.attention_dropout > 0
    attention = 3 * a * (4 if math else e) + _scores(shape, way, length, e, math)
    kept = way.lora and fused(way) and 1 in dict(shape.read(way.lora["targets"]))  # by the output projection
    if not shape.eager and not math and way.lora and not kept:
        attention += a * e
    return _inputs(shape, way, e) + norms + act + attention


def _last_saved(shape: Shape, way: Way) -> float | None:
    """`block_saved` of a classifier's last block where it works for one token a row: of the others the first
    norm, what keys and values are made of, and these (`llmkd.models.last_layer`). None where it does not."""
    able = way.classes is not None and way.device == "cpu" and way.zero.stage < 3 and not way.states
    if not able or shape.family not in ("gemma2", "llama", "qwen2") or shape.attention_dropout:
        return None
    e = 2 if way.precision == "bf16" else 4
    return shape.hidden * (_norm(shape, way) + e) + 2 * shape.attention * e


def fused(way: Way) -> bool:
    """Whether base and adapter compute as one operation (`llmkd.models.lora_linear`)."""
    return way.zero.stage < 3 and way.load_in == way.precision


def _tuned(shape: Shape, way: Way) -> bool:
    """Whether attention, gated MLP and frozen norms are this package's own (`llmkd.models.gemma2`)."""
    judged = way.classes is not None or way.chunked
    return shape.family == "gemma2" and way.device == "cpu" and judged


def _norm(shape: Shape, way: Way) -> int:
    """Bytes of a number that an RMSNorm keeps: computed in float32, twice where its weight learns; this
    package's keeps its input as it came."""
    if way.lora is None:
        return 8
    return 2 if _tuned(shape, way) and fused(way) and way.precision == "bf16" else 4


def _merged(shape: Shape) -> float:
    """Bytes of the widest layer's weight with its adapter added, as float32 computes without dropout."""
    return 4.0 * max(i * o for _, i, o in shape.linears)


def _inputs(shape: Shape, way: Way, e: int) -> float:
    """What linear layers keep: their inputs, if their weight learns, one copy for layers that read the same
    tensor; under autocast each its own. LoRA as one operation keeps each input once, and the places of
    dropout's zeros, 8 bytes each, or on CUDA a byte an entry; PEFT's A its own copy behind dropout, and
    dropout's mask."""
    if way.lora is None:
        every = sum(inputs for _, inputs, _ in shape.linears)
        readers = 2 + shape.gated  # that read what q, or the gate, has read: k, v and up
        return e * (every - readers * shape.hidden) if e == 4 else e * every
    aimed, dropout = shape.read(way.lora["targets"]), way.lora["dropout"]
    widths, low = sum(width for _, width in aimed), way.lora["r"] * e * len(aimed)
    apart = not fused(way) and (e == 2 or dropout)
    kept = e * (widths if apart else sum(dict(aimed).values()))
    entry = 1 if way.device == "cuda" else 4 if apart else 8 * dropout
    return kept + low + entry * widths * bool(dropout)


def _scores(shape: Shape, way: Way, length: int, e: int, math: bool) -> float:
    """Of L x L a head: softmax in float32, its copy in bf16, soft-capping's tanh, dropout's mask and result.
    Fused attention keeps its row sums alone, and the padding mask; Gemma 2's of this package (on a CPU)
    tanh and shares, of blocks of queries up to the diagonal."""
    if math:
        return 12.0 * shape.heads * length
    if not shape.eager:
        return 4.0 * shape.heads + e * length
    if _tuned(shape, way):
        return e * shape.heads * float(length + min(length, QUERIES))
    copies = 4 + (e if e == 2 else 0) + (e if shape.softcap else 0)
    if shape.attention_dropout:
        copies += e + (1 if way.device == "cuda" else e)
    if shape.family == "deberta-v2":
        copies += 2 * e  # the two further products of disentangled attention
    return float(shape.heads * length * copies)


def activations(shape: Shape, way: Way, micro: Micro) -> float:
    """Bytes of one micro-batch between its forward and its backward pass, at their peak.

    Without checkpointing all blocks' `block_saved`. With it (Chen et al. 2016, arXiv 1604.06174) each
    block's input, and one block in full while it is computed again. Under autocast weights held in float32
    have a copy in bf16. The passing tensors of one block's backward come on top.
    """
    rows, length = micro
    tokens = rows * length
    if not shape.hidden:
        return shape.saved_bytes * tokens * 1.25
    e = 2 if way.precision == "bf16" else 4
    full, h = way.lora is None, shape.hidden
    saved = tokens * block_saved(shape, way, length)
    casts = 2.0 * shape.block if e == 2 and (full or way.load_in == "fp32") else 0.0
    if way.lora and e == 2:
        casts += 2.0 * adapters(shape, way.lora) / shape.layers
    around = tokens * h * 4.0 * (3 if shape.encoder else 2)
    passing = tokens * shape.intermediate * float(e)
    if full:
        passing += max(i * o for _, i, o in shape.linears) * (4.0 if e == 4 else 6.0)
    elif fused(way):
        passing *= 2
        if e == 4 and not (way.lora and way.lora["dropout"]):
            passing += _merged(shape)
    else:  # PEFT's adapters compute in float32
        passing += tokens * shape.intermediate * 8.0
    if _tuned(shape, way):  # of a block's gated MLP, five in float32
        passing += 20.0 * min(tokens * shape.intermediate, NUMBERS)
    if way.load_in == "nf4":  # a layer is unpacked while it computes
        passing += 2.0 * max(i * o for _, i, o in shape.linears)
    if not way.checkpointing:
        short = _last_saved(shape, way)
        last = saved if short is None else min(saved, tokens * short)
        return (shape.layers - 1) * saved + last + shape.layers * casts + around + passing
    inputs = shape.layers * tokens * h * (2.0 if e == 2 and way.load_in != "fp32" and not full else 4.0)
    forward = shape.layers * casts + passing if full else 0.0  # autocast keeps them until its end
    return inputs + around + max(forward, saved + casts + passing)


def head(shape: Shape, way: Way, micro: Micro) -> float:
    """Bytes of a language model's head: logits, their float32 copy, log-softmax and gradient, (B, L, V) each;
    in chunks where the method is `sequence`: 16 bytes a word of 128 tokens (a cached teacher's; more than of
    up to three beside) and the passes over them. A classifier has none to speak of."""
    if way.classes is not None:
        return 0.0
    tokens, v, h = micro[0] * micro[1], shape.vocab, shape.hidden
    bf16, learns = way.precision == "bf16", way.lora is None
    if way.chunked:
        copy = 2.0 * v * h if bf16 and learns else 0.0
        at_once = float(min(CHUNK, tokens) * v)
        return 16.0 * (at_once + min(at_once, 2.0**22)) + copy + (4.0 * v * h if learns else 0.0)
    gradient = v * h * (6.0 if bf16 else 4.0) if learns else 0.0
    return tokens * v * (10.0 if bf16 else 12.0) + gradient


def running(shape: Shape, way: Way, micro: Micro) -> float:
    """Bytes of a forward pass without gradients: the residual stream, and one block's widest moment."""
    rows, length = micro
    if not shape.hidden:
        return shape.saved_bytes * rows * length
    e = 2 if way.precision == "bf16" else 4
    matrix = shape.heads * length * (4 + 2 * e) if shape.eager else 0
    widest = max((3 if shape.gated else 2) * shape.intermediate * e, 5 * shape.attention * e + matrix)
    chunk = 12.0 * min(CHUNK, rows * length) * shape.vocab if way.classes is None else 0.0
    unpacked = 2.0 * max(i * o for _, i, o in shape.linears) if way.load_in in ("nf4", "int8") else 0.0
    if way.lora and e == 4 and fused(way):
        unpacked = _merged(shape)
    return rows * length * (2 * shape.hidden * 4 + widest) + chunk + unpacked


def training(
    shape: Shape,
    way: Way,
    micros: Sequence[Micro],
    accumulated: bool,
    *,
    judged: Sequence[Micro] = (),
    beside: float = 0.0,
) -> dict[str, float]:
    """Bytes by part on a rank, with `peak` their highest sum and `host` what offloading puts elsewhere.

    micros: the micro-batches that may be the largest; accumulated: whether a step has several on a rank, so
    that gradients wait while the next one runs. judged: micro-batches of the development rows. beside:
    bytes of further models that run beside this one.
    """
    parts = states(shape, way)
    passes = [(activations(shape, way, micro), head(shape, way, micro)) for micro in micros]
    active, of_head = max(passes, key=sum)
    active = max(active, *(running(shape, way, micro) - of_head for micro in judged), 0.0)
    parts["weights"] += beside
    parts |= {"activations": active, "head": of_head}
    host = parts.pop("host")
    together = sum(parts.values())
    if not accumulated:  # gradients grow as activations go
        together -= min(parts["gradients"], active)
    return {**parts, "peak": together, "host": host + 8.0 * trained(shape, way)}
