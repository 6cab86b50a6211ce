"""A causal_lm run's prepared rows: as texts, as chats, and in one tokenizer's tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llmkd import mapped
from llmkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmkd.batches import Examples


def chats_as_text(table: pa.Table, column: str, part: str) -> pa.Table:
    """A source's table with its chats as JSON in a column `text`. Raises DataError."""
    from llmkd.tasks.causal_lm import as_chats

    if column not in table.column_names:
        raise DataError(f"{part}: no column {column!r} (correct task.columns.messages)")

    name = repr(column).replace("{", "{{").replace("}", "}}")  # `as_chats` formats what it is given

    def text(row: int, value: Any) -> str:
        (chat,) = as_chats([[] if value is None else value], f"{part}: row {row} of {name}")
        return json.dumps(chat, ensure_ascii=False) if chat else ""

    texts = (
        pa.array([text(row, value) for row, value in enumerate(some.to_pylist(), start)], pa.string())
        for start, some in mapped.slices(table[column])
    )
    kept = [name for name in table.column_names if name not in ("text", "label", "bayes")]
    return table.select(kept).append_column("text", mapped.column(pa.string(), texts))


def plain_texts(table: pa.Table, chats: bool, part: str = "train") -> list[str]:
    """The words of a prepared table's rows, a chat's turn by turn."""
    rows = PartColumn(table, part, "text")
    return [turn["content"] for row in rows for turn in json.loads(row)] if chats else list(rows)


def without_test_texts(texts: Sequence[str], table: pa.Table, chats: bool) -> list[str]:
    """Pretraining texts less those that are a test row's (casefolded, whitespace collapsed)."""
    held = {" ".join(text.casefold().split()) for text in plain_texts(table, chats, "test")}
    kept = [text for text in texts if " ".join(text.casefold().split()) not in held]
    if not kept:
        raise DataError("every text is a test row's; give a test part of its own")
    return kept


def examples(
    table: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    part: str,
    *,
    max_tokens: int,
    chats: bool,
    mask_prompt: bool,
    pack: bool,
) -> tuple[Examples, dict[str, int]]:
    """One part's rows in tokens, and counts {"rows", "cut", "without_targets"}; rows without are left out.

    Packed, a row is a block of `max_tokens` over one fold's texts.
    """
    from llmkd.tasks.blocks import packed_examples
    from llmkd.tasks.chats import chat_examples
    from llmkd.tasks.text_rows import text_examples

    ids, texts, folds = (PartColumn(table, part, name) for name in ("id", "text", "fold"))
    if not any(True for _ in ids):
        raise DataError(f"{part}: no rows; give task.{part} some")
    if chats:
        said = map(json.loads, texts)
        return chat_examples(said, tokenizer, max_tokens, masked=mask_prompt, ids=ids)
    if pack:
        return packed_examples(texts, list(folds), tokenizer, max_tokens)
    return text_examples(texts, tokenizer, max_tokens, ids)


@dataclass(frozen=True)
class PartColumn:
    """A column of one part's rows, read from the table some at a time whenever it is gone through."""

    table: pa.Table
    part: str
    name: str

    def __iter__(self) -> Iterator[Any]:
        for some in self.table.select(["part", self.name]).to_batches(mapped.BATCH):
            parts, values = (column.to_pylist() for column in some.columns)
            yield from (value for value, own in zip(values, parts, strict=True) if own == self.part)


def fold_numbers(examples: Examples, table: pa.Table) -> NDArray[np.int64]:
    """Each example's fold: its row's, or its block's. (N,)"""
    from llmkd.tasks.blocks import fold_of

    known = dict(zip(table["id"].to_pylist(), table["fold"].to_pylist(), strict=True))
    return np.array([known[id] if id in known else fold_of(id) for id in examples.ids], dtype=np.int64)
