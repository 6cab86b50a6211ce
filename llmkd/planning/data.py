"""How many rows there are and how long, before anything is prepared: measured where the data is at hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from llmkd import run
from llmkd.errors import RunError
from llmkd.inputs import PREPARE, PRETRAIN
from llmkd.planning.work import Lengths
from llmkd.schema import Config
from llmkd.schema_models import Model
from llmkd.schema_training import Pretrain
from llmkd.settings import prepare_settings, pretrain_settings

SAMPLE = 512  # rows whose length is measured
LETTERS = 4  # characters a token, where no tokenizer is at hand


@dataclass(frozen=True)
class Part:
    """Rows of a part, swapped copies included, and lengths of a sample of them in tokens. rows: None where
    nobody knows. said, how: where the number and the lengths come from."""

    rows: int | None
    lengths: Lengths
    said: str = ""
    how: str = ""

    @property
    def count(self) -> int:
        return self.rows or 0


@dataclass(frozen=True)
class _Source:
    rows: int | None
    sample: Any  # a canonical pyarrow table, or None
    said: str


def task_part(config: Config, part: str, rows: Mapping[str, int], model: Model) -> Part:
    """A part of the task's rows as `model` reads them: "train", "test" or "transfer"."""
    key = f"task.{part}"
    found = None if key in rows else _of_stage(config, part)
    if found is None:
        source = _named(config, part)
        if source is None:
            return Part(0, np.ones(1, dtype=np.int64))
        found = _raw(config, key, source, part, rows)
    if model.is_net:
        return Part(found.rows, np.ones(1, dtype=np.int64), f"{key}: {found.said}")
    budget = model.max_tokens or config.task.max_tokens
    lengths, how = _lengths(config, key, found.sample, model, budget)
    whole = Part(found.rows, lengths, f"{key}: {found.said}", how)
    return _blocks(whole, budget) if config.task.pack else whole


def phase_part(config: Config, number: int, phase: Pretrain, rows: Mapping[str, int], model: Model) -> Part:
    """The rows of a phase of continued pretraining; of `causal_lm` its blocks of max_tokens."""
    key = f"pretrain.{number}.data"
    budget = phase.max_tokens or model.max_tokens or config.task.max_tokens
    if phase.objective == "causal_lm":
        found = _texts(key, phase, rows)
        most = budget if found.sample is None else 10**9  # of texts that nobody knows, one block each
        lengths, how = _lengths(config, key, found.sample, model, most, template="{text}")
        return _blocks(
            Part(
                found.rows,
                lengths,
                f"{key}: {found.said}",
                how,
            ),
            budget,
        )
    found = _raw(config, key, phase.data, "train", rows, phase)
    lengths, how = _lengths(config, key, found.sample, model, budget)
    return Part(found.rows, lengths, f"{key}: {found.said}", how)


def _blocks(part: Part, budget: int) -> Part:
    blocks = math.ceil(part.count * float(part.lengths.mean()) / budget)
    return replace(part, rows=blocks if part.rows is not None else None, lengths=np.array([budget]))


def _named(config: Config, part: str) -> str | None:
    task = config.task
    transfer = task.transfer.data if task.transfer else None
    return {"train": task.train, "test": task.test, "transfer": transfer}[part]


def at_hand(source: str) -> bool:
    """Whether its rows can be read here and now, without a hub."""
    if source.startswith("arena:"):
        return True
    return not source.startswith("hub:") and bool(Path(source).is_file() or glob(source, recursive=True))


def stands(directory: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a unit of stage 00 or 01 is finished and was made from these settings."""
    try:
        found = run.manifest(directory)["settings"]
    except RunError:
        return False
    return bool(found == json.loads(json.dumps(settings, default=str)))


def _of_stage(config: Config, part: str) -> _Source | None:
    """From stage 00's rows, where they are, and are this config's."""
    path = Path(config.run) / PREPARE / "rows.parquet"
    if not stands(path.parent, prepare_settings(config)):
        return None
    table = _table(str(path), path.stat().st_mtime_ns)
    where = np.flatnonzero(table["part"].to_numpy(zero_copy_only=False) == part)
    if not len(where):
        return None
    return _Source(len(where), _sampled(table.take(where)), f"{len(where):,} rows of stage 00")


@lru_cache(maxsize=4)
def _table(path: str, _: int) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(path)


def _sampled(table: Any) -> Any:
    if table.num_rows <= SAMPLE:
        return table
    return table.take(np.sort(np.random.default_rng(0).choice(table.num_rows, SAMPLE, replace=False)))


def _unread(key: str, source: str, rows: Mapping[str, int], cap: int | None, copies: int) -> _Source:
    """The rows of a source that cannot be read: as many as the caller says there are."""
    if key not in rows:
        return _Source(None, None, f"{source} is not at hand and its rows are not known: say --rows {key}=N")
    count = min(rows[key], cap or rows[key])
    return _Source(count * copies, None, f"{count:,} rows assumed" + " in both orders" * (copies > 1))


def _raw(
    config: Config,
    key: str,
    source: str,
    part: str,
    rows: Mapping[str, int],
    phase: Pretrain | None = None,
) -> _Source:
    """From the raw file, before leaks and empty rows are dropped."""
    task = config.task
    transfer = task.transfer if part == "transfer" else None
    cap = phase.rows if phase else transfer.rows if transfer else task.rows if part == "train" else None
    copies = 2 if task.swap else 1
    if key in rows or not at_hand(source):
        return _unread(key, source, rows, cap, copies)
    table = _read(source, config.seed)
    if transfer and transfer.sentences:
        from llmkd.sources import sentences

        columns = task.columns if transfer.columns is None else transfer.columns
        table = sentences(table, columns.get("text", "text"), *transfer.sentences)
    table = table.slice(0, cap)
    count = table.num_rows * copies
    sample = _canonical(config, _sampled(table), part, phase)
    return _Source(count, sample, f"{count:,} rows in {source}, before leaks are dropped")


@lru_cache(maxsize=8)
def _read(source: str, seed: int) -> Any:
    from llmkd.sources import read

    return read(source, seed=seed)


def _canonical(config: Config, table: Any, part: str, phase: Pretrain | None) -> Any:
    """A sample under the names of its kind's fields. Labels are left out: they have no length."""
    from llmkd import rows

    task = config.task
    if task.features or task.image:
        return table
    if "messages" in task.columns and phase is None:
        from llmkd.lm_rows import chats_as_text

        table = chats_as_text(table, task.columns["messages"], part)
    columns = phase.columns if phase else task.columns
    if part == "transfer" and task.transfer and task.transfer.columns is not None:
        columns = task.transfer.columns
    columns = {} if "messages" in columns else columns
    found, _ = rows.canonical(
        table,
        part="transfer",
        kind=task.kind,
        columns=columns,
        label=None,
        labels=task.labels or ["a", "b"],
        extra=task.extra,
        turns="text" if phase else task.turns,
        empty="drop",
    )
    return found


def _texts(key: str, phase: Pretrain, rows: Mapping[str, int]) -> _Source:
    import pyarrow as pa

    if key in rows or not at_hand(phase.data):
        return _unread(key, phase.data, rows, phase.rows, 1)
    from llmkd.tasks.causal_lm import read_texts

    texts = read_texts(phase.data, phase.columns.get("text", "text"))[: phase.rows]
    sample = _sampled(pa.table({"text": pa.array(texts, pa.string())}))
    return _Source(len(texts), sample, f"{len(texts):,} texts in {phase.data}")


def _lengths(
    config: Config, key: str, sample: Any, model: Model, budget: int, template: str | None = None
) -> tuple[Lengths, str]:
    """Tokens of each row of a sample, at most `budget`, and how they were found."""
    if sample is None or not sample.num_rows:
        return np.array([budget]), f"{key}: every row of {budget} tokens, the most there can be"
    tokenizer = _tokenizer(config, model)
    texts = _written(config, sample, template)
    if tokenizer is None:
        found = np.array([len(text) for text in texts]) / LETTERS
        how = f"lengths of {model.name} by {LETTERS} characters a token"
    else:
        found = np.array([len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]])
        how = f"lengths of {model.name} by its tokenizer"
    return np.clip(np.ceil(found), 2, budget).astype(np.int64), how


def _written(config: Config, sample: Any, template: str | None) -> list[str]:
    """The words of rows, as their template puts them."""
    from llmkd import tasks
    from llmkd.tasks.template import cap_words

    kind = tasks.KINDS[config.task.kind]
    if template is not None:
        return [template.format_map(row) for row in sample.to_pylist()]
    template = config.task.template or kind.TEMPLATE
    caps = config.task.max_words or {}
    found = []
    for row in sample.to_pylist():
        words = {
            name: cap_words(row[name] or "", caps.get(name)) for name in (*kind.FIELDS, *config.task.extra)
        }
        found.append(template.format_map({**words, **kind.computed({**row, **words})}))
    return found


def _tokenizer(config: Config, model: Model) -> Any:
    """The model's own, where a directory holds it: the checkpoint's, or the one that stage 01 left."""
    student = config.student if config.task.kind == "causal_lm" else model  # whose tokens all read
    asked = student.init.tokenizer if student.init else student.model
    unit = Path(config.run) / PRETRAIN / student.name
    made = [unit / "model"] if stands(unit, pretrain_settings(config, student)) else []
    for directory in (*made, *([Path(asked)] if isinstance(asked, str) else [])):
        if any(directory.glob("tokenizer*")):
            return tokenizer_in(str(directory), student.trust_remote_code)
    return None


@lru_cache(maxsize=8)
def tokenizer_in(directory: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a directory. Raises ModelError."""
    from transformers import AutoTokenizer

    from llmkd.models.hub import from_hub

    return from_hub(AutoTokenizer, directory, trust_remote_code=trust_remote_code)
