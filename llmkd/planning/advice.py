"""What to change where a job does not fit: the config's own keys, tried out with the memory model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llmkd.planning.jobs import Job
from llmkd.planning.way import Way, Zero, read_zero

SHARDED = "configs/deepspeed/zero3.json"
OFFLOADED = "configs/deepspeed/zero2_offload.json"
LORA = {"r": 64, "alpha": 128.0, "dropout": 0.05, "targets": "all-linear"}  # the config's defaults
Setting = tuple[Way, int]  # and the token budget of a micro-batch


@dataclass(frozen=True)
class Change:
    """Values by the job's own keys, and what they make of a way and its budget."""

    values: dict[str, str]
    apply: Callable[[Setting], Setting]


def changes(job: Job, limit: float) -> tuple[list[str], float]:
    """Overrides that together bring `job` below `limit` bytes, and the peak they lead to.

    One after another, each kept where it saves anything, the cheapest first, until the job fits; those
    that turn out needless are left out again. Where all are not enough, the peak is still above `limit`.
    """
    if job.way is None or job.need is None or not job.keys:
        return [], job.memory.get("peak", 0.0)
    kept: list[Change] = []
    for change in _offered(job):
        if _peak(job, kept) > limit and _peak(job, [*kept, change]) < _peak(job, kept):
            kept.append(change)
    for change in list(kept):
        without = [one for one in kept if one is not change]
        if _peak(job, without) <= limit:
            kept = without
    values = {name: value for change in kept for name, value in change.values.items()}
    return [f"{job.keys[name]}={value}" for name, value in values.items()], _peak(job, kept)


def _peak(job: Job, kept: list[Change]) -> float:
    assert job.way
    assert job.need
    setting = (job.way, job.batch_tokens)
    for change in kept:
        setting = change.apply(setting)
    return job.need(*setting)["peak"]


def _offered(job: Job) -> Iterator[Change]:
    """In order: what costs nothing, time, precision, traffic."""
    way, budget = job.way, job.batch_tokens
    assert way
    trains = job.steps > 0
    if trains and not way.checkpointing:
        yield _way({"gradient_checkpointing": "true"}, checkpointing=True)
    while budget // 2 >= job.longest:
        budget //= 2
        yield _budget(budget)
    if "load_in" not in job.keys:
        return
    if way.lora and way.load_in in ("fp32", "bf16") and way.zero.stage < 3:
        yield _way({"load_in": "nf4"}, load_in="nf4")
    if way.ranks > 1 and way.zero.stage < 3 and not (way.lora and way.load_in in ("fp32", "bf16")):
        held = "bf16" if way.lora else way.load_in
        values = {"deepspeed": SHARDED, **({"load_in": "bf16"} if way.lora else {})}
        yield _way(values, zero=_zero(SHARDED, 3), load_in=held)
    elif trains and not way.zero.offload_optimizer and way.zero.stage < 3:
        yield _way({"deepspeed": OFFLOADED}, zero=_zero(OFFLOADED, 2))
    if trains and way.lora is None:
        held = "bf16" if way.precision == "bf16" else "fp32"
        yield _way({"lora": "{}"}, lora=LORA, load_in=held)


def _way(values: dict[str, str], **fields: object) -> Change:
    return Change(values, lambda setting: (replace(setting[0], **fields), setting[1]))  # type: ignore[arg-type]


def _budget(tokens: int) -> Change:
    return Change({"batch_tokens": str(tokens)}, lambda setting: (setting[0], tokens))


def _zero(path: str, stage: int) -> Zero:
    """The shipped file, or outside the repository what it says."""
    return read_zero(path) if Path(path).is_file() else Zero(stage=stage, offload_optimizer=stage == 2)
