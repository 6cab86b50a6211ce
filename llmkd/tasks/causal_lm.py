"""Plain text for continued pretraining: documents into blocks of equal length, so that none is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmkd.batches import Examples, token_examples
from llmkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_texts(source: str, column: str = "text") -> list[str]:
    """Documents of a file's text column, of a .txt file (one a line), or of `arena:rows=N,seed=S`."""
    from llmkd.sources import arena_numbers, read

    if source.startswith("arena:"):
        from llmkd.tasks.arena import texts

        return texts(*arena_numbers(source))
    if source.endswith(".txt"):
        if not Path(source).is_file():
            raise DataError(f"{source}: no such file")
        return [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    table = read(source)
    if column not in table.column_names:
        raise DataError(
            f"{source}: no column {column!r} among {table.column_names}; map it: columns: {{text: ...}}"
        )
    return [text for text in table[column].to_pylist() if text and text.strip()]


def block_examples(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block: int) -> Examples:
    """Blocks of `block` tokens over all documents, each opened by its special tokens and closed by eos.

    A row's weight is its number of targets, so that a step's mean is one over tokens.
    """
    flat = np.fromiter(_stream(texts, tokenizer), dtype=np.int32)
    offsets = np.append(np.arange(0, len(flat), block, dtype=np.int64), len(flat))
    if len(flat) % block == 1:  # a last block of one token has no target
        offsets = np.delete(offsets, -2) if len(offsets) > 2 else offsets
    if len(flat) < 2:
        raise DataError("pretraining text: no tokens; the file is empty")
    lengths = np.diff(offsets)
    ids = [f"block-{i:07d}" for i in range(len(lengths))]
    labels = np.full(len(lengths), -1, dtype=np.int64)
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    return token_examples(ids, flat, offsets, labels, pad, weights=(lengths - 1).astype(np.float64))


def _stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, batch: int = 512) -> Iterator[int]:
    eos = tokenizer.eos_token_id
    for begin in range(0, len(texts), batch):
        for ids in tokenizer(list(texts[begin : begin + batch]), split_special_tokens=True)["input_ids"]:
            yield from ids
            if eos is not None and (not ids or ids[-1] != eos):
                yield eos
