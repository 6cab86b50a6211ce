"""A teacher's distribution in few bytes: what is kept, what it costs, what the student learns from it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmkd import shards
from llmkd.capture import cache_teacher, shard_rows
from llmkd.errors import CacheError, ConfigError
from llmkd.layout import Layout
from llmkd.losses import kl
from llmkd.models.head import head_of
from llmkd.packing import decode, encode, pack, unpack
from llmkd.shards import cache_key, fingerprint, open_cache, row_digests, with_cache
from llmkd.sparse import Sparse, choose, sparse_kl

WORDS = 64


def logits(rows: int = 6, words: int = WORDS, scale: float = 2.0, seed: int = 0) -> Any:
    return (
        torch.randn(rows, words, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    )


def spread(sparse: Sparse, words: int = WORDS) -> Any:
    """The weights at their words, (n, words)."""
    weights = sparse.weights.double()
    return torch.zeros(len(weights), words, dtype=torch.float64).scatter_add(-1, sparse.ids, weights)


def through(sparse: Sparse, layout: Layout, seed: int = 0) -> Sparse:
    packed = pack(sparse, layout, np.random.default_rng(seed))
    assert packed.shape == (len(sparse.ids), layout.token_bytes)
    return unpack(packed, layout)


def test_a_token_of_128k_words_takes_at_most_64_bytes() -> None:
    assert Layout("topk", 19, 128_256).token_bytes == 62
    layout = Layout("sampled", 21, 128_256)
    assert layout.token_bytes == 63
    assert (layout.words[0], layout.words[-1]) == (32, 21), "a drawn word needs no weight of its own"
    assert Layout("sampled", 20, 256_000).token_bytes <= 64


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("topk", 65, 64), "k = 65 of a vocabulary of 64"),
        (("sampled", 0, 64), "k = 0 of a vocabulary of 64"),
        (("nucleus", 4, 64), "how = 'nucleus'; known are topk and sampled"),
        (("topk", 4, 64, 7), "bits = 7; known are 8, 16 and 32"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(settings: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Layout(*settings)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_topk_keeps_the_largest_and_the_mass_of_the_rest(temperature: float) -> None:
    p = (logits() / temperature).softmax(-1)
    found = choose(logits(), Layout("topk", 5, WORDS, temperature=temperature))
    for row in range(6):
        largest = sorted(p[row].tolist(), reverse=True)
        assert found.weights[row].tolist() == pytest.approx(largest[:5])
        assert p[row][found.ids[row]].tolist() == pytest.approx(largest[:5])
        assert float(found.tail[row]) == pytest.approx(sum(largest[5:]))  # type: ignore[index]


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 30.0])
@pytest.mark.parametrize("k", [1, 8, WORDS])
def test_a_sample_is_k_different_words_or_more_of_mass_one(k: int, scale: float) -> None:
    layout = Layout("sampled", k, WORDS)
    found = choose(logits(200, scale=scale), layout, torch.Generator().manual_seed(1))
    assert found.tail is None
    assert found.weights.sum(-1).tolist() == pytest.approx([1.0] * 200)
    counts = [layout.words[m] for m in found.kept.tolist()]  # type: ignore[union-attr]
    assert min(counts) >= k
    carried = (spread(found) > 0).sum(-1).tolist()
    assert carried == counts or scale == 30.0, "p may be 0 there"
    assert all(one <= count for one, count in zip(carried, counts, strict=True))


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize(("k", "words"), [(1, 2), (1, 128_256), (3, 7), (5, 5), (21, 128_256), (64, 262_144)])
def test_a_sample_comes_back_as_it_was(k: int, words: int, bits: int) -> None:
    layout = Layout("sampled", k, words, bits)
    scales = torch.tensor([0.0, 1.0, 4.0, 12.0, 60.0])[:, None]
    whole = choose(logits(5, words) * scales, layout, torch.Generator().manual_seed(1))
    found, carried = through(whole, layout), spread(whole, words)
    returned = spread(found, words)
    step = {8: 0.066, 16: 3e-4, 32: 1e-6}[bits]
    np.testing.assert_allclose(returned, carried, rtol=step, atol=1.2e-7)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_sample_s_mean_is_the_teacher(k: int, packed: bool) -> None:
    """Mean over many draws against the exact value, within 5 standard errors of it, at every word."""
    draws, layout = 20_000, Layout("sampled", k, 16)
    p = logits(1, 16, 1.5).softmax(-1)
    found = choose(logits(1, 16, 1.5).expand(draws, -1), layout, torch.Generator().manual_seed(2))
    carried = spread(through(found, layout) if packed else found, 16)
    error = (carried.mean(0) - p[0]).abs()
    assert (error <= 5 * carried.std(0) / math.sqrt(draws) + 1e-7).all()


@pytest.mark.parametrize("k", [3, 10])
def test_the_student_s_gradient_is_unbiased(k: int) -> None:
    draws, layout = 20_000, Layout("sampled", k, 16, temperature=2.0)
    teacher, student = logits(1, 16), logits(1, 16, seed=1)
    exact = student.clone().requires_grad_()
    kl(exact, teacher, 2.0).sum().backward()
    many = student.repeat(draws, 1).requires_grad_()
    sample = choose(teacher.expand(draws, -1), layout, torch.Generator().manual_seed(3))
    loss = sparse_kl(many, through(sample, layout), 2.0)
    loss.sum().backward()
    assert exact.grad is not None
    assert many.grad is not None
    slack = 5 * many.grad.std(0) / math.sqrt(draws) + 1e-7
    assert ((many.grad.mean(0) - exact.grad[0]).abs() <= slack).all()
    p = (teacher / 2).softmax(-1)
    entropy = -4 * (p * p.log()).sum()
    wanted = kl(student, teacher, 2.0) + entropy
    assert abs(loss.mean() - wanted) < 5 * loss.std() / math.sqrt(draws)


def test_a_sample_varies_less_than_independent_draws() -> None:
    teacher, k, draws = logits(1, 16, 1.5), 6, 4000
    p = teacher.softmax(-1)[0]
    found = spread(choose(teacher.expand(draws, -1), Layout("sampled", k, 16)), 16)
    independent = p * (1 - p) / k
    assert float(found.var(0).sum()) < 0.5 * float(independent.sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_tail_bucket_by_its_formula(temperature: float) -> None:
    teacher, student = logits(), logits(seed=1)
    found = choose(teacher, Layout("topk", 5, WORDS, temperature=temperature))
    loss = sparse_kl(student, found, temperature)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    for row in range(6):
        top = p[row].argsort(descending=True)[:5]
        p_tail, q_tail = 1 - p[row][top].sum(), 1 - q[row][top].sum()
        expected = (p[row][top] * (p[row][top] / q[row][top]).log()).sum() + p_tail * (p_tail / q_tail).log()
        assert float(loss[row]) == pytest.approx(temperature**2 * float(expected), rel=1e-9)


@pytest.mark.parametrize("words", [7, WORDS])
def test_all_words_kept_are_the_online_teacher(words: int) -> None:
    teacher, student = logits(words=words), logits(words=words, seed=1).requires_grad_()
    layout = Layout("topk", words, words, 32, temperature=2.0)
    loss = sparse_kl(student, through(choose(teacher, layout), layout), 2.0)
    expected = kl(student, teacher, 2.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    found, wanted = (torch.autograd.grad(x.sum(), student)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_a_teacher_that_is_certain_makes_no_nan() -> None:
    student = logits(2).requires_grad_()
    sure = torch.full((2, WORDS), -1e4, dtype=torch.float64).scatter(-1, torch.tensor([[3], [9]]), 1e4)
    for layout in (Layout("topk", 4, WORDS), Layout("sampled", 4, WORDS), Layout("topk", WORDS, WORDS)):
        loss = sparse_kl(student, through(choose(sure, layout), layout))
        expected = -student.log_softmax(-1)[[0, 1], [3, 9]]
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_probability_s_code_is_its_nearest_or_fair(bits: int) -> None:
    p = np.exp(-np.random.default_rng(0).uniform(0, 15.9, 5000))
    nearest = decode(encode(p, bits, np.full(5000, 0.5)), bits)
    assert np.abs(nearest / p - 1).max() <= 16 / (2**bits - 2) / 2 * 1.02
    exact = np.array([0.0, 1.0])
    np.testing.assert_array_equal(decode(encode(exact, bits, np.array([0.999, 0.999])), bits), exact)
    fair = np.random.default_rng(1).random(200_000)
    for value in (0.7, 1e-3, 2e-8):
        drawn = decode(encode(np.full(200_000, value), bits, fair), bits)
        assert abs(drawn.mean() - value) <= 5 * drawn.std() / math.sqrt(200_000) + 1e-12
        assert len(set(drawn)) <= 2


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("words", [2, 5, 131, 128_256, 262_144])
def test_ids_come_back_as_they_were(words: int, bits: int) -> None:
    layout = Layout("topk", 2, words, bits)
    ids = torch.tensor([[0, words - 1], [words - 1, words // 2]])
    found = through(Sparse(ids, torch.tensor([[0.5, 0.25], [0.5, 0.5]]), torch.tensor([0.25, 0.0])), layout)
    assert found.ids.tolist() == ids.tolist()
    assert found.tail is not None
    assert found.tail.tolist() == pytest.approx([0.25, 0.0], rel=2e-4)
    assert (found.weights.sum(-1) + found.tail).tolist() == pytest.approx([1.0, 1.0])


# --- on disk


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny.causal_lm(seed=3).eval()


TOKENIZER = tiny.tokenizer()
LAYOUT = Layout("topk", WORDS, WORDS, 32)
KEY = cache_key(LAYOUT, "t", TOKENIZER)
ROWS = tiny.examples()
EXAMPLES = replace(ROWS, weights=(ROWS.lengths - 1).astype(np.float64))


def write(teacher: Any, directory: Path, layout: Layout = LAYOUT, **more: Any) -> None:
    settings = {"batch_tokens": 50, "chunk": 7, "shard_tokens": 60, **more}
    cache_teacher(teacher, EXAMPLES, directory, layout, cache_key(layout, "t", TOKENIZER), **settings)


def read(directory: Path, **more: Any) -> Any:
    return open_cache(directory, EXAMPLES.ids, {**KEY, **more})


def test_a_cache_holds_each_row_s_distributions_by_id(teacher: Any, tmp_path: Path) -> None:
    write(teacher, tmp_path)
    order = np.random.default_rng(0).permutation(24)
    cache = open_cache(tmp_path, [EXAMPLES.ids[row] for row in order], KEY)
    for place in (0, 5, 23):
        row = int(order[place])
        with torch.no_grad():
            expected = teacher(**EXAMPLES.inputs(np.array([row]))).logits[0, :-1].softmax(-1)
        found = cache.rows(np.array([place]))
        torch.testing.assert_close(spread(found).float(), expected, rtol=1e-4, atol=1e-6)
    both = with_cache(EXAMPLES, "t", read(tmp_path)).batch(np.array([4, 2]), 2, 1.0)["batch"]["beside"]["t"]
    assert len(both["ids"]) == EXAMPLES.weights[[4, 2]].sum()
    first = int(EXAMPLES.weights[4])
    torch.testing.assert_close(both["weights"][first:], read(tmp_path).rows(np.array([2])).weights)


def test_shards_share_the_rows_and_the_manifest_counts_them(teacher: Any, tmp_path: Path) -> None:
    write(teacher, tmp_path)
    parts = shard_rows(EXAMPLES, 60)
    assert np.concatenate(parts).tolist() == list(range(24))
    assert len(parts) > 3
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [entry["rows"] for entry in manifest["shards"]] == [len(part) for part in parts]
    assert (manifest["rows"], manifest["tokens"]) == (24, EXAMPLES.weights.sum())
    assert manifest["bytes_per_token"] == pytest.approx(manifest["bytes"] / manifest["tokens"], abs=0.01)


def test_an_interrupted_cache_goes_on_and_comes_out_the_same(
    teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout("sampled", 4, WORDS)
    write(teacher, tmp_path / "whole", layout)
    made: list[int] = []
    real = shards.write_shard

    def until(count: int) -> Any:
        def write_shard(directory: Path, index: int, *rest: Any) -> None:
            if len(made) == count:
                raise KeyboardInterrupt
            made.append(index)
            real(directory, index, *rest)

        return write_shard

    monkeypatch.setattr("llmkd.capture.write_shard", until(2))
    with pytest.raises(KeyboardInterrupt):
        write(teacher, tmp_path / "broken", layout)
    with pytest.raises(CacheError, match="not a finished cache"):
        open_cache(tmp_path / "broken", EXAMPLES.ids, cache_key(layout, "t", TOKENIZER))
    path = tmp_path / "broken" / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])  # the second one was cut short
    (tmp_path / "broken" / "shard-00002.safetensors").write_bytes(b"half")
    made.clear()
    monkeypatch.setattr("llmkd.capture.write_shard", until(99))
    write(teacher, tmp_path / "broken", layout)
    assert made == list(range(1, len(shard_rows(EXAMPLES, 60)))), "the finished first shard is kept"
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "broken" / file.name).read_bytes()


def test_ranks_take_shards_in_turn(teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(teacher, tmp_path / "one")
    monkeypatch.setattr("llmkd.capture.ranks.world", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr("llmkd.capture.ranks.rank", lambda rank=rank: rank)
        monkeypatch.setattr("llmkd.capture.ranks.is_main", lambda rank=rank: rank == 0)
        write(teacher, tmp_path / "two")
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_damaged_shard_is_named(teacher: Any, tmp_path: Path) -> None:
    write(teacher, tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        CacheError, match=rf"shard-00001.safetensors: {len(whole) - 1} bytes, not the {len(whole)}"
    ):
        read(tmp_path)
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors: its bytes are not those written"):
        read(tmp_path)
    path.unlink()
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors: missing"):
        read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CacheError, match=r"manifest\.json: missing or damaged"):
        read(tmp_path)


def test_a_cache_of_something_else_is_refused(teacher: Any, tmp_path: Path) -> None:
    write(teacher, tmp_path)
    other = fingerprint(tiny.tokenizer(["something else altogether"], 280))["tokenizer"]
    with pytest.raises(CacheError, match="made with another tokenizer, not this run's; remove"):
        read(tmp_path, tokenizer=other)
    with pytest.raises(CacheError, match="made with another template, not this run's"):
        read(tmp_path, template="x")
    with pytest.raises(CacheError, match=r"made with temperature 1\.0, not 2\.0"):
        read(tmp_path, temperature=2.0)
    with pytest.raises(CacheError, match="made with k 64, not 5"):
        write(teacher, tmp_path, Layout("topk", 5, WORDS, 32))


def test_rows_that_do_not_match_are_refused(teacher: Any, tmp_path: Path) -> None:
    write(teacher, tmp_path)
    ids = list(EXAMPLES.ids)
    with pytest.raises(CacheError, match="lacks 1 of 25 rows, first 'new'"):
        open_cache(tmp_path, [*ids, "new"], KEY)
    with pytest.raises(CacheError, match="has 1 rows that are not this run's"):
        open_cache(tmp_path, ids[1:], KEY)
    digests = row_digests(EXAMPLES, np.arange(24))
    assert open_cache(tmp_path, ids, KEY, digests).layout == LAYOUT
    digests[7] ^= np.uint64(1)
    with pytest.raises(CacheError, match="row 'row7' was cached with other tokens or targets"):
        open_cache(tmp_path, ids, KEY, digests)


def test_a_fingerprint_knows_tokenizer_and_template_and_no_padding() -> None:
    one, same, other = tiny.tokenizer(), tiny.tokenizer(), tiny.tokenizer(["other words"], 280)
    same(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one)["tokenizer"] != fingerprint(other)["tokenizer"]
    same.chat_template = "{{ messages }}"
    assert fingerprint(one)["tokenizer"] == fingerprint(same)["tokenizer"]
    assert fingerprint(one)["template"] != fingerprint(same)["template"]


def test_a_padded_vocabulary_is_cut_before_the_softmax(teacher: Any) -> None:
    states = torch.randn(3, 32)
    found = choose(head_of(teacher, 50).logits(states), Layout("topk", 50, 50, 32))
    assert int(found.ids.max()) < 50
    assert found.weights.sum(-1).tolist() == pytest.approx([1.0] * 3)
