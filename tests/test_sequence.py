"""Sequence distillation: the plain formula over real next tokens; online, cached, in the student's words."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from llmkd.capture import cache_teacher
from llmkd.errors import ConfigError, ModelError
from llmkd.generation import check_packing, evaluate_lm
from llmkd.layout import Layout
from llmkd.methods.next_token import WholeLogits
from llmkd.methods.sequence import Sequence
from llmkd.models.lora import add_lora, trainable
from llmkd.objective import Objective
from llmkd.shards import cache_key, open_cache, with_cache
from llmkd.tasks.blocks import packed_examples
from llmkd.tasks.text_rows import text_examples
from llmkd.train import fit

WORDS = 64
OBJECTIVE = Objective({"ce": 1.0, "kl": 0.5}, ["t"], [1.0], [2.0], normalize=False)
LABELS = torch.full((5,), -1)


def rows(**more: Any) -> Any:
    examples = tiny.examples(**more)
    return replace(examples, weights=(examples.lengths - 1).astype(np.float64))


def masked(examples: Any, seed: int = 0) -> Any:
    """Some tokens of each row are targets, the second always."""
    random = np.random.default_rng(seed)
    chosen = random.random((len(examples.ids), 32)) < 0.5
    chosen[:, 1] = True

    def targets(rows: Any) -> dict[str, Tensor]:
        return {"mask": torch.from_numpy(chosen[rows, : examples.lengths[rows].max()])}

    weights = np.array(
        [chosen[i, 1:length].sum() for i, length in enumerate(examples.lengths)], dtype=np.float64
    )
    return replace(examples, beside={"targets": targets}, weights=weights)


def batch(examples: Any, count: int = 5) -> dict[str, Any]:
    found: dict[str, Any] = examples.batch(np.arange(count), count, 1.0)["batch"]
    return found


def by_hand(student: Any, teacher: Any, examples: Any, row: int, words: int = WORDS) -> float:
    """One row alone, whole logits: the mean over its targets of CE + 0.5 · T² KL at T = 2."""
    inputs = examples.inputs(np.array([row]))
    marked = [True] * int(examples.lengths[row])
    if "targets" in examples.beside:
        marked = examples.beside["targets"](np.array([row]))["mask"][0].tolist()
    with torch.no_grad():
        ours, theirs = (model(**inputs).logits[0, :, :words] for model in (student, teacher))
    losses = []
    for place in range(1, int(examples.lengths[row])):
        if not marked[place]:
            continue
        ce = -float(ours[place - 1].log_softmax(-1)[inputs["input_ids"][0, place]])
        p, q = (theirs[place - 1] / 2).softmax(-1), (ours[place - 1] / 2).softmax(-1)
        losses.append(ce + 0.5 * 4 * float((p * (p / q).log()).sum()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("some", [False, True])
def test_the_loss_by_its_formula(architecture: str, some: bool) -> None:
    student, teacher = tiny.causal_lm(architecture).eval(), tiny.causal_lm(seed=1, hidden_size=48).eval()
    examples = masked(rows()) if some else rows()
    method = Sequence(student, OBJECTIVE, {"t": teacher}, vocab=WORDS, chunk=7).eval()
    loss, parts = method(**batch(examples))
    for row in range(5):
        wanted = by_hand(student, teacher, examples, row)
        assert float(loss[row].detach()) == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(loss, parts["ce"] + 0.5 * parts["kl/t"])


def test_words_that_pad_the_vocabulary_have_probability_0() -> None:
    student, teacher = tiny.causal_lm(vocab_size=70).eval(), tiny.causal_lm(seed=1, vocab_size=96).eval()
    loss, _ = Sequence(student, OBJECTIVE, {"t": teacher}, vocab=WORDS)(**batch(rows()))
    for row in range(5):
        assert float(loss[row].detach()) == pytest.approx(by_hand(student, teacher, rows(), row), rel=1e-4)
    with pytest.raises(ModelError, match="its head has 70 rows for 80 tokens"):
        Sequence(student, OBJECTIVE, {"t": teacher}, vocab=80)


def test_padding_changes_nothing() -> None:
    method = Sequence(tiny.causal_lm(), OBJECTIVE, {"t": tiny.causal_lm(seed=1)}, vocab=WORDS).eval()
    examples = masked(rows())
    together, _ = method(**batch(examples))
    for row in range(5):
        alone, _ = method(**examples.batch(np.array([row]), 1, 1.0)["batch"])
        assert float(alone.detach()) == pytest.approx(float(together[row].detach()), rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [("llama", "eager"), ("llama", "sdpa"), ("qwen2", "sdpa"), ("qwen2", "eager"), ("gemma2", "eager")],
)
def test_a_pack_is_its_documents_alone(architecture: str, attention: str, tmp_path: Path) -> None:
    """States and loss of a pack of several documents, the teacher's cache included, and of each alone."""
    student = tiny.causal_lm(architecture, attn_implementation=attention, vocab_size=320)
    teacher = tiny.causal_lm(architecture, seed=1, attn_implementation=attention, vocab_size=320)
    texts, tokenizer = (
        ["some words", "and a few more of them", "to learn", "more words of them"],
        tiny.tokenizer(),
    )
    alone, _ = text_examples(texts, tokenizer, 64)
    packed, counts = packed_examples(texts, [0] * 4, tokenizer, int(alone.lengths[:3].sum()))
    assert counts == {"rows": 2, "cut": 0, "without_targets": 0}
    assert packed.lengths[0] > packed.lengths[1], "the second row is padded"
    for one in (student, teacher):
        check_packing(one)
    found = []
    for name, examples in (("alone", alone), ("packed", packed)):
        everything = np.arange(len(examples.ids))
        cache = tmp_path / name
        key = cache_key(Layout("topk", 320, 320, 32), "t", tokenizer)
        cache_teacher(teacher, examples, cache, Layout("topk", 320, 320, 32), key, batch_tokens=1000)
        joined = with_cache(examples, "t", open_cache(cache, examples.ids, key))
        for teachers, rows_of in (({}, joined), ({"t": teacher}, examples)):
            method = Sequence(student, OBJECTIVE, teachers, vocab=320)
            loss, _ = method(**rows_of.batch(everything, len(everything), 1.0)["batch"])
            shares = torch.from_numpy(examples.weights / examples.weights.sum()).float()
            found.append(loss.detach() @ shares)
        judged = evaluate_lm(student, examples, everything, batch_tokens=50, vocab=320)
        found.append(torch.tensor(judged["nll"]))
    torch.testing.assert_close(found[:3], found[3:], rtol=1e-5, atol=1e-5)


def test_a_model_that_looks_across_documents_is_refused() -> None:
    model = tiny.causal_lm()
    decoder = model.get_decoder()
    forward = decoder.forward
    decoder.forward = lambda **inputs: forward(**{k: v for k, v in inputs.items() if k != "position_ids"})
    with pytest.raises(ModelError, match="llama: documents of one pack see one another"):
        check_packing(model)


def test_hard_tokens_alone_are_next_token() -> None:
    model = tiny.causal_lm()
    loss, _ = Sequence(model, Objective({"ce": 1.0}), vocab=WORDS)(**batch(rows()))
    expected, _ = WholeLogits(model)(batch(rows())["inputs"], LABELS)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0, 1.0, 3.0]])
def test_gradients_are_those_of_whole_logits(tied: bool, weights: list[float] | None) -> None:
    student, teacher = tiny.causal_lm(tie_word_embeddings=tied).double(), tiny.causal_lm(seed=1).double()
    examples = rows()
    share = torch.tensor(examples.weights[:5] if weights is None else weights, dtype=torch.float64)
    method = Sequence(student, OBJECTIVE, {"t": teacher}, vocab=WORDS, chunk=7)
    loss, _ = method(**batch(examples))
    (loss * share).sum().backward()
    found = {name: p.grad.clone() for name, p in trainable(student).items()}  # type: ignore[union-attr]
    student.zero_grad()
    inputs = batch(examples)["inputs"]
    ours, theirs = student(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1].detach()
    real = inputs["attention_mask"][:, 1:]
    ce = -ours.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    log_p, log_q = (theirs / 2).log_softmax(-1), (ours / 2).log_softmax(-1)
    whole = (ce + 0.5 * 4 * (log_p.exp() * (log_p - log_q)).sum(-1)) * real
    ((whole.sum(-1) / real.sum(-1)) * share).sum().backward()
    for name, parameter in trainable(student).items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-10)
    assert all(p.grad is None for p in teacher.parameters())


def cached(examples: Any, teacher: Any, directory: Path, layout: Layout) -> Any:
    key = cache_key(layout, "t", tiny.tokenizer())
    cache_teacher(teacher, examples, directory, layout, key, batch_tokens=40, shard_tokens=70)
    return with_cache(examples, "t", open_cache(directory, examples.ids, key))


def test_a_cache_of_all_words_is_the_online_teacher(tmp_path: Path) -> None:
    student, teacher, examples = tiny.causal_lm(), tiny.causal_lm(seed=1), masked(rows())
    layout = Layout("topk", WORDS, WORDS, 32, temperature=2.0)
    online, parts = Sequence(student, OBJECTIVE, {"t": teacher}, vocab=WORDS)(**batch(examples))
    given = batch(cached(examples, teacher, tmp_path, layout))
    loss, own = Sequence(student, OBJECTIVE, vocab=WORDS, chunk=5)(**given)
    torch.testing.assert_close(loss, online, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own["kl/t"], parts["kl/t"], rtol=1e-4, atol=1e-6)


def test_two_teachers_weigh_what_they_are_given() -> None:
    student, one, two = (tiny.causal_lm(seed=seed).eval() for seed in range(3))
    alone = [Objective({"kl": 1.0}, [name], [1.0], [1.5]) for name in ("a", "b")]
    losses = [
        Sequence(student, objective, {objective.teachers[0]: model}, vocab=WORDS)(**batch(rows()))[0]
        for objective, model in zip(alone, (one, two), strict=True)
    ]
    both = Objective({"kl": 1.0}, ["a", "b"], [3.0, 1.0], [1.5, 1.5])
    loss, _ = Sequence(student, both, {"b": two, "a": one}, vocab=WORDS)(**batch(rows()))
    torch.testing.assert_close(loss, (3 * losses[0] + losses[1]) / 4)


@pytest.mark.parametrize("how", ["online", "topk", "sampled"])
def test_training_brings_the_student_nearer(how: str, tmp_path: Path) -> None:
    teacher = tiny.causal_lm(seed=1)
    examples = masked(rows())
    if how != "online":
        examples = cached(examples, teacher, tmp_path / "cache", Layout(how, 12, WORDS))
    student = add_lora(tiny.causal_lm(), r=8, alpha=16, causal=True)
    objective = Objective({"kl": 1.0}, ["t"], [1.0], [1.0])
    method = Sequence(student, objective, {"t": teacher} if how == "online" else None, vocab=WORDS)
    judge = Sequence(student, objective, {"t": teacher}, vocab=WORDS)
    judged = {name: part for name, part in batch(examples, 24).items() if name != "beside"}

    def divergence() -> float:
        with torch.no_grad():
            return float(judge.eval()(**judged)[0].mean())

    before, started = divergence(), {name: p.clone() for name, p in teacher.named_parameters()}
    training = tiny.training(tmp_path, epochs=20, learning_rate=2e-2)
    history = fit(method, examples, np.arange(24), training, batch_rows=8, batch_tokens=64)
    assert divergence() < 0.85 * before
    assert all(math.isfinite(entry["kl/t"]) for entry in history["loss"])
    assert all(torch.equal(p, started[name]) for name, p in teacher.named_parameters())
    assert not teacher.training


@pytest.mark.parametrize("some", [False, True])
def test_own_words_stand_after_the_prompt_and_are_judged_without_ce(some: bool) -> None:
    student, teacher = tiny.causal_lm().eval(), tiny.causal_lm(seed=1).eval()
    method = Sequence(student, OBJECTIVE, {"t": teacher}, vocab=WORDS, on_policy=1.0, eos_id=2)
    examples = masked(rows()) if some else rows()
    given = batch(examples)
    seen: dict[str, Tensor] = {}
    hook = student.get_decoder().register_forward_pre_hook(
        lambda module, args, inputs: seen.update(inputs), with_kwargs=True
    )
    torch.manual_seed(5)
    loss, parts = method.train()(**given)
    hook.remove()
    assert list(parts) == ["on_policy/kl/t"]
    ids, lengths = given["inputs"]["input_ids"], given["inputs"]["attention_mask"].sum(-1)
    assert seen["input_ids"].shape == ids.shape
    for row in range(5):
        start = max(1, int(lengths[row]) // 2)
        end = int(seen["attention_mask"][row].sum())
        assert torch.equal(seen["input_ids"][row, :start], ids[row, :start])
        assert start < end <= lengths[row]
        assert end == lengths[row] or seen["input_ids"][row, end - 1] == 2
        own = seen["input_ids"][row : row + 1, :end]
        with torch.no_grad():
            p, q = (
                (model(own).logits[0, start - 1 : end - 1] / 2).softmax(-1) for model in (teacher, student)
            )
        expected = 4 * float((p * (p / q).log()).sum(-1).mean()) * 0.5
        assert float(loss[row].detach()) == pytest.approx(expected, rel=1e-3)


def test_a_share_of_batches_is_in_the_student_s_words() -> None:
    method = Sequence(
        tiny.causal_lm(), OBJECTIVE, {"t": tiny.causal_lm(seed=1)}, vocab=WORDS, on_policy=0.3, seed=4
    )
    turns = [method._own_turn() for _ in range(400)]
    assert 0.22 < sum(turns) / 400 < 0.38
    method.batches = 0
    assert [method._own_turn() for _ in range(400)] == turns, "the same on every rank"
    assert not any(method.eval()._own_turn() for _ in range(20))


def test_what_does_not_fit_together_is_refused() -> None:
    student, teacher = tiny.causal_lm(), tiny.causal_lm(seed=1)
    two = Objective({"kl": 1.0}, ["t", "u"], [1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ConfigError, match="teacher u is not online, but others are"):
        Sequence(student, two, {"t": teacher}, vocab=WORDS)
    with pytest.raises(ConfigError, match=r"on_policy = 0.5 needs online teachers"):
        Sequence(student, OBJECTIVE, vocab=WORDS, on_policy=0.5)
    with pytest.raises(ConfigError, match=r"on_policy = 1.5; give a share from 0 to 1"):
        Sequence(student, OBJECTIVE, {"t": teacher}, vocab=WORDS, on_policy=1.5)
    with pytest.raises(ConfigError, match=r"on_policy = 0.5 needs a term besides ce"):
        Sequence(student, Objective({"ce": 1.0}), {"t": teacher}, vocab=WORDS, on_policy=0.5)
    with pytest.raises(
        ConfigError, match="term jsd needs all the teacher's logits; a cache serves ce and kl"
    ):
        Sequence(student, Objective({"jsd": 1.0}, ["t"], [1.0], [1.0]), vocab=WORDS)
    with pytest.raises(ConfigError, match="teacher t is neither online nor in the batch"):
        Sequence(student, OBJECTIVE, vocab=WORDS)(**batch(rows()))


def test_bf16_computes_in_bf16() -> None:
    student, teacher = tiny.causal_lm(), tiny.causal_lm(seed=1)
    found, _ = Sequence(student, OBJECTIVE, {"t": teacher}, vocab=WORDS, precision="bf16")(**batch(rows()))
    exact, _ = Sequence(student, OBJECTIVE, {"t": teacher}, vocab=WORDS)(**batch(rows()))
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0.03)
    found.sum().backward()
    assert {p.grad.dtype for p in trainable(student).values()} == {torch.float32}  # type: ignore[union-attr]
