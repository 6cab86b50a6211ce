"""Documents end to end in blocks of one length: seeing one another, or packed so that none does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmkd import mapped
from llmkd.batches import Examples, Rows, token_examples
from llmkd.errors import DataError
from llmkd.tasks.text_rows import Kept, Marks, documents

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def block_examples(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block: int) -> Examples:
    """Blocks of `block` tokens over all documents, each opened by its special tokens and closed by eos.

    A block's tokens all see those before them, of other documents too: the usual way of pretraining.
    A row's weight is its number of targets, so that a step's mean is one over tokens.
    """
    flat = mapped.tokens(np.array(ids, dtype=np.int32) for ids in documents(texts, tokenizer))
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


def packed_examples(
    texts: Iterable[str], folds: Sequence[int], tokenizer: PreTrainedTokenizerBase, block: int
) -> tuple[Examples, dict[str, int]]:
    """Blocks of `block` tokens over one fold's documents, which do not see one another in them.

    Each document, or piece of one that a block's end cuts in two, counts its positions from 0: by them a
    model's attention keeps to it, so that its logits are those of the piece alone. A piece's first token is
    no target. Padding is a piece of its own. texts are gone through once for each fold; folds: each text's;
    `fold_of` tells a block's.
    Returns rows and counts {"rows", "cut", "without_targets"}: blocks, documents cut in two, blocks left out.
    """
    kept, cut, idle = Kept(), 0, 0
    for fold in sorted(set(folds)):
        own = (text for text, its in zip(texts, folds, strict=True) if its == fold)
        for number, (tokens, begins) in enumerate(_blocks(documents(own, tokenizer), block)):
            cut += not begins[0]
            begins[0] = True
            if begins.all():
                idle += 1
            else:
                kept.append(f"block-{fold}-{number:07d}", tokens, ~begins)
    if not kept.ids:
        raise DataError(f"{len(folds)} texts have no token to predict; raise max_tokens or mend the text")
    examples, marks = kept.examples(tokenizer)
    counts = {"rows": len(kept.ids), "cut": cut, "without_targets": idle}
    return replace(examples, inputs=_with_positions(examples, marks)), counts


def _blocks(
    documents: Iterable[Sequence[int]], block: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Documents end to end, `block` tokens at a time, and which of these a document begins with."""
    tokens: NDArray[np.int32] = np.empty(0, np.int32)
    begins: NDArray[np.bool_] = np.empty(0, np.bool_)
    for ids in documents:
        tokens = np.append(tokens, np.array(ids, np.int32))
        begins = np.append(begins, np.arange(len(ids)) == 0)
        whole = len(tokens) // block * block
        for at in range(0, whole, block):
            yield tokens[at : at + block], begins[at : at + block]
        tokens, begins = tokens[whole:], begins[whole:]
    if len(tokens):
        yield tokens, begins


def fold_of(block: str) -> int:
    """The fold of a block of `packed_examples`, by its id."""
    return int(block.removeprefix("block-").rpartition("-")[0])


def _with_positions(examples: Examples, marks: Marks) -> Callable[[Rows], dict[str, Tensor]]:
    """The examples' inputs with position_ids (B, L), which begin anew where a token is no target, as a
    piece's first is not, and at padding."""
    import torch

    def inputs(rows: Rows) -> dict[str, Tensor]:
        found, begins = examples.inputs(rows), ~marks(rows)  # (B, L)
        for i, length in enumerate(examples.lengths[rows]):
            begins[i, length + 1 :] = False
        places = np.arange(begins.shape[1])
        positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        return {**found, "position_ids": torch.from_numpy(positions)}

    return inputs
