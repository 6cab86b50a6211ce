"""The loss without the logits: values and gradients of the plain formula, whatever the chunk."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from llmkd import chunked, closed_form
from llmkd.chunked import chunked_loss
from llmkd.errors import ModelError
from llmkd.layout import Layout
from llmkd.models.head import Head, head_of, hidden_states, predicting_states, target_mask, with_heads
from llmkd.objective import Objective
from llmkd.sparse import choose, sparse_kl

N, WORDS, PADDED = 13, 37, 40
BOTH = Objective({"ce": 1.0, "kl": 0.5}, ["a", "b"], [1.0, 0.7], [1.0, 2.0])


@pytest.fixture(autouse=True)
def _wide() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def case(softcap: float | None = None, teachers: int = 2) -> tuple[Tensor, Head, Tensor, list[Any]]:
    hidden = torch.randn(N, 8, requires_grad=True)
    head = Head(torch.randn(PADDED, 8, requires_grad=True), softcap, WORDS)
    others = [(torch.randn(N, 6), Head(torch.randn(WORDS + i, 6), softcap, WORDS)) for i in range(teachers)]
    return hidden, head, torch.randint(WORDS, (N,)), others


def plain(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """Whole logits over the real words alone."""
    logits = (hidden @ weight.T)[:, :WORDS]
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def gradients(loss: Tensor, hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [hidden, head.weight])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 5, 13, 99])
@pytest.mark.parametrize("tokens", [2, 99])
def test_ce_and_kl_by_their_formulas(
    tokens: int, chunk: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokens: at a pass over their words."""
    monkeypatch.setattr(closed_form, "WIDE", tokens * WORDS)
    hidden, head, targets, teachers = case(softcap)
    loss, parts = chunked_loss(hidden, head, targets, BOTH, teachers, chunk=chunk)
    logits = plain(hidden, head.weight, softcap)
    expected = -logits.log_softmax(-1)[torch.arange(N), targets]
    torch.testing.assert_close(parts["ce"], expected.detach(), rtol=1e-9, atol=0)
    for (state, of), weight, t in zip(teachers, (1.0, 0.7), (1.0, 2.0), strict=True):
        log_p = (plain(state, of.weight, softcap) / t).log_softmax(-1)
        divergence = (log_p.exp() * (log_p - (logits / t).log_softmax(-1))).sum(-1)
        expected = expected + 0.5 * weight * t**2 * divergence
    expected = expected / (1 + 0.5 * 1.7)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    found, wanted = gradients(loss.mean(), hidden, head), gradients(expected.mean(), hidden, head)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)
    assert (found[1][WORDS:] == 0).all(), "rows that pad the vocabulary have no gradient"


def test_in_bf16_the_head_s_gradient_comes_by_parts_to_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_default_dtype(torch.float32)
    hidden, head, targets, teachers = case()
    narrow = hidden.detach().bfloat16().requires_grad_()
    said = [(state.bfloat16(), of) for state, of in teachers]
    found = []
    for tall in (chunked.TALL, 5 * head.weight.shape[1]):
        monkeypatch.setattr(chunked, "TALL", tall)
        loss, _ = chunked_loss(narrow, head, targets, BOTH, said, chunk=4)
        found.append(gradients(loss.mean(), narrow, head))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    loss, _ = chunked_loss(hidden, head, targets, BOTH, teachers)
    wanted = gradients(loss.mean(), hidden, head)
    for one, other in zip(found[0], wanted, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=0.03 * float(other.abs().max()))


@pytest.mark.parametrize("term", ["kl", "reverse_kl", "jsd", "skew_kl", "tvd", "mse", "cosine", "dkd"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("weighting", ["fixed", "entropy"])
def test_every_divergence_is_the_objective_over_whole_logits(
    term: str, softcap: float | None, weighting: str
) -> None:
    objective = Objective({"ce": 0.3, term: 1.0}, ["a", "b"], [1.0, 0.7], [1.0, 2.0], weighting=weighting)
    hidden, head, targets, teachers = case(softcap)
    loss, parts = chunked_loss(hidden, head, targets, objective, teachers, chunk=4)
    stacked = torch.stack([plain(state, of.weight, softcap) for state, of in teachers], 1)
    expected, named = objective(plain(hidden, head.weight, softcap), targets, stacked)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert parts.keys() == named.keys()
    for name, part in parts.items():
        torch.testing.assert_close(part, named[name].detach(), rtol=1e-5, atol=1e-12)
    found, wanted = gradients(loss.sum(), hidden, head), gradients(expected.sum(), hidden, head)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("promised", [None, "right", "wrong"])
def test_tokens_may_weigh_anything_whatever_was_promised(promised: str | None) -> None:
    hidden, head, targets, teachers = case()
    weights = torch.rand(N)
    weights[3] = 0
    told = {None: None, "right": 7 * weights, "wrong": weights.flip(0)}[promised]
    loss, _ = chunked_loss(hidden, head, targets, BOTH, teachers, weights=told, chunk=4)
    stacked = torch.stack([plain(state, of.weight, None) for state, of in teachers], 1)
    wanted, _ = BOTH(plain(hidden, head.weight, None), targets, stacked)
    found = gradients((loss * weights).sum(), hidden, head)
    torch.testing.assert_close(
        found, gradients((wanted * weights).sum(), hidden, head), rtol=1e-9, atol=1e-14
    )


@pytest.mark.parametrize("promised", [True, False])
def test_a_head_cut_up_before_backward_is_refused_where_it_is_needed(promised: bool) -> None:
    """As ZeRO-3 leaves it between the modules' own calls."""
    hidden, head, targets, teachers = case()
    weights = torch.rand(N)
    told = weights if promised else None
    loss, _ = chunked_loss(hidden, head, targets, BOTH, teachers, weights=told, chunk=4)
    expected = None if not promised else gradients((loss * weights).sum(), hidden, head)
    loss, _ = chunked_loss(hidden, head, targets, BOTH, teachers, weights=told, chunk=4)
    teachers[0][1].weight.data = torch.empty(0)
    if expected:
        torch.testing.assert_close(gradients((loss * weights).sum(), hidden, head), expected)
    else:
        with pytest.raises(ModelError, match="weigh otherwise than promised"):
            gradients((loss * weights).sum(), hidden, head)


def test_a_tied_head_has_the_gradient_of_both_its_uses() -> None:
    _, _, targets, teachers = case()
    table = torch.randn(PADDED, 8, requires_grad=True)
    words = torch.randint(WORDS, (N,))
    loss, _ = chunked_loss(table[words].tanh(), Head(table, None, WORDS), targets, BOTH, teachers, chunk=4)
    stacked = torch.stack([plain(state, of.weight, None) for state, of in teachers], 1)
    wanted, _ = BOTH(plain(table[words].tanh(), table, None), targets, stacked)
    found = torch.autograd.grad(loss.mean(), table)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.mean(), table), rtol=1e-9, atol=1e-14)


def test_a_frozen_head_and_evaluation_make_no_gradient() -> None:
    hidden, head, targets, teachers = case()
    frozen = Head(head.weight.detach(), None, WORDS)
    loss, _ = chunked_loss(hidden, frozen, targets, BOTH, teachers, chunk=4)
    free, _ = chunked_loss(hidden, head, targets, BOTH, teachers, chunk=4)
    (found,) = torch.autograd.grad(loss.sum(), hidden)
    torch.testing.assert_close(found, gradients(free.sum(), hidden, head)[0])
    with torch.no_grad():
        quiet, _ = chunked_loss(hidden, head, targets, BOTH, teachers, chunk=4)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, free.detach())


def test_a_second_backward_is_refused() -> None:
    hidden, head, targets, teachers = case()
    loss, _ = chunked_loss(hidden, head, targets, BOTH, teachers)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.sum().backward()


@pytest.mark.parametrize("how", ["topk", "sampled"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("degrees", [(1.0, 1.0), (1.0, 2.0), (2.0, 2.0)])
@pytest.mark.parametrize("hard", [0.3, 0.0])
def test_cached_teachers_by_their_formula(
    how: Any,
    softcap: float | None,
    degrees: tuple[float, float],
    hard: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(closed_form, "WIDE", 2 * WORDS)
    hidden, head, targets, teachers = case(softcap)
    logits, cached = plain(hidden, head.weight, softcap), []
    for (state, of), t in zip(teachers, degrees, strict=True):
        layout = Layout(how, 5, WORDS, 32, temperature=t)
        cached.append(choose(plain(state, of.weight, softcap), layout, torch.Generator().manual_seed(1)))
    terms = {"ce": hard, "kl": 0.5} if hard else {"kl": 0.5}
    objective = Objective(terms, ["a", "b"], [1.0, 0.7], degrees)
    loss, parts = chunked_loss(hidden, head, targets, objective, cached, chunk=5)
    expected = -hard * logits.log_softmax(-1)[torch.arange(N), targets]
    for name, one, weight, t in zip("ab", cached, (1.0, 0.7), degrees, strict=True):
        divergence = sparse_kl(logits, one, t)
        torch.testing.assert_close(parts[f"kl/{name}"], divergence.detach(), rtol=1e-9, atol=1e-12)
        expected = expected + 0.5 * weight * divergence
    expected = expected / (hard + 0.5 * 1.7)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    found, wanted = gradients(loss.mean(), hidden, head), gradients(expected.mean(), hidden, head)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-14)


def test_a_cache_of_no_weight_is_left_alone() -> None:
    """As an ablation has it, with kl: 0."""
    hidden, head, targets, teachers = case()
    cached = choose(plain(teachers[0][0], teachers[0][1].weight, None), Layout("topk", 5, WORDS, 32))
    objective = Objective({"ce": 2.0}, ["a"], [1.0], [1.0])
    loss, parts = chunked_loss(hidden, head, targets, objective, [cached], chunk=4)
    expected = -plain(hidden, head.weight, None).log_softmax(-1)[torch.arange(N), targets]
    torch.testing.assert_close(loss, expected)
    assert parts.keys() == {"ce"}


@pytest.mark.parametrize("k", [5, WORDS])
def test_a_cached_teacher_learns_in_chunks_as_in_one(k: int) -> None:
    hidden, head, targets, teachers = case(3.0, teachers=1)
    objective = Objective({"ce": 1.0, "kl": 2.0}, ["a"], [1.0], [2.0])
    layout = Layout("topk", k, WORDS, 32, temperature=2.0)
    cached = choose(plain(teachers[0][0], teachers[0][1].weight, 3.0), layout)
    loss, parts = chunked_loss(hidden, head, targets, objective, [cached], chunk=4)
    whole, _ = chunked_loss(hidden, head, targets, objective, [cached], chunk=99)
    torch.testing.assert_close(gradients(loss.sum(), hidden, head), gradients(whole.sum(), hidden, head))
    online, online_parts = chunked_loss(hidden, head, targets, objective, teachers, chunk=4)
    same = torch.allclose(parts["kl/a"], online_parts["kl/a"], rtol=1e-9)
    assert same == (k == WORDS), "with all words kept the cache is the teacher"
    if k == WORDS:
        loss, _ = chunked_loss(hidden, head, targets, objective, [cached], chunk=4)
        found, wanted = gradients(loss.sum(), hidden, head), gradients(online.sum(), hidden, head)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)


def test_bf16_states_give_float32_losses() -> None:
    hidden, head, targets, teachers = case()
    objective = Objective({"ce": 1.0, "kl": 1.0}, ["a", "b"], [1.0, 0.7], [1.0, 2.0])
    half = [(state.bfloat16(), of) for state, of in teachers]
    loss, _ = chunked_loss(hidden.bfloat16(), head, targets, objective, half, chunk=4)
    exact, _ = chunked_loss(hidden, head, targets, objective, teachers, chunk=4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=0.05, atol=0.05)
    found, wanted = gradients(loss.sum(), hidden, head), gradients(exact.sum(), hidden, head)
    assert {grad.dtype for grad in found} == {torch.float64}, "the parameters' own"
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.03


def test_vocabularies_that_differ_are_refused() -> None:
    hidden, head, targets, _ = case()
    other = [(torch.randn(N, 6), Head(torch.randn(50, 6), None, 50))]
    objective = Objective({"kl": 1.0}, ["a"], [1.0], [1.0])
    with pytest.raises(ModelError, match="student's head has 37 words, a teacher's 50; name teachers"):
        chunked_loss(hidden, head, targets, objective, other)
    with pytest.raises(ModelError, match="target 38 is beyond the 37 words"):
        chunked_loss(hidden, head, targets.fill_(38), Objective({"ce": 1.0}))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_s_states_and_head_make_its_logits(architecture: str, tied: bool) -> None:
    model = tiny.causal_lm(architecture, tie_word_embeddings=tied).double().eval()
    inputs = tiny.examples().inputs(torch.arange(4).numpy())
    with torch.no_grad():
        expected = model(**inputs).logits
        found = head_of(model).logits(hidden_states(model, inputs))
    torch.testing.assert_close(found, expected)
    assert (head_of(model).softcap is not None) == (architecture == "gemma2")


def test_states_stand_before_real_targets_and_no_others() -> None:
    model = tiny.causal_lm().double().eval()
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 0], [0, 0, 9, 10, 11]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]),
    }
    real = target_mask(inputs)
    assert inputs["input_ids"][:, 1:][real].tolist() == [6, 7, 8, 10, 11]
    marked = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 0, 1]]).bool()
    assert inputs["input_ids"][:, 1:][target_mask(inputs, marked)].tolist() == [8, 11]
    with torch.no_grad():
        states = predicting_states(model, inputs, real, "fp32")
        torch.testing.assert_close(states[:3], hidden_states(model, inputs)[0, :3])


def test_bodies_run_inside_every_head_and_leave_them_as_they_were() -> None:
    models = [tiny.causal_lm(seed=seed).double() for seed in (0, 1)]
    seen: list[int] = []
    for i, model in enumerate(models):
        model.lm_head.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
    hidden = torch.randn(2, 32)
    assert with_heads(models, hidden, lambda: (seen.append(9), "done")[1]) == "done"
    assert seen == [0, 1, 9]
    with pytest.raises(ZeroDivisionError):
        with_heads(models, hidden, lambda: 1 / 0)
    assert all(model.lm_head(hidden).shape == (2, 64) for model in models)


def test_a_head_that_is_no_plain_matrix_is_refused() -> None:
    model = tiny.causal_lm()
    with pytest.raises(ModelError, match="its head has 64 rows for 65 tokens; resize it"):
        head_of(model, 65)
    model.lm_head = torch.nn.Linear(32, 64, bias=True)
    with pytest.raises(ModelError, match="the head is no plain matrix"):
        head_of(model)
