"""A teacher's next-token distributions over rows of text, written into a cache once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmkd import ranks
from llmkd.batches import Examples, Rows, sorted_batches
from llmkd.generation import batch_inputs, refuse_row
from llmkd.layout import Layout
from llmkd.models.head import head_of, predicting_states
from llmkd.packing import pack
from llmkd.shards import finish, row_digests, shard_stands, write_shard
from llmkd.sparse import choose, joined
from llmkd.train import inference

if TYPE_CHECKING:
    from torch import nn

SHARD_TOKENS = 1 << 20  # 64 MB at 64 bytes a token
CHUNK = 64  # tokens: choosing holds a few tensors of tokens × vocabulary, some in float64


def cache_teacher(
    model: nn.Module,
    examples: Examples,
    directory: Path,
    layout: Layout,
    key: Mapping[str, Any],
    *,
    batch_tokens: int,
    precision: str = "fp32",
    chunk: int = CHUNK,
    shard_tokens: int = SHARD_TOKENS,
    seed: int = 0,
) -> None:
    """Write the teacher's distributions at all targets of all rows into `directory`, its manifest last.

    key: `shards.cache_key`. Finished shards of an interrupted run are kept; every shard is drawn from a
    seed of its own, so it is the same whenever it is made. Ranks take shards in turn, the teacher whole
    on each. Raises CacheError where what lies there was made from something else, ModelError where the
    teacher's logits are not finite.
    """
    shards = shard_rows(examples, shard_tokens)
    with inference(model):
        for index in range(ranks.rank(), len(shards), ranks.world()):
            rows = shards[index]
            ids = [examples.ids[row] for row in rows]
            if not shard_stands(directory, index, ids, key):
                packed = _packed(model, examples, rows, layout, batch_tokens, precision, chunk, [seed, index])
                write_shard(directory, index, ids, packed, row_digests(examples, rows), key)
    ranks.barrier()
    if ranks.is_main():
        finish(directory, len(shards), key)
    ranks.barrier()


def shard_rows(examples: Examples, shard_tokens: int) -> list[Rows]:
    """Consecutive rows, cut where they pass a multiple of `shard_tokens` targets."""
    ends = np.cumsum(examples.weights)
    number = ((ends - 1) // shard_tokens).astype(np.int64)
    return np.split(np.arange(len(ends)), np.flatnonzero(np.diff(number)) + 1)


def _packed(
    model: nn.Module,
    examples: Examples,
    rows: Rows,
    layout: Layout,
    batch_tokens: int,
    precision: str,
    chunk: int,
    seed: list[int],
) -> list[NDArray[np.uint8]]:
    """Each row's packed tokens, (T_i, bytes), in the order of `rows`."""
    fair = np.random.default_rng(seed)
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(int(fair.integers(1 << 62)))
    found: dict[int, NDArray[np.uint8]] = {}
    for batch in sorted_batches(rows, examples.lengths, batch_tokens):
        inputs, real = batch_inputs(model, examples, batch)
        states = predicting_states(model, inputs, real, precision)  # (N, H)
        head = head_of(model, layout.vocab).to(states.dtype)
        chosen = []
        for begin in range(0, len(states), chunk):
            logits = head.logits(states[begin : begin + chunk])  # (n, vocab)
            finite = logits.amax(-1).isfinite()  # -inf is a word that cannot come; not so +inf, NaN, all -inf
            if not finite.all():
                refuse_row(examples, batch, real, begin + int(finite.int().argmin()))
            chosen.append(choose(logits, layout, random))
        packed = pack(joined(chosen), layout, fair)
        ends = np.cumsum(real.sum(-1).cpu().numpy())
        found.update(zip(batch.tolist(), np.split(packed, ends[:-1]), strict=True))
    return [found[row] for row in rows.tolist()]
