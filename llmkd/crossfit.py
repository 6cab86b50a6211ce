"""Cross-fitting: one model trained fold by fold, its logits on the rows each fold did and did not see.

Teachers, students and baselines differ only in their objective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from llmkd import folds, logits, mapped, ranks
from llmkd.batches import Examples, Rows, padding_share, sorted_batches, token_examples
from llmkd.errors import ModelError
from llmkd.ids import Ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from llmkd.objective import Objective
    from llmkd.tracking import Track


def text_examples(
    table: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    *,
    template: str | None,
    max_tokens: int,
    max_words: dict[str, int] | None = None,
    extra: Sequence[str] = (),
) -> Examples:
    """All rows of a prepared table in a tokenizer's own ids, cut to its own budget.

    Only training rows keep their labels: nothing that learns from these rows can read a test row's.
    """
    from llmkd.tasks.template import encode_rows, encoder

    encode = encoder(
        tokenizer, kind, template=template, max_tokens=max_tokens, max_words=max_words, extra=extra
    )
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer has no pad token; set one and save it again"
        )
    tokens, offsets = encode_rows(table, encode)
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    return token_examples(Ids(table["id"]), tokens, offsets, training_labels(table), pad)


def training_labels(table: pa.Table) -> NDArray[np.int64]:
    """Labels of training rows, -1 for all others. (N,)"""
    labels = np.where(folds.in_part(table, "train"), table["label"].to_numpy(), -1)
    return labels.astype(np.int64)


def view_rows(table: pa.Table, fold: int, count: int) -> dict[str, Rows]:
    """Row numbers of each view of one fold, both orders of a pair included.

    "oof" and "in_sample" part the training rows; "test" and "transfer" are those parts as a whole.
    """
    train, test, transfer = (folds.in_part(table, part) for part in ("train", "test", "transfer"))
    held = train & (table["fold"].to_numpy() == fold) if count > 1 else np.zeros_like(train)
    views = {"oof": held, "in_sample": train & ~held, "test": test, "transfer": transfer}
    return {name: np.flatnonzero(chosen) for name, chosen in views.items()}


def learning_rows(table: pa.Table, fold: int, count: int, parts: Sequence[str], *, soft: bool) -> Rows:
    """The rows that a fold learns from: its training rows and whole other parts, as `parts` names them.

    Without soft labels only rows with a label are of use, so other parts are left out.
    """
    views = view_rows(table, fold, count)
    chosen = [views["in_sample" if part == "train" else part] for part in parts]
    rows = np.sort(np.concatenate(chosen))
    return rows if soft else rows[training_labels(table)[rows] >= 0]


@dataclass(frozen=True)
class Fit:
    """One training of a fold's model: by which method and objective, from which rows, how.

    `batching` are the further keyword arguments of `llmkd.train.fit`. Several fits in turn may share a
    method, with an objective each. `dev`: the examples that choose the best state, where they are not the
    table's rows by number; by default the fold's held-out rows.
    """

    method: nn.Module
    objective: Objective
    examples: Examples
    rows: Rows
    training: TrainingArguments
    batching: Mapping[str, Any]
    dev: Rows | None = None


def fit_fold(
    model: nn.Module,
    start: dict[str, Tensor],
    fits: Sequence[Fit],
    table: pa.Table,
    fold: int,
    directory: Path,
    *,
    count: int,
    views: Sequence[str],
    name: str,
    labels: Sequence[str],
    precision: str,
    checkpoints: Path | None = None,
    track: Track | None = None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Train `model` from `start` by each of `fits` in turn; save what was learnt and the views' logits.

    Writes `adapter/` and `logits.parquet` into `directory`, and the same of each peer of a mutual method
    into `peers/<name>/`. The state kept is the one of the lowest development log loss over all fits.
    checkpoints: a directory of this fold's own, from which an interrupted one goes on. track: where its
    curves are kept.
    Returns metrics and row counts.
    """
    from llmkd.models.lora import load_trainable

    load_trainable(model, start)
    history = fit_in_turn(fits, folds.dev_rows(table, fold) if count > 1 else None, checkpoints, track)
    method, examples = fits[-1].method, fits[-1].examples
    rows = {view: at for view, at in view_rows(table, fold, count).items() if view in views and len(at)}
    budget = int(fits[-1].batching["batch_tokens"])
    minutes = float(fits[-1].batching.get("checkpoint_minutes", 10))
    _leave(model, examples, rows, directory, name, labels, budget, precision, checkpoints, minutes)
    for peer, network in list(getattr(method, "peers", {}).items())[1:]:
        (directory / "peers" / peer).mkdir(parents=True, exist_ok=True)
        own = replace(examples, inputs=examples.beside.get(peer, examples.inputs))
        beside = directory / "peers" / peer
        _leave(network, own, rows, beside, peer, labels, budget, precision, checkpoints, minutes)
    if getattr(method, "exits", None) is not None:
        from llmkd.models.exits import save_exits

        save_exits(method.exits, directory / "adapter")  # type: ignore[arg-type]
    batches = [batch for at in rows.values() for batch in sorted_batches(at, examples.lengths, budget)]
    metrics = {**history, "inference_padding_share": padding_share(batches, examples.lengths)}
    return metrics, {"train": len(fits[0].rows), **{view: len(at) for view, at in rows.items()}}


def fit_in_turn(
    fits: Sequence[Fit], dev: Rows | None, checkpoints: Path | None = None, track: Track | None = None
) -> dict[str, Any]:
    """Each fit from the weights that the one before left; afterwards the best state of all.

    Returns the history of `llmkd.train.fit`; of several fits their histories as "phases", the lowest
    development log loss as "best" and all "steps".
    """
    from llmkd.models.lora import load_trainable, trainable_state
    from llmkd.train import fit

    histories, best, state = [], math.inf, None
    for i, one in enumerate(fits):
        one.method.objective = one.objective  # type: ignore[assignment]
        more = {**one.batching, "checkpoints": checkpoints / f"fit{i}" if checkpoints else None}
        if track:
            more["track"] = replace(track, unit=f"{track.unit}/fit{i}") if len(fits) > 1 else track
        held = dev if one.dev is None else one.dev
        histories.append(fit(one.method, one.examples, one.rows, one.training, dev=held, **more))
        found = histories[-1]["best"]
        if found is not None and found < best and len(fits) > 1:
            best, state = found, trainable_state(one.method)
    if state is not None and histories[-1]["best"] > best:
        load_trainable(fits[-1].method, state)
    if len(histories) == 1:
        return histories[0]
    steps = sum(history["steps"] for history in histories)
    return {"phases": histories, "best": best if state is not None else None, "steps": steps}


def _leave(
    model: nn.Module,
    examples: Examples,
    rows: Mapping[str, Rows],
    directory: Path,
    name: str,
    labels: Sequence[str],
    batch_tokens: int,
    precision: str,
    checkpoints: Path | None,
    minutes: float,
) -> None:
    """What a fold leaves of one model: what it learnt, and its logits on the rows of each view."""
    from llmkd.models.lora import save_trained, trainable_state
    from llmkd.train import predict

    found = {}
    for view, at in rows.items():
        keep = checkpoints / "logits" / name / view if checkpoints else None
        found[view] = predict(model, examples, at, batch_tokens, precision, keep=keep, keep_minutes=minutes)
    state = trainable_state(model)
    if ranks.is_main():
        save_trained(model, state, directory / "adapter")
        write_views(directory, examples.ids, rows, found, name, labels)


def write_views(
    directory: Path,
    ids: Sequence[str],
    rows: Mapping[str, Rows],
    found: Mapping[str, NDArray[np.float32]],
    name: str,
    labels: Sequence[str],
) -> None:
    """logits.parquet of the views found; nothing where there are none (one fold, no test part)."""
    every = Ids.over(ids)
    cached = {view: (every.of(rows[view]), found[view]) for view in found}
    if cached:
        logits.write(directory / "logits.parquet", cached, teacher=name, labels=labels)


def teacher_logits(
    table: pa.Table,
    teachers: Mapping[str, Callable[[int], Path]],
    fold: int,
    *,
    count: int,
    view: str,
    labels: Sequence[str],
    parts: Sequence[str] = ("train",),
) -> NDArray[np.float32]:
    """The ensemble's logits for the rows that `fold` learns from, (N, T, C); zeros for all other rows.

    in_sample: teacher `fold`'s own logits on the rows it was trained on (the reference recipe's view).
    oof: each row from the teacher that did not see it. Rows of other parts were seen by none: there the
    logits are those of teacher `fold`, or under oof the log of the other folds' mean probabilities.
    teachers: name -> (fold -> its finished directory).
    """
    ids = Ids(table["id"])
    joined = mapped.zeros((len(table), len(teachers), len(labels)), np.float32)
    sources = [fold] if view == "in_sample" else [other for other in range(count) if other != fold]

    def said(where: Callable[[int], Path], source: int, kind: str, asked: Ids) -> NDArray[np.float32]:
        return logits.read(where(source) / "logits.parquet", kind, asked, labels=labels)

    for source in sources if "train" in parts else []:
        rows = view_rows(table, source, count)[view]
        asked = ids.of(rows)
        for t, where in enumerate(teachers.values()):
            joined[rows, t] = said(where, source, view, asked)
    for part in (part for part in parts if part != "train"):
        rows = view_rows(table, fold, count)[part]  # whatever the fold
        asked = ids.of(rows)
        for t, where in enumerate(teachers.values()):
            found = [said(where, source, part, asked) for source in sources]
            joined[rows, t] = found[0] if len(found) == 1 else mean_logits(found)
    return joined


def mean_logits(many: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The log of the mean of several models' probabilities, as logits. Each (N, C) -> (N, C)"""
    from scipy.special import log_softmax, logsumexp

    stacked = np.stack([log_softmax(one.astype(np.float64), axis=-1) for one in many])  # (models, N, C)
    return (logsumexp(stacked, axis=0) - np.log(len(many))).astype(np.float32)  # type: ignore[no-any-return]
