"""Rows of tokens and which of them are to be predicted; a document a row.

A row's targets are all tokens but the first, or of a chat the assistant's. Tokens and marks lie in mapped
files, so that memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmkd import mapped
from llmkd.batches import Examples, Rows, token_examples
from llmkd.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Row = tuple[str, Sequence[int], Sequence[bool]]  # its id, its tokens, and which of them are targets


def text_examples(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    ids: Iterable[str] | None = None,
) -> tuple[Examples, dict[str, int]]:
    """A document a row, cut to `max_tokens`; rows and counts {"rows", "cut", "without_targets"}."""
    names = ids if ids is not None else (f"text-{i:07d}" for i in count())
    rows = (
        (name, tokens, [True] * len(tokens))
        for tokens, name in zip(documents(texts, tokenizer), names, strict=ids is not None)
    )
    return target_examples(rows, tokenizer, max_tokens)


def documents(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, batch: int = 512
) -> Iterator[list[int]]:
    """Each text's token ids, closed by eos."""
    eos, rest = tokenizer.eos_token_id, iter(texts)
    while some := list(islice(rest, batch)):
        for ids in tokenizer(some, split_special_tokens=True)["input_ids"]:
            yield [*ids, eos] if eos is not None and (not ids or ids[-1] != eos) else ids


def target_examples(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[Examples, dict[str, int]]:
    """Rows cut to `max_tokens`, those without a target left out. A row's weight is its number of targets, so
    that a step's mean is one over tokens. Returns rows and counts {"rows", "cut", "without_targets"}.
    """
    kept, cut, idle = Kept(), 0, 0
    for name, tokens, targets in rows:
        marks = np.array(targets[:max_tokens], dtype=bool)
        marks[:1] = False  # nothing stands before it that could predict it
        if marks.any():
            kept.append(name, tokens[:max_tokens], marks)
            cut += len(tokens) > max_tokens
        else:
            idle += 1
    if not kept.ids:
        raise DataError(f"none of {idle} rows has a token to predict; raise max_tokens or mend the text")
    examples, _ = kept.examples(tokenizer)
    return examples, {"rows": len(kept.ids), "cut": cut, "without_targets": idle}


class Kept:
    """Rows that are appended one by one: their tokens, and which of them are targets."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.ends, self.targets = [0], [0]  # of a row: its end in the flat tokens, its number of targets
        self.tokens, self.marks = mapped.Column(np.int32), mapped.Column(np.bool_)

    def append(self, name: str, tokens: Sequence[int] | NDArray[np.int32], marks: NDArray[np.bool_]) -> None:
        self.ids.append(name)
        self.ends.append(self.ends[-1] + len(tokens))
        self.targets.append(int(marks.sum()))
        self.tokens.append(tokens)
        self.marks.append(marks)

    def examples(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Examples, Marks]:
        """All of them, and their marks by row; nothing can be appended any more."""
        offsets, weights = np.array(self.ends), np.array(self.targets[1:], dtype=np.float64)
        labels, pad = np.full(len(self.ids), -1), int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        found = token_examples(self.ids, self.tokens.values(), offsets, labels, pad, weights)
        marks = marks_of(self.marks.values(), offsets)

        def targets(rows: Rows) -> dict[str, Tensor]:
            import torch

            return {"mask": torch.from_numpy(marks(rows))}

        return replace(found, beside={"targets": targets}), marks


Marks = Callable[[Rows], NDArray[np.bool_]]  # rows -> (B, L): which tokens are to be predicted


def marks_of(flat: NDArray[np.bool_], offsets: NDArray[np.int64]) -> Marks:
    def of(rows: Rows) -> NDArray[np.bool_]:
        lengths = offsets[rows + 1] - offsets[rows]
        found = np.zeros((len(rows), int(lengths.max())), dtype=bool)
        for i, row in enumerate(rows):
            found[i, : lengths[i]] = flat[offsets[row] : offsets[row + 1]]
        return found

    return of
