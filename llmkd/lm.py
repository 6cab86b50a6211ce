"""What the stages call where a run's task is causal_lm: rows as tokens, caches, a student's training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from llmkd import crossfit, ranks, units
from llmkd.assemble import objective_of
from llmkd.folds import in_part
from llmkd.inputs import base, prepared
from llmkd.lm_rows import examples, fold_numbers
from llmkd.loading import load_base
from llmkd.schema import Config
from llmkd.schema_distill import Distill
from llmkd.schema_models import Llm, Student
from llmkd.settings import text_settings
from llmkd.stage import say

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from llmkd.batches import Examples
    from llmkd.layout import Layout
    from llmkd.shards import Cache

CACHE = "cache"  # a teacher's unit holds it


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The student's: all of a run's texts are read in its tokens, by its teachers too."""
    from llmkd.models.load import load_tokenizer

    student = config.student
    trust = student.trust_remote_code
    return load_tokenizer(base(config, student)[0], student.pad_token, trust_remote_code=trust)


def vocabulary(config: Config, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of words that the student shares with all its teachers. Raises ConfigError.

    Chats are read in the student's template by all; a teacher that has another one is told of.
    """
    from llmkd.models.load import load_tokenizer
    from llmkd.tasks.causal_lm import shared_vocabulary

    theirs = {
        which.name: load_tokenizer(
            base(config, which)[0], which.pad_token, trust_remote_code=which.trust_remote_code
        )
        for which in config.teachers
        if isinstance(which, Llm)
    }
    for name, reader in theirs.items() if "messages" in config.task.columns else ():
        if reader.chat_template not in (None, tokenizer.chat_template):
            say(f"{name}: has another chat template than the student, in whose template it reads all chats")
    return shared_vocabulary(tokenizer, theirs)


def layout_of(distill: Distill, name: str, vocab: int) -> Layout:
    """How teacher `name` is cached; at the objective's own temperature. Raises ConfigError."""
    from llmkd.layout import Layout

    assert distill.cache
    degrees = distill.temperature
    temperature = degrees.get(name, 1.0) if isinstance(degrees, dict) else degrees
    return Layout(distill.cache.how, distill.cache.k, vocab, distill.cache.bits, temperature)


def load_teacher(config: Config, which: Llm, precision: str) -> nn.Module:
    """A teacher as stage 01 left it, frozen, on its device."""
    from llmkd.models.load import on_device

    held = precision if which.load_in == "auto" else which.load_in
    network = on_device(load_base(config, which, base(config, which)[0], (), held)[0], held)
    network.requires_grad_(False).train(False)
    return network  # type: ignore[no-any-return]


def capture(config: Config, names: Sequence[str]) -> None:
    """Stage 02: each teacher's distributions over the training rows, cached once."""
    for which in config.teachers:
        if which.name not in names:
            continue
        assert isinstance(which, Llm)
        if which in units.beside(config, config.student):
            say(f"{which.name}: runs beside its student, nothing to cache")
            continue
        recipe = units.teacher(config, which, 0)
        if recipe.stands:
            say(f"{recipe.directory}: done")
        else:
            write_cache(config, which, recipe)


def write_cache(config: Config, which: Llm, recipe: units.Recipe) -> None:
    ranks.start(which.deepspeed)
    from llmkd.capture import cache_teacher
    from llmkd.generation import check_packing
    from llmkd.models.pooling import resolve_precision
    from llmkd.shards import MANIFEST, cache_key
    from llmkd.train import forget_sharding

    forget_sharding()  # every rank holds the teacher whole
    tokenizer = tokenizer_of(config)
    layout = layout_of(config.distill_of(config.student), which.name, vocabulary(config, tokenizer))
    precision = resolve_precision(config.precision)
    table, settings = prepared(config)[0], text_settings(config, config.student)
    rows, counts = examples(table, tokenizer, "train", **settings)
    network = load_teacher(config, which, precision)
    if config.task.pack:
        check_packing(network)
    with recipe.writing(config.seed) as unit:
        beside = unit.checkpoints / CACHE  # finished shards outlive an interruption there
        cache_teacher(
            network,
            rows,
            beside,
            layout,
            cache_key(layout, which.name, tokenizer),
            batch_tokens=which.batch_tokens,
            precision=precision,
            seed=config.seed,
        )
        if ranks.is_main():
            unit.whole.append(CACHE)
            written = json.loads((beside / MANIFEST).read_text(encoding="utf-8"))
            unit.metrics.update({name: written[name] for name in ("tokens", "bytes", "bytes_per_token")})
        unit.rows.update(counts)
    say(f"{recipe.directory}: {counts}, {layout.token_bytes} bytes a token")


def open_caches(
    config: Config,
    distill: Distill,
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    vocab: int,
    rows: Examples,
) -> dict[str, Cache]:
    """The teachers' finished caches, each held against these rows and their tokens. Raises CacheError."""
    from llmkd.shards import cache_key, open_cache, row_digests

    found, digests = {}, row_digests(rows, np.arange(len(rows.ids)))
    for name in names:
        key = cache_key(layout_of(distill, name, vocab), name, tokenizer)
        directory = units.source(config, name, 0).directory / CACHE
        found[name] = open_cache(directory, rows.ids, key, digests)
    return found


def fits(
    config: Config,
    which: Student,
    kind: str,
    fold: int,
    model: nn.Module,
    rows: Examples,
    table: pa.Table,
    directory: Path,
    precision: str,
) -> tuple[list[crossfit.Fit], dict[str, Any]]:
    """A fold's one training: beside its teachers or by their caches; a baseline's by hard tokens.

    With several folds the held-out one's rows choose the best state; one fold holds none out.
    """
    from llmkd.generation import check_packing
    from llmkd.methods.sequence import Sequence as SequenceMethod
    from llmkd.objective import HARD
    from llmkd.shards import with_cache
    from llmkd.train import arguments, split

    distill, tokenizer = config.distill_of(which), tokenizer_of(config)
    names = config.teachers_of(which) if kind == "student" else []
    settings = distill if kind == "student" else units.baseline_phases(distill)[0]
    trainer, batching = split(settings.training())
    training = arguments(directory, seed=config.seed, **trainer)
    weights = [distill.teacher_weights.get(name, 1.0) for name in names]
    objective = objective_of(distill, names, weights) if names else HARD
    online = [one for one in units.beside(config, which) if one.name in names]
    vocab = vocabulary(config, tokenizer)
    if names and not online:
        for name, cache in open_caches(config, distill, names, tokenizer, vocab, rows).items():
            rows = with_cache(rows, name, cache)
    method = SequenceMethod(
        model,
        objective,
        {one.name: load_teacher(config, one, precision) for one in online},
        vocab=vocab,
        precision=precision,
        on_policy=distill.on_policy if online else 0,
        pad_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
        eos_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
        seed=config.seed,
    )
    for one in (model, *method.teachers) if config.task.pack else ():
        check_packing(one)
    held = (fold_numbers(rows, table) == fold) & (config.folds.count > 1)
    learnt, dev = np.flatnonzero(~held), np.flatnonzero(held)
    asked = int(in_part(table, "train").sum())
    facts = {} if config.task.pack else {"without_targets": asked - len(held)}
    return [crossfit.Fit(method, objective, rows, learnt, training, batching, dev)], facts


def calibration(config: Config, merged: Path) -> list[list[int]]:
    """Token ids of training rows, drawn by the run's seed."""
    from llmkd.models.load import load_tokenizer

    assert config.quantize
    settings = text_settings(config, config.student)
    tokenizer = load_tokenizer(str(merged), trust_remote_code=config.student.trust_remote_code)
    rows, _ = examples(prepared(config)[0], tokenizer, "train", **settings)
    count = min(config.quantize.calibration_rows, len(rows.ids))
    drawn = np.sort(np.random.default_rng(config.seed).choice(len(rows.ids), count, replace=False))
    return [rows.inputs(np.array([row]))["input_ids"][0].tolist() for row in drawn]
