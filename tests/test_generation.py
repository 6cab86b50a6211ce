"""A language model judged over every target once, and what it says after a prompt."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmkd import generation
from llmkd.errors import DataError, ModelError
from llmkd.generation import continuations, evaluate_lm
from llmkd.models.lora import add_lora

ALL = np.arange(24)
SAID = {"max_new_tokens": 6, "vocab": 64, "pad_id": 0, "eos_id": 2}


def masked() -> Any:
    examples = tiny.examples()
    chosen = np.random.default_rng(0).random((24, 32)) < 0.4
    chosen[:, 1] = True

    def targets(rows: Any) -> dict[str, Any]:
        return {"mask": torch.from_numpy(chosen[rows, : examples.lengths[rows].max()])}

    return replace(examples, beside={"targets": targets})


def judged(model: Any, examples: Any, rows: Any = ALL, **more: Any) -> dict[str, float]:
    return evaluate_lm(model, examples, rows, **{"batch_tokens": 50, "vocab": 64, "chunk": 7, **more})


@pytest.mark.parametrize("some", [False, True])
def test_means_are_over_targets_each_once(some: bool) -> None:
    student, teacher = tiny.causal_lm().eval(), tiny.causal_lm(seed=1, vocab_size=80).eval()
    examples = masked() if some else tiny.examples()
    nll, divergence, same = [], [], []
    for row in range(24):
        inputs = examples.inputs(np.array([row]))
        ids = inputs["input_ids"][0]
        marked = examples.beside["targets"](np.array([row]))["mask"][0] if some else torch.ones(len(ids)) > 0
        with torch.no_grad():
            q, p = (model(**inputs).logits[0, :-1, :64].softmax(-1) for model in (student, teacher))
        for place in range(1, len(ids)):
            if marked[place]:
                nll.append(-math.log(q[place - 1, ids[place]]))
                divergence.append(float((p * (p / q).log())[place - 1].sum()))
                same.append(int(p[place - 1].argmax() == q[place - 1].argmax()))
    found = judged(student, examples, teachers={"t": teacher})
    assert found["tokens"] == len(nll)
    assert found["nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    assert found["kl/t"] == pytest.approx(np.mean(divergence), rel=1e-4)
    assert found["agreement/t"] == pytest.approx(np.mean(same))
    assert 0 < found["tokens_per_second"] < math.inf


def test_a_model_agrees_with_itself() -> None:
    model = tiny.causal_lm("gemma2")
    found = judged(model, masked(), teachers={"self": model})
    assert found["kl/self"] == pytest.approx(0, abs=1e-6)
    assert found["agreement/self"] == 1


def test_neither_batches_nor_chunks_change_a_figure() -> None:
    model, teacher = (
        add_lora(tiny.causal_lm(), r=2, alpha=2, dropout=0.5, causal=True),
        tiny.causal_lm(seed=1),
    )
    model.train()
    one = judged(model, masked(), teachers={"t": teacher})
    other = judged(model, masked(), ALL[::-1], teachers={"t": teacher}, batch_tokens=9, chunk=500)
    assert model.training
    for name in ("nll", "perplexity", "kl/t", "agreement/t", "tokens"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_the_rows_and_each_counts_once(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_lm()
    expected = judged(model, masked())
    parts: list[Any] = []
    monkeypatch.setattr(generation.ranks, "world", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(generation.ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(generation.ranks, "gather", lambda found: (parts.append(found), [*parts])[1])
        found = judged(model, masked())
    for name in ("nll", "perplexity", "tokens"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    assert len({len(part) for part in parts}) <= 2, "fillers aside, equally many batches a rank"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_whose_logits_are_not_finite_is_named(value: float) -> None:
    """Else a perplexity would stand in metrics.json that is no number."""
    model, examples = tiny.causal_lm(), tiny.examples()
    words = [set(examples.inputs(np.array([row]))["input_ids"][0, :-1].tolist()) for row in range(24)]
    row, word = next(
        (row, word)
        for row in range(24)
        for word in words[row]
        if not any(word in words[other] for other in range(24) if other != row)
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = value
    with pytest.raises(ModelError, match=f"next-token logits of row 'row{row}' are not finite; [^\n]*$"):
        judged(model, examples)


def test_without_rows_it_is_refused() -> None:
    with pytest.raises(DataError, match="no rows to evaluate"):
        judged(tiny.causal_lm(), tiny.examples(), ALL[:0])


def next_words(model: Any, prompt: list[int], count: int, words: int = 64) -> list[int]:
    """Greedy decoding by whole forwards, one word at a time."""
    said: list[int] = []
    while len(said) < count and said[-1:] != [2]:
        with torch.no_grad():
            said.append(int(model(torch.tensor([prompt + said])).logits[0, -1, :words].argmax()))
    return said


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("words", [64, 20])
def test_the_greedy_words_are_the_likeliest_one_by_one(architecture: str, words: int) -> None:
    model = tiny.causal_lm(architecture).eval()
    prompts = [[5, 6, 7], [9], [30, 31, 32, 33, 34]]
    found = continuations(model, prompts, **{**SAID, "vocab": words})
    assert found == [next_words(model, prompt, 6, words) for prompt in prompts]


def test_what_is_said_ends_with_eos() -> None:
    model, prompt = tiny.causal_lm().eval(), [5, 6, 7]
    whole = continuations(model, [prompt], **{**SAID, "eos_id": None})[0]
    stop = next(word for place, word in enumerate(whole) if place and word not in whole[:place])
    found = continuations(model, [prompt, [8]], **{**SAID, "eos_id": stop})[0]
    assert found == whole[: whole.index(stop) + 1]


def test_words_are_drawn_from_the_model_s_own_distribution() -> None:
    model, draws = tiny.causal_lm().eval(), 4000
    torch.manual_seed(0)
    model.generation_config.top_k = 2  # what a checkpoint says of sampling is not asked for
    found = continuations(
        model, [[5, 6, 7]] * draws, **{**SAID, "max_new_tokens": 1, "vocab": 40}, sample=True
    )
    counts = np.bincount([row[0] for row in found], minlength=40)
    with torch.no_grad():
        p = model(torch.tensor([[5, 6, 7]])).logits[0, -1, :40].softmax(-1).numpy()
    assert counts.sum() == draws
    assert (np.abs(counts / draws - p) <= 5 * np.sqrt(p * (1 - p) / draws) + 1e-3).all()


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="a prompt has no tokens"):
        continuations(tiny.causal_lm(), [[5], []], **SAID)
