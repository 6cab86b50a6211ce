"""Cross-fitting: one model trained fold by fold, its logits on the rows each fold did and did not see.

Teachers, students and baselines differ only in their objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from llmkd import folds, logits, ranks
from llmkd.batches import Examples, Rows, padding_share, sorted_batches, token_examples
from llmkd.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase, TrainingArguments


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
    """All rows of a prepared table in a tokenizer's own ids, cut to its own budget."""
    from llmkd.tasks.template import encode_rows, encoder

    encode = encoder(
        tokenizer, kind, template=template, max_tokens=max_tokens, max_words=max_words, extra=extra
    )
    tokens, offsets = encode_rows(table, encode)
    labels = table["label"].to_numpy().astype(np.int64)
    return token_examples(table["id"].to_pylist(), tokens, offsets, labels, int(tokenizer.pad_token_id))  # type: ignore[arg-type]


def view_rows(table: pa.Table, fold: int, count: int) -> dict[str, Rows]:
    """Row numbers of each view of one fold: {"oof", "in_sample", "test"}, both orders of a pair included."""
    part, at = table["part"].to_numpy(), table["fold"].to_numpy()
    train = part == "train"
    held = train & (at == fold) if count > 1 else np.zeros_like(train)
    views = {"oof": held, "in_sample": train & ~held, "test": part == "test"}
    return {name: np.flatnonzero(chosen) for name, chosen in views.items()}


def fit_fold(
    model: nn.Module,
    start: dict[str, Tensor],
    objective: Objective,
    examples: Examples,
    table: pa.Table,
    fold: int,
    directory: Path,
    *,
    count: int,
    views: Sequence[str],
    name: str,
    labels: Sequence[str],
    training: TrainingArguments,
    precision: str,
    batch_rows: int,
    batch_tokens: int,
    evaluations: int,
    gradient_checkpointing: bool = False,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Train `model` from `start` on fold's training rows; save the adapter and the views' logits.

    Writes `adapter/` and `logits.parquet` into `directory`. Returns metrics and row counts.
    """
    from llmkd.methods.cached import Cached
    from llmkd.models.lora import load_trainable, save_trained, trainable_state
    from llmkd.train import fit, predict

    train, dev = folds.train_rows(table, fold), folds.dev_rows(table, fold) if count > 1 else None
    load_trainable(model, start)
    history = fit(
        Cached(model, objective, precision),
        examples,
        train[examples.labels[train] >= 0] if not objective.teachers else train,
        training,
        dev=dev,
        batch_rows=batch_rows,
        batch_tokens=batch_tokens,
        evaluations=evaluations,
        gradient_checkpointing=gradient_checkpointing,
    )
    rows = {view: at for view, at in view_rows(table, fold, count).items() if view in views and len(at)}
    found = {view: predict(model, examples, at, batch_tokens, precision) for view, at in rows.items()}
    state = trainable_state(model)
    if ranks.is_main():
        save_trained(model, state, directory / "adapter")
        cached = {view: ([examples.ids[row] for row in rows[view]], found[view]) for view in rows}
        if cached:  # one fold, no test part and no views: there is nothing but the adapter
            logits.write(directory / "logits.parquet", cached, teacher=name, labels=labels)
    batches = [batch for at in rows.values() for batch in sorted_batches(at, examples.lengths, batch_tokens)]
    metrics = {**history, "inference_padding_share": padding_share(batches, examples.lengths)}
    return metrics, {"train": len(train), **{view: len(at) for view, at in rows.items()}}


def teacher_logits(
    table: pa.Table,
    teachers: Mapping[str, Callable[[int], Path]],
    fold: int,
    *,
    count: int,
    view: str,
    labels: Sequence[str],
) -> NDArray[np.float32]:
    """The ensemble's logits for the rows that `fold` trains on, (N, T, C); zeros for all other rows.

    in_sample: teacher `fold`'s own logits on the rows it was trained on (the reference recipe's view).
    oof: each row from the teacher that did not see it.
    teachers: name -> (fold -> its finished directory).
    """
    ids = np.asarray(table["id"].to_pylist(), dtype=object)
    joined = np.zeros((len(table), len(teachers), len(labels)), dtype=np.float32)
    sources = [fold] if view == "in_sample" else [other for other in range(count) if other != fold]
    for t, where in enumerate(teachers.values()):
        for source in sources:
            rows = view_rows(table, source, count)[view]
            joined[rows, t] = logits.read(where(source) / "logits.parquet", view, ids[rows], labels=labels)
    return joined
