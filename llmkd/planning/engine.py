"""`plan`: a config's jobs summed up, judged against the accelerators at hand."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from llmkd.errors import ConfigError
from llmkd.planning import advice, jobs, stages
from llmkd.planning.data import phase_part
from llmkd.planning.way import HELD, read_zero
from llmkd.schema import Config
from llmkd.schema_models import Llm
from llmkd.settings import phases

RESERVE = 0.08  # of an accelerator, for its driver's context, communication and what fragments
PARTS = ("weights", "gradients", "optimizer", "activations", "head", "buffers", "peak")


def plan(
    config: Config,
    *,
    devices: int = 1,
    memory_gb: float = 80.0,
    tflops: float = 312.0,
    efficiency: float = 0.4,
    rows: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """What every stage and model of `config` needs, as plain JSON; no weight is loaded, no hub is asked.

    On a command line (name, type, default, help):
        --devices     int    8     accelerators that train one model together
        --memory-gb   float  80    memory of one, in GB of 10^9 bytes
        --tflops      float  312   its arithmetic in the config's precision, 10^12 operations a second
                                   (A100 in bf16: 312)
        --efficiency  float  0.4   share of it that is reached
        --rows        KEY=N  none  repeatable: rows of a file that is not at hand, before swapped copies:
                                   task.train, task.test, task.transfer, pretrain.0.data, ...

    Returns {"devices", "memory_gb", "tflops", "efficiency", "models", "assumptions", "jobs", "totals",
    "problems"}. A job: {"stage", "name", "what", "times", "steps", "tokens", "flops", "hours", "memory",
    "host", "disk", "scratch", "fits"}; figures of all its `times` alike units, but for memory: bytes on one
    rank by part (`PARTS`), and `host`, bytes beside it in the host's memory a rank. `scratch` is disk used
    only meanwhile. Steps, tokens, flops, hours are None where the rows are not known. A problem: {"stage",
    "name", "what", "peak", "limit", "changes": [key=value], "then"}; `then` is the peak after the changes.

    hours = flops / (devices * tflops * 10^12 * efficiency) / 3600.
    Raises ConfigError for arguments out of range, ModelError for a model whose shape is unknown.
    """
    _check(devices, memory_gb, tflops, efficiency, rows or {}, config)
    made = jobs.Plan(config, devices, rows or {})
    found = list(stages.all_jobs(made))
    limit = memory_gb * 1e9 * (1 - RESERVE)
    speed = devices * tflops * 1e12 * efficiency * 3600
    told = [_told(job, speed, limit) for job in found]
    return {
        "devices": devices,
        "memory_gb": memory_gb,
        "tflops": tflops,
        "efficiency": efficiency,
        "models": _models(made),
        "assumptions": _assumptions(made),
        "jobs": told,
        "totals": _totals(told),
        "problems": [_problem(job, limit) for job in found if job.memory.get("peak", 0.0) > limit],
    }


def _check(
    devices: int, memory_gb: float, tflops: float, efficiency: float, rows: Mapping[str, int], config: Config
) -> None:
    for name, value in (("devices", devices), ("memory_gb", memory_gb), ("tflops", tflops)):
        if not 0 < value < inf:  # nan is neither
            raise ConfigError(f"{name} = {value}: give a number above 0")
    if not 0 < efficiency <= 1:
        raise ConfigError(f"efficiency = {efficiency}: give a share above 0, at most 1")
    known = ["task.train", "task.test", "task.transfer"]
    known += [f"pretrain.{number}.data" for number in range(len(config.pretrain))]
    for key, count in rows.items():
        if key not in known:
            raise ConfigError(
                f"rows {key}: there is no such file in the config; there are {', '.join(known)}"
            )
        if count < 1:
            raise ConfigError(f"rows {key} = {count}: give a number of at least 1")


def _told(job: jobs.Job, speed: float, limit: float) -> dict[str, Any]:
    peak = job.memory.get("peak", 0.0)
    sums = {"steps": job.steps, "tokens": round(job.tokens), "flops": job.flops, "hours": job.flops / speed}
    return {
        "stage": job.stage,
        "name": job.name,
        "what": job.what,
        "times": job.times,
        **(sums if job.known else dict.fromkeys(sums)),
        "memory": {name: round(job.memory[name]) for name in PARTS} if job.memory else None,
        "host": round(job.host + job.memory.get("host", 0.0)),
        "disk": round(job.disk),
        "scratch": round(job.scratch),
        "fits": peak <= limit,
    }


def _totals(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the jobs whose rows are known; `unknown` counts the others."""
    known = [job for job in told if job["flops"] is not None]
    peaks = [job["memory"]["peak"] for job in told if job["memory"]]
    return {
        "flops": sum(job["flops"] for job in known),
        "hours": sum(job["hours"] for job in known),
        "disk": sum(job["disk"] for job in told) + max((job["scratch"] for job in told), default=0),
        "peak": max(peaks, default=0),
        "unknown": len(told) - len(known),
    }


def _problem(job: jobs.Job, limit: float) -> dict[str, Any]:
    changes, then = advice.changes(job, limit)
    return {
        "stage": job.stage,
        "name": job.name,
        "what": job.what,
        "peak": round(job.memory["peak"]),
        "limit": round(limit),
        "changes": changes,
        "then": round(then),
    }


def _models(made: jobs.Plan) -> list[dict[str, Any]]:
    """Parameters of each model without its head, and what a checkpoint of it in bf16 weighs."""
    return [
        {
            "name": model.name,
            "source": model.model or (model.init and model.init.architecture),
            "parameters": made.shapes[model.name].backbone,
            "checkpoint": round(HELD["bf16"] * made.shapes[model.name].backbone),
        }
        for model in made.config.models
    ]


def _assumptions(made: jobs.Plan) -> list[str]:
    """Where every number of rows and tokens comes from, each once."""
    config = made.config
    parts = list(made.parts.values())
    for model in config.models:
        parts += [
            phase_part(config, config.pretrain.index(phase), phase, made.rows, model)
            for phase in phases(config, model)
        ]
    said = [part.said for part in parts if part.said]
    said += [part.how for part in parts if part.how]
    if any(teacher.kind == "lightgbm" for teacher in config.teachers):
        said.append("boosted trees need no accelerator, and their hours are not told")
    if any(model.is_net and not config.task.image for model in config.models):
        said.append("a net's numbers may each bring an indicator of missing values; 32 values a category")
    if config.precision == "auto":
        said.append("precision: auto is bf16, as accelerators compute it")
    said += _of_bits(config)
    return list(dict.fromkeys(said))


def _of_bits(config: Config) -> list[str]:
    held = [phase.load_in for phase in config.pretrain] + [model.load_in for model in config.models]
    if not {"nf4", "int8"} & set(held):
        return []
    found = ["weights of 4 or 8 bits are unpacked at each use: memory traffic that the hours leave out"]
    files = [section.deepspeed for section in (*config.pretrain, config.distill)]
    files += [teacher.deepspeed for teacher in config.teachers if isinstance(teacher, Llm)]
    if any(read_zero(file).stage == 3 for file in files):
        found.append("weights of 4 or 8 bits under ZeRO-3 are counted as sharded, which was never measured")
    return found
