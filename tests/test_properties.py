"""What holds for any rows: none lost, none twice, groups whole, budgets kept, means exact."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, TaskType, get_peft_model
from scipy.special import softmax

from llmkd import batches, capture, crossfit, dealing, folds, logits, rows
from llmkd.errors import CacheError, DataError
from llmkd.merge import merge_folds
from llmkd.tasks.template import encoder


def any_of(count: int) -> Any:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=slow)


SEEDS = st.integers(0, 2**31)
WORDS = st.text(st.characters(codec="utf-8"), max_size=12)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=120).map(lambda found: np.array(found, np.int64))
TOKENIZER = tiny.tokenizer()
LABELS = ["a", "b", "tie"]


def each_once(pieces: Any, expected: Any) -> None:
    found = np.concatenate([np.asarray(piece, np.int64) for piece in pieces] or [np.empty(0, np.int64)])
    np.testing.assert_array_equal(np.sort(found), np.sort(expected))


# --- folds


@any_of(60)
@given(
    pairs=st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 15)), min_size=4, max_size=80),
    count=st.integers(1, 5),
    seed=SEEDS,
    stratify=st.booleans(),
)
def test_folds_hold_every_row_once_and_groups_whole(
    pairs: list[tuple[int, int]], count: int, seed: int, stratify: bool
) -> None:
    labels, groups = (np.array(column) for column in zip(*pairs, strict=True))
    try:
        found = folds.assign(labels, groups, count, seed, stratify=stratify)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert len(found) == len(pairs)
    assert set(found.tolist()) <= (set(range(count)) if count > 1 else {-1})
    folds.check(found, groups)
    assert all(len(set(found[groups == group])) == 1 for group in set(groups.tolist()))
    np.testing.assert_array_equal(found, folds.assign(labels, groups, count, seed, stratify=stratify))


def prepared(prompts: list[str], count: int, swap: bool, test: int) -> pa.Table:
    def table(part: str, words: list[str]) -> pa.Table:
        size = len(words)
        return pa.table(
            {
                "id": [f"{part}{i}" for i in range(size)],
                "part": [part] * size,
                "label": pa.array([i % 3 for i in range(size)], pa.int32()),
                "prompt": words,
                **{
                    name: [f"{name} {part} {i}" for i in range(size)] for name in ("response_a", "response_b")
                },
            }
        )

    more = {"kind": "preference", "swap": swap, "group": "prompt", "folds": count, "seed": 1}
    held = table("test", [f"held {i}" for i in range(test)]) if test else None
    return rows.prepare(table("train", prompts), held, **more)[0]  # type: ignore[arg-type]


@any_of(25)
@given(
    prompts=st.lists(st.sampled_from("abcdefghijkl"), min_size=6, max_size=30),
    count=st.integers(1, 4),
    swap=st.booleans(),
    test=st.integers(0, 3),
)
def test_views_part_the_rows_and_copies_stay_with_their_originals(
    prompts: list[str], count: int, swap: bool, test: int
) -> None:
    try:
        table = prepared(prompts, count, swap, test)
    except DataError:
        return
    assert len(set(table["id"].to_pylist())) == len(table) == (len(prompts) + test) * (2 if swap else 1)
    train = np.flatnonzero(table["part"].to_numpy() == "train")
    views = [crossfit.view_rows(table, fold, count) for fold in range(count)]
    for view in views:
        each_once([view["oof"], view["in_sample"]], train)
        assert not set(table["group"].take(view["oof"]).to_pylist()) & set(
            table["group"].take(view["in_sample"]).to_pylist()
        )
    if count > 1:
        each_once([view["oof"] for view in views], train)
    stems = table["stem"].to_pylist()
    where = dict(zip(table["id"].to_pylist(), table["fold"].to_pylist(), strict=True))
    assert all(where[id] == where[stem] for id, stem in zip(where, stems, strict=True))


# --- the cache's join


@any_of(50)
@given(ids=st.lists(WORDS, min_size=1, max_size=30, unique=True), seed=SEEDS, data=st.data())
def test_a_cache_gives_each_id_its_own_logits_or_refuses(ids: list[str], seed: int, data: Any) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(size=(len(ids), 3)).astype(np.float32)
    order = random.permutation(len(ids))
    views = {"oof": ([ids[i] for i in order], values[order]), "test": ([ids[0]], values[:1] + 1)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "logits.parquet"
        logits.write(path, views, teacher="t", labels=LABELS)
        wanted = data.draw(st.permutations(range(len(ids))))
        found = logits.read(path, "oof", [ids[i] for i in wanted], labels=LABELS)
        np.testing.assert_array_equal(found, values[wanted])
        for wrong in ([*ids, "\0another"], ids[1:], [*ids, ids[0]]):
            with pytest.raises(CacheError):
                logits.read(path, "oof", wrong, labels=LABELS)


@any_of(20)
@given(count=st.integers(2, 4), size=st.integers(8, 30), seed=SEEDS)
def test_each_row_s_out_of_fold_logits_are_of_the_teacher_that_did_not_see_it(
    count: int, size: int, seed: int
) -> None:
    table = prepared([f"p{i}" for i in range(size)], count, False, 3)
    ids, fold_of = table["id"].to_pylist(), table["fold"].to_numpy()
    random = np.random.default_rng(seed)
    given_by = random.normal(size=(count, len(table), 3)).astype(np.float32)  # (folds, N, C)
    with tempfile.TemporaryDirectory() as directory:
        for fold in range(count):
            at = {view: rows for view, rows in crossfit.view_rows(table, fold, count).items() if len(rows)}
            (Path(directory) / f"fold{fold}").mkdir()
            found = {view: given_by[fold][rows] for view, rows in at.items()}
            crossfit.write_views(Path(directory) / f"fold{fold}", ids, at, found, "t", LABELS)
        for view in ("oof", "in_sample"):
            joined = crossfit.teacher_logits(
                table, {"t": lambda fold: Path(directory) / f"fold{fold}"}, 0,
                count=count, view=view, labels=LABELS, parts=("train", "test"),
            )  # fmt: skip
            for row in crossfit.view_rows(table, 0, count)["in_sample"]:
                source = fold_of[row] if view == "oof" else 0
                np.testing.assert_array_equal(joined[row, 0], given_by[source, row])
            held = crossfit.view_rows(table, 0, count)["test"]
            sources = given_by[1:, held] if view == "oof" else given_by[:1, held]
            expected = softmax(sources.astype(np.float64), -1).mean(0)
            np.testing.assert_allclose(softmax(joined[held, 0], -1), expected, atol=1e-6)


# --- batches


@any_of(80)
@given(
    lengths=LENGTHS,
    step_rows=st.integers(1, 40),
    budget=st.integers(8, 400),
    ranks=st.integers(1, 4),
    seed=SEEDS,
)
def test_an_epoch_holds_every_row_once_within_the_budget_on_any_number_of_ranks(
    lengths: Any, step_rows: int, budget: int, ranks: int, seed: int
) -> None:
    chosen = np.flatnonzero(np.random.default_rng(seed).random(len(lengths)) < 0.8)
    steps = batches.epoch_steps(chosen, lengths, step_rows, budget, seed, 0)
    each_once([piece for step in steps for piece in step], chosen)
    sizes = [sum(map(len, step)) for step in steps if step]
    assert all(size == step_rows for size in sizes[:-1])
    assert sum(sizes) == len(chosen)
    for step in steps:
        for piece in step:
            assert len(piece) == 1 or len(piece) * lengths[piece].max() <= budget
        dealt = dealing.deal(step, lengths, ranks)
        assert len({len(mine) for mine in dealt}) == 1, "collectives must match"
        real = [rows[:count] for mine in dealt for rows, count in mine]
        each_once(real, np.concatenate(step) if step else [])


@any_of(60)
@given(lengths=LENGTHS, budget=st.integers(8, 4000), waste=st.sampled_from([0.0, 0.02, 1.0]))
def test_inference_asks_for_every_row_once_within_the_budget(lengths: Any, budget: int, waste: float) -> None:
    everything = np.arange(len(lengths))
    for pieces in (
        batches.sorted_batches(everything, lengths, budget),
        batches.cut(everything, lengths, budget, waste),
    ):
        each_once(pieces, everything)
        assert all(len(piece) == 1 or len(piece) * lengths[piece].max() <= budget for piece in pieces)


@any_of(40)
@given(lengths=LENGTHS, shard_tokens=st.integers(1, 200))
def test_shards_hold_every_row_once_in_order(lengths: Any, shard_tokens: int) -> None:
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    tokens = np.zeros(offsets[-1], np.int32)
    ids = [f"row{i}" for i in range(len(lengths))]
    labels = np.full(len(lengths), -1, np.int64)
    examples = batches.token_examples(ids, tokens, offsets, labels, 0, lengths.astype(np.float64))
    found = capture.shard_rows(examples, shard_tokens)
    np.testing.assert_array_equal(np.concatenate(found), np.arange(len(lengths)))
    assert all(lengths[shard[1:]].sum() < shard_tokens for shard in found)


# --- truncation


def tokens(text: str, **more: bool) -> list[int]:
    found: list[int] = TOKENIZER(text, add_special_tokens=False, **more)["input_ids"]
    return found


@any_of(60)
@given(
    texts=st.tuples(*[st.text(st.characters(codec="utf-8"), max_size=80) for _ in range(3)]),
    budget=st.integers(24, 120),
    cap=st.none() | st.integers(1, 6),
)
def test_a_row_of_any_text_fits_and_the_template_stays_whole(
    texts: tuple[str, str, str], budget: int, cap: int | None
) -> None:
    names = ("prompt", "response_a", "response_b")
    template = "Q {prompt} A {response_a} B {response_b} <eos>"
    caps = dict.fromkeys(names, cap) if cap else None
    encode = encoder(TOKENIZER, "preference", template=template, max_tokens=budget, max_words=caps)  # type: ignore[arg-type]
    (ids,) = encode([dict(zip(names, texts, strict=True))])
    assert len(ids) <= budget
    assert ids[0] == TOKENIZER.bos_token_id
    assert ids[-1] == TOKENIZER.eos_token_id
    assert not set(ids[1:-1]) & set(TOKENIZER.all_special_ids), "a text's own <eos> is text"
    alone = [
        TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts
    ]
    fixed = [
        TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in ("Q ", " A ", " B ", " <eos>")
    ]
    if not cap and 1 + sum(map(len, [*alone, *fixed])) <= budget:
        whole = [piece for pair in zip(fixed, [*alone, []], strict=True) for piece in pair]
        assert ids == [TOKENIZER.bos_token_id, *(token for piece in whole for token in piece)]


# --- merging


@any_of(6)
@given(ranks=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4), seed=SEEDS)
def test_merged_weights_are_the_exact_mean_of_the_folds(ranks: list[int], seed: int) -> None:
    base = tiny.classifier()
    expected = {
        name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in base.state_dict().items()
    }
    with tempfile.TemporaryDirectory() as directory:
        paths = []
        for fold, r in enumerate(ranks):
            lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
            model = get_peft_model(tiny.classifier(), lora)
            torch.manual_seed(seed % 2**31 + fold)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=0.3)
            paths.append(Path(directory) / f"fold{fold}")
            model.save_pretrained(paths[-1])
            for name, tensor in model.merge_and_unload().state_dict().items():
                expected[name] += tensor.double() / len(ranks)
        merge_folds(base, paths, "delta")
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=2e-6, msg=name)
