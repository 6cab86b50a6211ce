"""The jobs that a config's stages amount to, in the order of the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from llmkd import units
from llmkd.layout import Layout
from llmkd.planning import memory, models, work
from llmkd.planning.data import phase_part, task_part
from llmkd.planning.jobs import ROW, Job, Learning, Plan, dev_of, learn, mixed, repeated, run_over, seen
from llmkd.planning.shapes import Shape
from llmkd.planning.way import HELD, Way, held, trained
from llmkd.planning.work import Batches
from llmkd.schema_distill import Distill
from llmkd.schema_models import Llm, Model, Student
from llmkd.settings import phases


def all_jobs(plan: Plan) -> Iterator[Job]:
    config = plan.config
    for model in config.models:
        yield from pretraining(plan, model)
    for teacher in config.teachers:
        yield from teaching(plan, teacher)
    for student in config.students:
        yield from distilling(plan, student)
    yield from finishing(plan)


def pretraining(plan: Plan, model: Model) -> Iterator[Job]:
    """Stage 01: each phase in turn, its model saved whole; a model made from nothing is saved alone."""
    config, shape = plan.config, plan.shapes[model.name]
    if not phases(config, model):
        if model.init or model.layers:
            yield Job("01", model.name, "made", disk=4.0 * shape.backbone)
        return
    for phase in phases(config, model):
        number = config.pretrain.index(phase)
        part = phase_part(config, number, phase, plan.rows, model)
        causal = phase.objective == "causal_lm"
        kinds = models.classes(config) if not causal else None
        way = models.way_of(
            config, model, phase, plan.ranks, classes=kinds, lora=phase.lora, load_in=phase.load_in
        )
        saved = HELD["fp32" if way.load_in == "fp32" else "bf16"] * shape.backbone
        learning = Learning(part.lengths, part.count or ROW, phase.epochs, phase.batch_rows)
        job = learn(plan, "01", model.name, f"pretrain {number}", shape, way, phase, [learning])
        yield replace(
            job,
            known=part.rows is not None,
            disk=saved,
            scratch=job.scratch + saved,
            keys=_keys(f"pretrain.{number}", f"pretrain.{number}"),
        )


def _keys(training: str, model: str) -> dict[str, str]:
    own = {name: f"{training}.{name}" for name in ("deepspeed", "batch_tokens", "gradient_checkpointing")}
    return {**own, "load_in": f"{model}.load_in", "lora": f"{model}.lora"}


def teaching(plan: Plan, teacher: Any) -> Iterator[Job]:
    """Stage 02: each fold's training, and the logits it leaves; of a language model a cache of next words."""
    config = plan.config
    if not isinstance(teacher, Llm):
        disk = config.folds.count * task_rows(plan) * (4.0 * (plan.classes or 2) + 16)
        what = "trees" if teacher.kind == "lightgbm" else "from a file"
        yield Job("02", teacher.name, what, times=config.folds.count, disk=disk)
        return
    shape, known = plan.shapes[teacher.name], plan.known(teacher, "train")
    way = models.way_of(config, teacher, teacher, plan.ranks, classes=plan.classes)
    place = plan.key(teacher)
    keys = _keys(place, place)
    train = plan.parts["train", teacher.name]
    if plan.classes is None:
        if teacher in units.beside(config, config.student):
            return
        frozen = replace(way, lora=None, load_in=way.precision if teacher.load_in == "auto" else way.load_in)
        cache = config.distill_of(config.student).cache
        assert cache
        rate = Layout(cache.how, cache.k, shape.vocab, cache.bits).token_bytes
        whole = [(train, train.count)]
        job = run_over(plan, "02", teacher.name, "cache", teacher, frozen, teacher.batch_tokens, whole)
        yield replace(job, disk=rate * job.tokens, known=known, keys=keys)
        return
    rows = plan.share("train", teacher) or ROW
    learning = Learning(train.lengths, rows, teacher.epochs, teacher.batch_rows)
    times = config.folds.count
    job = learn(
        plan,
        "02",
        teacher.name,
        "train",
        shape,
        way,
        teacher,
        [learning],
        times=times,
        dev=dev_of(plan, teacher),
    )
    yield replace(job, known=known, keys=keys)
    views = seen(plan, teacher, [*config.views, "test", "transfer"])
    logits = run_over(plan, "02", teacher.name, "logits", teacher, way, teacher.batch_tokens, views, True)
    passes = (2 * teacher.average_shifts + 1) ** 2  # one for each shift that the cached logits are a mean of
    logits = replace(logits, tokens=passes * logits.tokens, flops=passes * logits.flops)
    known = plan.known(teacher, "train", "test", "transfer")
    yield replace(repeated(logits, times), known=known, keys=keys)


def task_rows(plan: Plan) -> int:
    """All rows of the task, whoever reads them."""
    first = plan.config.models[0].name
    return sum(plan.parts[part, first].count for part in ("train", "test", "transfer"))


def distilling(plan: Plan, student: Student) -> Iterator[Job]:
    """Stage 03: a student's folds, and those of its baseline on hard labels alone."""
    config, distill = plan.config, plan.config.distill_of(student)
    times, shape = config.folds.count, plan.shapes[student.name]
    way = models.way_of(config, student, distill, plan.ranks, classes=plan.classes)
    place = plan.key(student)
    chain = len(config.students) > 1 and student.distill
    keys = _keys(f"{place}.distill" if chain else "distill", place)
    views = units.student_views(config, student)
    beside, beside_flops = company(plan, student, distill)
    kinds = [("student", distill.in_phases())]
    if distill.baseline and student is config.student:
        kinds.append(("baseline", units.baseline_phases(distill)))
    watched, compared = distill.method in ("feature", "self_distillation"), distill.method == "sequence"
    for kind, sections in kinds:
        learnings = [_learning(plan, student, section, kind) for section in sections]
        parts = {part for section in sections for part in (section.rows if kind == "student" else ["train"])}
        job = learn(
            plan,
            "03",
            student.name,
            kind,
            shape,
            replace(way, states=watched and kind == "student", compared=compared and kind == "student"),
            distill,
            learnings,
            times=times,
            dev=dev_of(plan, student),
            beside=beside if kind == "student" else 0.0,
            beside_flops=beside_flops if kind == "student" else None,
        )
        yield replace(job, known=plan.known(student, "train", *parts), keys=keys)
        if views:
            left = seen(plan, student, views)
            what = "logits" if kind == "student" else "baseline logits"
            logits = run_over(plan, "03", student.name, what, student, way, distill.batch_tokens, left, True)
            known = plan.known(student, "train", "test", *(["transfer"] if "transfer" in views else []))
            yield replace(repeated(logits, times), known=known, keys=keys)


def _learning(plan: Plan, student: Student, section: Distill, kind: str) -> Learning:
    """A phase's rows; without soft labels those without a label are left out."""
    soft = kind == "student" and any(weight for name, weight in section.terms.items() if name != "ce")
    named: Sequence[str] = section.rows if soft and plan.classes is not None else ["train"]
    lengths, count = mixed([(plan.parts[part, student.name], plan.share(part, student)) for part in named])
    return Learning(lengths, count or ROW, section.epochs, section.batch_rows)


def company(
    plan: Plan, student: Student, distill: Distill
) -> tuple[float, Callable[[Batches], float] | None]:
    """Bytes of the models that run beside a student, and the operations of a pass of theirs.

    Online teachers are frozen: weights, one forward pass; peers learn, and are taken to cost as much as
    when each is trained alone.
    """
    config = plan.config
    names = config.teachers_of(student) if distill.method in ("online", "feature") else []
    teachers = [model for model in config.models if model.name in names] or list(
        units.beside(config, student)
    )
    peers = config.peers if distill.method == "mutual" else []
    if not teachers and not peers:
        return 0.0, None
    frozen = [
        (plan.shapes[model.name], models.way_of(config, model, distill, plan.ranks, classes=plan.classes))
        for model in teachers
    ]
    learning = [
        (plan.shapes[peer.name], models.way_of(config, peer, distill, plan.ranks, classes=plan.classes))
        for peer in peers
    ]
    beside = sum(held(shape, way) + 4.0 * bool(way.lora) * trained(shape, way) for shape, way in frozen)
    for (shape, way), peer in zip(learning, peers, strict=True):
        one = _learning(plan, student, distill, "student")
        cut = replace(one, lengths=plan.parts["train", peer.name].lengths)
        batches = cut.batches(distill.batch_tokens, way.ranks)
        beside += memory.training(shape, way, batches.largest, batches.accumulated)["peak"]

    def flops(batches: Batches) -> float:
        asked = sum(work.running_flops(shape, way.classes, batches) for shape, way in frozen)
        return asked + sum(work.training_flops(shape, way, batches) for shape, way in learning)

    return beside, flops


def finishing(plan: Plan) -> Iterator[Job]:
    """Stages 04 to 06: the folds' mean on the host, GPTQ block by block, the artifacts over the test rows."""
    config, student = plan.config, plan.config.student
    shape, dtype = plan.shapes[student.name], HELD[config.merge.dtype]
    way = models.way_of(config, student, config.distill_of(student), 1, classes=plan.classes)
    every = shape.backbone + (shape.head(plan.classes) if shape.hidden else 0)
    folds, learnt = config.folds.count, trained(shape, way)
    aimed = shape.targeted(way.lora["targets"]) if way.lora else []
    deltas = sum(2.0 * often * way.lora["r"] * i * o for often, i, o in aimed) if way.lora else 2.0 * every
    host = 4.0 * every + 8.0 * learnt
    yield Job("04", student.name, "merge", flops=folds * deltas, disk=dtype * every, host=host)
    if config.quantize:
        yield quantizing(plan, shape, every, dtype)
    if config.task.test:
        yield from judging(plan, way, every, dtype)


def quantizing(plan: Plan, shape: Shape, every: int, dtype: float) -> Job:
    config, student = plan.config, plan.config.student
    assert config.quantize
    asked, train = config.quantize, plan.parts["train", student.name]
    tokens = min(asked.calibration_rows, train.count or asked.calibration_rows) * float(train.lengths.mean())
    blocks = shape.layers * shape.block
    groups = max((i for _, i, _ in shape.linears), default=1) if asked.group_size < 0 else asked.group_size
    bits = asked.bits + (16 + asked.bits) / groups
    need = work.gptq_memory(shape, tokens)
    parts = dict.fromkeys(("gradients", "optimizer", "buffers", "head", "host"), 0.0)
    found = {**parts, "weights": 4.0 * shape.block, "activations": need - 4.0 * shape.block, "peak": need}
    return Job(
        "05",
        student.name,
        f"GPTQ {asked.bits} bit",
        tokens=tokens,
        flops=work.gptq_flops(shape, tokens),
        disk=blocks * bits / 8 + (every - blocks) * dtype,
        scratch=blocks * (1 + 8 / groups),  # finished blocks: codes, and what unpacks them
        host=4.0 * every,
        way=Way("fp32", None, "fp32", plan.classes),
        need=lambda *_: found,
    )


def judging(plan: Plan, way: Way, every: int, dtype: float) -> Iterator[Job]:
    """Each artifact over the test rows, both orders; a run of next words also asks teachers and baseline."""
    config, student = plan.config, plan.config.student
    asked = config.evaluate
    budget = asked.max_tokens or student.max_tokens
    reader = student.model_copy(update={"max_tokens": budget})
    part = task_part(config, "test", plan.rows, reader)
    computed = "fp32" if asked.precision == "fp32" or config.merge.dtype == "fp32" else "bf16"
    plain = replace(way, lora=None, load_in=computed, precision=asked.precision)
    for name in ["merged", *(["quantized"] if config.quantize else [])]:
        job = run_over(plan, "06", name, "judge", student, plain, asked.batch_tokens, [(part, part.count)])
        keys = {"batch_tokens": "evaluate.batch_tokens"}
        yield replace(job, known=part.rows is not None, keys=keys)
    if plan.classes is not None:
        return
    for model in config.models[: len(config.teachers)]:
        own = replace(plain, load_in="bf16" if plain.precision == "bf16" else "fp32")
        job = run_over(plan, "06", model.name, "judge", model, own, asked.batch_tokens, [(part, part.count)])
        yield replace(job, known=part.rows is not None)
