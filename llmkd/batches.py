"""Length-bucketed, token-budgeted batches, and the rows they are cut from.

An optimizer step is a fixed number of rows, as anywhere. Inside it the rows are cut into micro-batches of
nearly equal length under a token budget, so that almost no padding is computed; which rows share a
step, and the order of the steps, stays random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkd.dealing import deal
from llmkd.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Rows = NDArray[np.int64]  # row numbers
POOL = 8192  # rows sorted together: enough for equal lengths, few enough to vary who meets whom
WASTE = 0.02  # of an inference batch's tokens may be padding ...
ENOUGH = 1024  # ... once it has this many: smaller batches waste more in overhead than padding costs
BUCKETS_A_STEP = 4  # a step mixes at least this many lengths, as length and label are not independent


@dataclass(frozen=True)
class Examples:
    """Rows ready for a model: everything by row number, so that subsets are index arrays.

    lengths (N,) int64 tokens of a row; weights (N,) a row's share of a step's mean (1 for a
    classifier, its target tokens for a language model); labels (N,) int64, -1 = none;
    teacher_logits (N, T, C) float32 or None; inputs: row numbers -> the model's keyword arguments;
    beside: the same for further models that see the batch (an online teacher, a peer), by name;
    augment: changes a training batch's inputs, never those of inference;
    copies: of an inference batch's inputs, over which its logits are averaged.
    """

    ids: Sequence[str]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float64]
    inputs: Callable[[Rows], dict[str, Tensor]]
    teacher_logits: NDArray[np.float32] | None = None
    beside: Mapping[str, Callable[[Rows], dict[str, Tensor]]] = field(default_factory=dict)
    augment: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    copies: Callable[[dict[str, Tensor]], Iterable[dict[str, Tensor]]] | None = None

    def with_teachers(self, logits: NDArray[np.float32]) -> Examples:
        return replace(self, teacher_logits=logits)

    def batch(self, rows: Rows, real: int, scale: float) -> dict[str, Any]:
        """One micro-batch: rows after the first `real` are fillers, which weigh nothing."""
        import torch

        weight = torch.from_numpy(self.weights[rows]).float()  # (B,)
        weight[real:] = 0
        inputs = self.inputs(rows)
        if self.augment is not None:
            inputs = self.augment(inputs)
        batch: dict[str, Any] = {"inputs": inputs, "labels": torch.from_numpy(self.labels[rows])}
        if self.beside:
            batch["beside"] = {name: of(rows) for name, of in self.beside.items()}
        if self.teacher_logits is not None:
            batch["teacher_logits"] = torch.from_numpy(self.teacher_logits[rows])  # (B, T, C)
        return {"batch": batch, "weight": weight * scale, "rows": rows}


def token_examples(
    ids: Sequence[str],
    tokens: NDArray[np.int32],
    offsets: NDArray[np.int64],
    labels: NDArray[np.int64],
    pad_id: int,
    weights: NDArray[np.float64] | None = None,
) -> Examples:
    """Examples over flat tokens: row i is tokens[offsets[i]:offsets[i + 1]]; padded on the right."""
    import torch

    def inputs(rows: Rows) -> dict[str, Tensor]:
        longest = int(lengths[rows].max())
        ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : lengths[row]] = tokens[offsets[row] : offsets[row + 1]]
            mask[i, : lengths[row]] = 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}  # (B, L)

    lengths = np.diff(offsets)
    if len(lengths) and lengths.min() < 1:
        raise DataError(
            f"row {ids[int(lengths.argmin())]}: no tokens at all; remove the row or mend its text"
        )
    weights = np.ones(len(ids)) if weights is None else weights
    return Examples(ids, lengths, labels, weights, inputs)


def cut(rows: Rows, lengths: NDArray[np.int64], max_tokens: int, waste: float = 1.0) -> list[Rows]:
    """Consecutive rows into micro-batches of at most max_tokens padded tokens.

    A micro-batch of ENOUGH tokens also ends where more than `waste` of it would be padding. A row longer
    than the budget stands alone.
    """
    return [rows[part] for part in _parts(lengths[rows].tolist(), max_tokens, waste)]


def _parts(lengths: list[int], max_tokens: int, waste: float) -> Iterator[slice]:
    """Where `cut` cuts rows of these lengths."""
    if waste >= 1 and lengths and max(lengths) * len(lengths) <= max_tokens:
        yield slice(0, len(lengths))
        return
    begin, longest, real = 0, 0, 0
    for end, length in enumerate(lengths):
        longest, real = max(longest, length), real + length
        computed = longest * (end - begin + 1)
        wasteful = computed > ENOUGH and real < (1 - waste) * computed
        if end > begin and (computed > max_tokens or wasteful):
            yield slice(begin, end)
            begin, longest, real = end, length, length
    if lengths:
        yield slice(begin, len(lengths))


def sorted_batches(rows: Rows, lengths: NDArray[np.int64], max_tokens: int) -> list[Rows]:
    """For inference: the longest first, so that a budget too large for memory fails at once."""
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    return cut(order, lengths, max_tokens, WASTE)


def epoch_steps(
    rows: Rows, lengths: NDArray[np.int64], step_rows: int, max_tokens: int, seed: int, epoch: int
) -> list[list[Rows]]:
    """One epoch: optimizer steps of exactly step_rows rows (the last may be shorter), each a list of
    micro-batches. Which rows share a step depends on no machine: not on ranks, nor on max_tokens."""
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(rows)
    alike = len(rows) and lengths[rows].min() == lengths[rows].max()
    most = step_rows if alike else max(1, -(-step_rows // BUCKETS_A_STEP))
    own = lengths[shuffled]  # sorted with the rows, so that cutting reads both in order, not all over memory
    pieces: list[slice] = []
    for begin in range(0, len(shuffled), POOL):
        pool = slice(begin, min(begin + POOL, len(shuffled)))
        by_length = np.argsort(own[pool], kind="stable")  # ties stay in random order
        shuffled[pool], own[pool] = shuffled[pool][by_length], own[pool][by_length]
        pieces += [slice(i, min(i + most, pool.stop)) for i in range(begin, pool.stop, most)]
    steps = _fill_steps([pieces[i] for i in random.permutation(len(pieces))], step_rows)
    return [
        [shuffled[piece][part] for piece in step for part in _parts(own[piece].tolist(), max_tokens, 1.0)]
        for step in steps
    ]


def _fill_steps(pieces: Sequence[slice], step_rows: int) -> list[list[slice]]:
    """Pieces in order into steps of step_rows rows; a piece that crosses a step's end is cut there."""
    steps: list[list[slice]] = [[]]
    room = step_rows
    for piece in pieces:
        begin = piece.start
        while begin < piece.stop:
            if room == 0:
                steps.append([])
                room = step_rows
            end = min(begin + room, piece.stop)
            steps[-1].append(slice(begin, end))
            begin, room = end, room - (end - begin)
    return steps


def padding_share(batches: Sequence[Rows], lengths: NDArray[np.int64]) -> float:
    """Share of the computed tokens that are padding."""
    computed = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    return 1 - sum(int(lengths[rows].sum()) for rows in batches) / computed if computed else 0.0


class Steps:
    """The dataset of one training: item i is optimizer step i of this epoch, as this rank's micro-batches."""

    def __init__(
        self,
        examples: Examples,
        rows: Rows,
        step_rows: int,
        max_tokens: int,
        seed: int,
        rank: int,
        ranks: int,
    ) -> None:
        self.examples, self.rows, self.step_rows = examples, rows, step_rows
        self.max_tokens, self.seed, self.rank, self.ranks = max_tokens, seed, rank, ranks
        self.epoch = -1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:  # the Trainer says it again before it begins
            return
        self.epoch, lengths = epoch, self.examples.lengths
        self.steps = epoch_steps(self.rows, lengths, self.step_rows, self.max_tokens, self.seed, epoch)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        step = self.steps[index]
        total = float(sum(self.examples.weights[rows].sum() for rows in step))
        # ranks' gradients are averaged, so each rank's share of the step's mean is scaled up by their number
        scale = self.ranks / total
        mine = deal(step, self.examples.lengths, self.ranks)[self.rank]
        return [self.examples.batch(rows, real, scale) for rows, real in mine]
