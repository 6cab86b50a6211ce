"""Steps, micro-batches and ranks: every row once, the same gradient however it is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from llmkd.batches import (
    Examples,
    Rows,
    Steps,
    cut,
    epoch_steps,
    padding_share,
    sorted_batches,
    token_examples,
)
from llmkd.dealing import deal
from llmkd.errors import DataError
from llmkd.objective import Objective

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=150).map(
    lambda found: np.array(found, dtype=np.int64)
)
CLASSES, FEATURES = 3, 4


def long_tailed(count: int, seed: int = 0) -> NDArray[np.int64]:
    return np.clip(np.random.default_rng(seed).lognormal(5, 0.8, count), 4, 1024).astype(np.int64)


def flat(steps: list[list[Rows]]) -> list[int]:
    return [int(row) for step in steps for rows in step for row in rows]


def within(batches: list[Rows], lengths: NDArray[np.int64], max_tokens: int) -> bool:
    return all(len(rows) == 1 or len(rows) * lengths[rows].max() <= max_tokens for rows in batches)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(8, 600), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_every_row_once_in_steps_of_exactly_step_rows(
    lengths: NDArray[np.int64], step_rows: int, max_tokens: int, seed: int, epoch: int
) -> None:
    rows = np.arange(len(lengths)) * 3  # row numbers are a subset of the examples'
    spread = np.repeat(lengths, 3)
    steps = epoch_steps(rows, spread, step_rows, max_tokens, seed, epoch)
    assert sorted(flat(steps)) == rows.tolist()
    sizes = [sum(map(len, step)) for step in steps]
    assert sizes[:-1] == [step_rows] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= step_rows
    assert within([rows for step in steps for rows in step], spread, max_tokens)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(8, 600))
def test_cut_keeps_order_and_budget(lengths: NDArray[np.int64], max_tokens: int) -> None:
    rows = np.arange(len(lengths))[::-1]
    batches = cut(rows, lengths, max_tokens)
    assert np.concatenate(batches).tolist() == rows.tolist()
    assert within(batches, lengths, max_tokens)


def test_a_row_longer_than_the_budget_stands_alone() -> None:
    lengths = np.array([3, 50, 3, 3])
    assert [rows.tolist() for rows in cut(np.arange(4), lengths, 10)] == [[0], [1], [2, 3]]


def test_cut_of_no_rows_is_no_batches() -> None:
    assert cut(np.arange(0), np.array([1]), 10) == []


def test_inference_takes_the_longest_first() -> None:
    lengths = long_tailed(300)
    batches = sorted_batches(np.arange(300), lengths, 2048)
    order = np.concatenate(batches)
    assert sorted(order.tolist()) == list(range(300))
    assert (np.diff(lengths[order]) <= 0).all()


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(8, 600), st.integers(1, 9))
def test_deal_gives_equally_many_micro_batches_and_every_row_once(
    lengths: NDArray[np.int64], max_tokens: int, ranks: int
) -> None:
    step = cut(np.argsort(lengths, kind="stable"), lengths, max_tokens)
    dealt = deal(step, lengths, ranks)
    assert len(dealt) == ranks
    assert len({len(mine) for mine in dealt}) == 1
    pairs = [pair for mine in dealt for pair in mine]
    assert sorted(int(row) for rows, real in pairs for row in rows[:real]) == list(range(len(lengths)))
    assert all(len(rows) > 0 for rows, _ in pairs)
    assert within([rows for rows, _ in pairs], lengths, max_tokens)


def test_which_rows_share_a_step_depends_on_no_machine() -> None:
    lengths = long_tailed(500)
    rows = np.arange(500)
    small, large = (epoch_steps(rows, lengths, 32, budget, 1, 0) for budget in (256, 65536))
    assert [set(flat([step])) for step in small] == [set(flat([step])) for step in large]


def test_order_is_random_by_epoch_and_seed_and_fixed_by_both() -> None:
    lengths = long_tailed(500)
    rows = np.arange(500)

    def order(seed: int, epoch: int) -> list[int]:
        return flat(epoch_steps(rows, lengths, 32, 4096, seed, epoch))

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    steps = epoch_steps(rows, lengths, 32, 4096, 1, 0)
    means = np.array([lengths[flat([step])].mean() for step in steps])
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.6, "steps must not go from short to long"


def test_a_step_mixes_lengths() -> None:
    lengths = long_tailed(4000)
    steps = epoch_steps(np.arange(4000), lengths, 64, 65536, 0, 0)
    within_step = np.mean([np.std(np.log(lengths[flat([step])])) for step in steps])
    assert within_step > 0.5 * np.std(np.log(lengths))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_padding_is_at_most_two_percent(ranks: int) -> None:
    lengths = long_tailed(8000)
    steps = epoch_steps(np.arange(8000), lengths, 64, 4096, 0, 0)
    computed = [rows for step in steps for mine in deal(step, lengths, ranks) for rows, _ in mine]
    assert padding_share(computed, lengths) <= 0.02
    assert padding_share(sorted_batches(np.arange(8000), lengths, 4096), lengths) <= 0.02


@pytest.mark.parametrize(("ranks", "share"), [(2, 0.96), (4, 0.93), (8, 0.88)])
def test_ranks_have_nearly_the_same_work(ranks: int, share: float) -> None:
    lengths = long_tailed(8000)
    shares, micros = [], []
    for step in epoch_steps(np.arange(8000), lengths, 64, 4096, 0, 0):
        dealt = deal(step, lengths, ranks)
        loads = [sum(len(rows) * lengths[rows].max() for rows, _ in mine) for mine in dealt]
        shares.append(np.mean(loads) / max(loads))
        micros.append(len(dealt[0]) * ranks / len(step))
    assert np.mean(shares) > share
    assert np.mean(micros) < 3, "small micro-batches are slow"


def test_a_row_that_outweighs_all_others_halves_no_micro_batch_for_nothing() -> None:
    lengths = np.array([5, 5, 5, 5, 5000])
    dealt = deal([np.arange(4), np.array([4])], lengths, 2)
    assert [[rows.tolist() for rows, _ in mine] for mine in dealt] == [[[4]], [[0, 1, 2, 3]]]


def test_padding_share_by_hand() -> None:
    assert padding_share([np.array([0, 1]), np.array([2])], np.array([2, 4, 5])) == pytest.approx(2 / 13)
    assert padding_share([], np.array([1])) == 0


def linear_examples(count: int, weighted: bool) -> Examples:
    random = np.random.default_rng(3)
    features = torch.from_numpy(random.normal(size=(count, FEATURES))).float()
    return Examples(
        ids=[str(i) for i in range(count)],
        lengths=random.integers(5, 60, count),
        labels=random.integers(-1, CLASSES, count),
        weights=random.integers(1, 9, count).astype(float) if weighted else np.ones(count),
        inputs=lambda rows: {"x": features[rows]},
    ).with_teachers(random.normal(size=(count, 2, CLASSES)).astype(np.float32))


OBJECTIVE = Objective({"ce": 1.0, "kl": 1.0, "cosine": 1.0}, ("a", "b"), (1.0, 0.5), (1.0, 2.0))


def losses(model: torch.nn.Linear, micro: dict) -> Tensor:
    batch = micro["batch"]
    return OBJECTIVE(model(batch["inputs"]["x"]), batch["labels"], batch["teacher_logits"])[0]


def gradient(micros: list[dict]) -> Tensor:
    """Summed over the micro-batches of one rank."""
    torch.manual_seed(0)
    model = torch.nn.Linear(FEATURES, CLASSES, bias=False)
    for micro in micros:
        (losses(model, micro) * micro["weight"]).sum().backward()
    assert model.weight.grad is not None
    return model.weight.grad


def plain_gradient(examples: Examples, rows: Rows) -> Tensor:
    """Of the weighted mean over a step's rows, in one piece."""
    torch.manual_seed(0)
    model = torch.nn.Linear(FEATURES, CLASSES, bias=False)
    weights = torch.from_numpy(examples.weights[rows]).float()
    loss = losses(model, examples.batch(rows, len(rows), 1.0))
    ((loss * weights).sum() / weights.sum()).backward()
    assert model.weight.grad is not None
    return model.weight.grad


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(pieces: int) -> None:
    examples, rows = linear_examples(8, weighted=False), np.arange(8)
    micros = [examples.batch(part, len(part), 1 / 8) for part in np.array_split(rows, pieces)]
    torch.testing.assert_close(gradient(micros), plain_gradient(examples, rows))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("max_tokens", [60, 10_000])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_gives_the_steps_own_gradient(
    ranks: int, max_tokens: int, weighted: bool
) -> None:
    examples, rows = linear_examples(37, weighted), np.arange(37)
    data = [Steps(examples, rows, 16, max_tokens, 7, rank, ranks) for rank in range(ranks)]
    assert {len(steps) for steps in data} == {3}
    for i in range(3):
        mean = torch.stack([gradient(steps[i]) for steps in data]).mean(0)
        whole = np.array(flat([data[0].steps[i]]))
        torch.testing.assert_close(mean, plain_gradient(examples, whole), rtol=1e-4, atol=1e-6)


def test_fewer_rows_than_ranks_are_filled_without_weight() -> None:
    examples = linear_examples(2, weighted=False)
    data = [Steps(examples, np.arange(2), 8, 10_000, 0, rank, 5)[0] for rank in range(5)]
    assert [len(micros) for micros in data] == [1] * 5
    mean = torch.stack([gradient(micros) for micros in data]).mean(0)
    torch.testing.assert_close(mean, plain_gradient(examples, np.arange(2)))


def test_set_epoch_reshuffles_alike_on_every_rank() -> None:
    examples, rows = linear_examples(64, weighted=False), np.arange(64)
    one, two = (Steps(examples, rows, 8, 500, 0, rank, 2) for rank in (0, 1))
    before = flat(one.steps)
    for steps in (one, two):
        steps.set_epoch(1)
    assert flat(one.steps) == flat(two.steps) != before


def test_token_examples_are_padded_on_the_right_and_masked_by_length() -> None:
    tokens, offsets = np.arange(10, 16, dtype=np.int32), np.array([0, 1, 4, 6])
    examples = token_examples(["a", "b", "c"], tokens, offsets, np.zeros(3, dtype=np.int64), pad_id=15)
    found = examples.inputs(np.array([2, 0, 1]))
    assert found["input_ids"].tolist() == [[14, 15, 15], [10, 15, 15], [11, 12, 13]]
    assert found["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]], (
        "a text may end in the pad token"
    )


def test_a_row_without_tokens_is_named() -> None:
    with pytest.raises(DataError, match="row b: no tokens"):
        token_examples(
            ["a", "b"], np.array([1], dtype=np.int32), np.array([0, 1, 1]), np.zeros(2, dtype=np.int64), 0
        )


def test_batch_joins_labels_and_teachers_by_row() -> None:
    examples = linear_examples(6, weighted=True)
    found = examples.batch(np.array([4, 1]), 1, 0.5)
    assert found["batch"]["labels"].tolist() == examples.labels[[4, 1]].tolist()
    assert examples.teacher_logits is not None
    np.testing.assert_array_equal(found["batch"]["teacher_logits"].numpy(), examples.teacher_logits[[4, 1]])
    assert found["weight"].tolist() == [0.5 * examples.weights[4], 0.0]
    assert examples.weights.min() > 0, "a filler's weight is cleared in the batch alone"


@pytest.mark.parametrize("count", [1500, 8000])
def test_inference_over_few_rows_and_a_large_budget_pads_little_too(count: int) -> None:
    """Sorted rows alone are not enough: a budget that holds half the set would span most lengths."""
    lengths = np.random.default_rng(5).lognormal(5.0, 0.8, count).astype(np.int64) + 8
    found = sorted_batches(np.arange(count), lengths, 16384)
    assert padding_share(found, lengths) <= 0.02
    assert sorted(np.concatenate(found).tolist()) == list(range(count))
    assert padding_share(cut(np.argsort(-lengths), lengths, 16384), lengths) > 0.02 or count > 1500
