"""What no single field of a config can know: each problem starts with the path of the field to mend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llmkd.errors import ConfigError
from llmkd.tasks import KINDS
from llmkd.tasks.template import check as check_template

if TYPE_CHECKING:
    from llmkd.schema import Config
    from llmkd.schema_distill import Distill
    from llmkd.schema_models import Student


def crosschecks(config: Config) -> Iterator[str]:
    yield from _names(config)
    yield from _task(config)
    yield from _language(config)
    yield from _packing(config)
    for i, phase in enumerate(config.pretrain):
        known = [model.name for model in config.models]
        for name in sorted(set(phase.models or ()) - set(known)):
            yield f"pretrain.{i}.models: no model named {name!r}; there are {known}"
    for place, student in enumerate(config.students):
        where = f"students.{place}" if len(config.students) > 1 else "student"
        yield from _chain(config, student, where, place)
        try:
            distill = config.distill_of(student)
        except ValidationError as error:
            for problem in error.errors():
                path = ".".join(map(str, (where, "distill", *problem["loc"])))
                yield f"{path}: {problem['msg'].removeprefix('Value error, ')}"
            continue
        where = f"{where}.distill" if student.distill else "distill"
        yield from _views(config, distill, where)
        yield from _distill(config, student, distill, where)
        yield from _heads(config, student, distill, where)
        if config.task.kind == "causal_lm":
            yield from _sequence(distill, where)


def _names(config: Config) -> Iterator[str]:
    names = [item.name for item in (*config.teachers, *config.students, *config.peers)]
    if len(set(names)) < len(names):
        yield f"teachers, student: names {names} must differ"
    if f"{config.student.name}-baseline" in names:
        yield f"students: {config.student.name}-baseline is what the baseline is called; take another name"
    methods = {str({**config.distill.model_dump(), **one.distill}["method"]) for one in config.students}
    if config.peers and "mutual" not in methods:
        yield f"peers: only distill.method: mutual trains them, not {config.distill.method}"
    own = config.student.init is not None and config.student.init.architecture.startswith("llmkd-")
    if config.quantize and own:
        yield "quantize: GPTQ packs transformers, not the package's own nets; set quantize: null"


def _task(config: Config) -> Iterator[str]:
    task = config.task
    if config.evaluate.tta == "swap" and not task.swap:
        yield "evaluate.tta = 'swap': needs task.swap: true"
    if task.swap and task.kind != "preference":
        yield f"task.swap = True: only preference rows have two orders, not {task.kind}"
    if not task.labels and not KINDS[task.kind].LABELS and task.kind != "causal_lm":
        yield "task.labels: name the classes in order, e.g. [negative, positive]"
    if task.labels and len(set(task.labels)) < len(task.labels):
        yield f"task.labels = {task.labels}: names must differ"
    for kind, name in (("tabular", "features"), ("image", "image")):
        if (task.kind == kind) != (getattr(task, name) is not None):
            yield f"task.{name}: belongs to kind: {kind}, and kind: {kind} needs it; kind is {task.kind}"
    fields = [*KINDS[task.kind].FIELDS, *task.extra, *(["messages"] if task.kind == "causal_lm" else [])]
    for key in ("columns", "max_words"):
        for field in sorted(set(getattr(task, key) or ()) - set(fields)):
            yield f"task.{key}.{field}: no such field; there are {fields}"
    if task.template is not None and KINDS[task.kind].FIELDS:
        try:
            check_template(task.kind, task.template, None, task.extra)
        except ConfigError as error:
            yield f"task.template: {error}"
    for model in config.models:
        if model.is_net != (task.kind in ("tabular", "image")):
            reads = "features or pixels" if model.is_net else "text"
            yield f"{model.name}: reads {reads}, but task.kind is {task.kind}; choose another architecture"
        if model.shift is not None and task.kind != "image":
            yield f"{model.name}.shift = {model.shift}: moves images, but task.kind is {task.kind}; remove it"
    yield from _averaged(config)
    for peer in config.peers:
        if peer.shift is not None and task.kind == "image":
            yield f"{peer.name}.shift = {peer.shift}: a peer sees the student's images; set student.shift"


def _averaged(config: Config) -> Iterator[str]:
    """A teacher's average over shifts is made where its logits are cached, of images alone."""
    for teacher in config.teachers:
        most = getattr(teacher, "average_shifts", 0)
        if most and config.task.kind != "image":
            told = f"averages over images, but task.kind is {config.task.kind}; remove it"
            yield f"{teacher.name}.average_shifts = {most}: {told}"
        for student in config.students if most else ():
            method = config.distill_of(student).method
            if teacher.name in config.teachers_of(student) and method in ("online", "feature"):
                told = f"{method} reads no cached logits; remove it, or set distill.method to cached"
                yield f"{teacher.name}.average_shifts = {most}: {told}"


EVEN = ("llama", "mistral", "qwen2")  # whose heads share out the hidden size where head_dim is not said


def _packing(config: Config) -> Iterator[str]:
    """Stage 05 would refuse these widths, a tiny config's or a directory's, when all training is done."""
    asked, student = config.quantize, config.student
    sizes, named = _sizes(student)
    for name, width, grouped in _widths(sizes) if asked else ():
        if width % 32:
            told = "choose one" if student.init else "choose another model, or set quantize: null"
            yield f"quantize: GPTQ packs multiples of 32, and {named.format(name)} is {width}; {told}"
        elif grouped and asked and width % asked.group_size:
            yield f"quantize.group_size = {asked.group_size}: must divide {named.format(name)} = {width}"


def _sizes(student: Student) -> tuple[dict[str, Any], str]:
    """What tells a student's widths, as far as it can be read here, and how one of them is called."""
    if student.init:
        own = student.init.architecture.startswith("llmkd-")
        sizes = {"model_type": student.init.architecture, **student.init.config}
        return ({} if own else sizes), "the student's init.config.{}"
    file = Path(student.model or "") / "config.json"
    try:
        sizes = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # a hub's name; what is wrong is said where it is loaded
        return {}, ""
    return sizes if isinstance(sizes, dict) else {}, f"{{}} of {file}"


def _widths(sizes: dict[str, Any]) -> Iterator[tuple[str, int, bool]]:
    """Name and width of what the linear layers of a block read and give, and whether one reads it."""
    known = {name: size for name, size in sizes.items() if type(size) is int and size > 0}
    experts = {"num_experts", "num_local_experts"} & known.keys()  # which are no linear layers of a block
    for name in ("hidden_size",) if experts else ("hidden_size", "intermediate_size"):
        if name in known:
            yield name, known[name], True
    heads, hidden = known.get("num_attention_heads"), known.get("hidden_size")
    even = hidden // heads if heads and hidden and sizes.get("model_type") in EVEN else None
    dim = known.get("head_dim", even)
    for name, grouped in (("num_attention_heads", True), ("num_key_value_heads", False)):
        if dim and name in known and known[name] * dim != hidden:
            yield f"{name} x head_dim", known[name] * dim, grouped


def _language(config: Config) -> Iterator[str]:
    """A language model's rows have no labels, and its teachers are its like, trained on no fold."""
    task = config.task
    if task.kind != "causal_lm":
        if config.distill.method == "sequence":
            yield f"distill.method = 'sequence': learns next tokens of task.kind: causal_lm, not {task.kind}"
        return
    for name in ("template", "transfer", "labels", "label_values", "max_words", "extra"):
        if getattr(task, name):
            yield f"task.{name}: a causal_lm row is its text, or its messages, and no more; remove it"
    if {"text", "messages"} <= set(task.columns):
        yield "task.columns: name text or messages, not both"
    if config.distill.view == "oof":
        yield "distill.view = 'oof': a causal_lm teacher is asked once and trained on no fold; leave it out"
    if task.pack and config.distill.on_policy:
        yield "task.pack = True: distill.on_policy needs a row's own prompt; set it to false"
    if task.pack and "messages" in task.columns:
        yield "task.pack = True: a chat is a row of its own; set it to false"
    for teacher in config.teachers:
        if getattr(teacher, "kind", "llm") != "llm":
            yield f"teachers: {teacher.name} is no language model; a causal_lm task takes kind: llm"
        for name in ("lora", "epochs", "learning_rate"):
            if name in teacher.model_fields_set and getattr(teacher, name) is not None:
                yield f"teachers.{teacher.name}.{name}: stage 02 only asks it; train it by pretrain:"
    for i, phase in enumerate(config.pretrain):
        if phase.objective != "causal_lm":
            yield f"pretrain.{i}.objective = {phase.objective!r}: needs labels; set objective: causal_lm"
    if len(config.students) > 1:
        yield f"students: {len(config.students)} of them, but a causal_lm run has one; give student:"


def _sequence(distill: Distill, where: str) -> Iterator[str]:
    if distill.method != "sequence":
        yield f"{where}.method = {distill.method!r}: task.kind: causal_lm learns by method: sequence"
        return
    if distill.phases:
        yield f"{where}.phases: sequence distillation is one training; give it epochs"
    further = sorted(name for name, weight in distill.terms.items() if weight and name not in ("ce", "kl"))
    if distill.cache and further:
        yield f"{where}.terms.{further[0]}: needs all the teacher's logits; set cache: null to run it beside"
    if distill.cache and distill.weighting != "fixed":
        yield f"{where}.weighting = {distill.weighting!r}: needs all the teachers' logits; set cache: null"
    if distill.cache and distill.on_policy:
        yield f"{where}.on_policy = {distill.on_policy}: no cache knows the student's words; set cache: null"
    if distill.on_policy and not any(weight for name, weight in distill.terms.items() if name != "ce"):
        yield f"{where}.on_policy = {distill.on_policy}: its own words teach it nothing; give kl a weight"


def _heads(config: Config, student: Student, distill: Distill, where: str) -> Iterator[str]:
    """Only a student of cached teachers teaches a second head; elsewhere it would stay as it was drawn."""
    taught = distill.method == "cached" and config.teachers_of(student)
    two = {model.name for model in config.models if model.init and model.init.config.get("heads", 1) != 1}
    for name in sorted(two - ({student.name} if taught else set()) - {one.name for one in config.students}):
        yield f"{name}.init.config.heads: a second head is for a student of cached teachers; set heads: 1"
    if student.name in two and not taught:
        yield f"{where}.method = {distill.method!r}: only cached teachers teach a second head; set heads: 1"


def _chain(config: Config, student: Student, where: str, place: int) -> Iterator[str]:
    """A student learns from teachers and from students before it, so that no chain runs in a circle."""
    earlier = [
        *(teacher.name for teacher in config.teachers),
        *(one.name for one in config.students[:place]),
    ]
    later = {one.name for one in config.students[place:]}
    for name in student.teachers or ():
        if name in later:
            yield f"{where}.teachers: {name!r} is not trained before {student.name!r}: a chain in a circle"
        elif name not in earlier:
            yield f"{where}.teachers: no teacher or earlier student named {name!r}; there are {earlier}"


def _views(config: Config, distill: Distill, where: str) -> Iterator[str]:
    if config.folds.count == 1 and distill.view == "oof":
        yield f"{where}.view = 'oof': needs folds.count of 2 or more; with one fold every row was trained on"
    if not config.teachers:
        return
    needed = "in_sample" if config.folds.count == 1 else distill.view
    if needed not in config.views:
        yield f"views = {config.views}: the student reads {needed!r}, so add it"
    if config.folds.count > 1 and needed != "oof" and "oof" not in config.views:
        yield f"views = {config.views}: the teachers are judged out of fold, so add 'oof'"
    if distill.weighting == "fitted" and config.folds.count == 1:
        yield f"{where}.weighting = 'fitted': needs out-of-fold logits; set folds.count of 2 or more"


def _distill(config: Config, student: Student, distill: Distill, where: str) -> Iterator[str]:
    teachers = sorted(config.teachers_of(student))
    for key in ("teacher_weights", "temperature"):
        named = getattr(distill, key)
        for name in sorted(set(named) - set(teachers)) if isinstance(named, dict) else ():
            yield f"{where}.{key}.{name}: no teacher of that name; there are {teachers}"
    weights = [distill.teacher_weights.get(name, 1.0) for name in teachers]
    alone = distill.method in ("mutual", "self_distillation")
    if not teachers and not alone:
        yield f"teachers: none, and {where}.method = {distill.method!r} learns from at least one; add one"
    elif not distill.terms.get("ce") and not any(weights):
        yield f"{where}.teacher_weights: all 0, and no ce term: nothing would be learnt"
    for i, phase in enumerate(distill.in_phases() if distill.phases else ()):
        soft = any(weight for name, weight in phase.terms.items() if name != "ce") and any(weights)
        if not phase.terms.get("ce") and (not soft or not teachers):
            yield f"{where}.phases.{i}.terms = {phase.terms}: refers to no teacher and no label; add a term"
        if not soft and "train" not in phase.rows:
            yield f"{where}.phases.{i}.rows = {phase.rows}: without labels, and no soft term; add 'train'"
        for part in set(phase.rows) & {"transfer", "test"}:
            if getattr(config.task, part) is None and "rows" in distill.phases[i].model_fields_set:
                yield f"{where}.phases.{i}.rows: {part!r}, but there is no task.{part}; name a source"
    if distill.weighting == "fitted" and distill.teacher_weights:
        yield f"{where}.teacher_weights: are what weighting: fitted finds; leave them out"
    if distill.weighting == "fitted" and distill.method in ("online", "feature"):
        yield f"{where}.weighting = 'fitted': fits cached logits, not teachers that run; set method: cached"
    if distill.method in ("self_distillation", "feature") and student.is_net:
        yield f"{where}.method = {distill.method!r}: needs the layers of a transformer, not one of the nets"
    if distill.method == "mutual" and not config.peers:
        yield f"{where}.method = 'mutual': needs peers: to learn with; add at least one"
    if (distill.method == "feature") != bool(distill.features):
        yield f"{where}.features: belong to method: feature, which needs at least one; method is " + repr(
            distill.method
        )
    for i, pair in enumerate(distill.features):
        if pair.teacher not in teachers:
            yield f"{where}.features.{i}.teacher = {pair.teacher!r}: no such teacher; there are {teachers}"
    if distill.method in ("online", "feature"):
        if distill.view != "in_sample":
            yield f"{where}.view = {distill.view!r}: an online teacher is the fold's own; set view: in_sample"
        networks = {model.name for model in config.models}
        for name in sorted(set(teachers) - networks):
            yield f"{where}.method = {distill.method!r}: {name} is no network to run; set method: cached"
