"""Bytes on one accelerator while a model is trained or run, part by part.

Sharding is ZeRO's (Rajbhandari et al. 2020, arXiv 1910.02054, section 5), with the buffers that DeepSpeed
adds. How near that comes to measured peaks: docs/plan.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmkd.planning.activations import activations, head, running
from llmkd.planning.shapes import Shape
from llmkd.planning.way import Micro, Way, held, trained


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
