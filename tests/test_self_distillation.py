"""Self-distillation: its formula, what is detached, and what it trains and keeps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmkd.methods.self_distillation import SelfDistillation
from llmkd.models.exits import exit_logits, load_exits, save_exits
from llmkd.models.lora import add_lora, trainable_state
from llmkd.objective import HARD, Objective
from llmkd.train import fit

ALL = np.arange(24)


def student(architecture: str = "llama") -> Any:
    return tiny.classifier(architecture, num_hidden_layers=4)


def batch() -> dict[str, Any]:
    examples = tiny.examples().with_teachers(
        np.random.default_rng(0).normal(size=(24, 1, 3)).astype(np.float32)
    )
    found: dict[str, Any] = examples.batch(ALL, 24, 1.0)["batch"]
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("objective", [HARD, Objective({"ce": 1.0, "kl": 1.0}, ["t"], [1.0], [2.0])])
def test_the_loss_and_the_gradient_are_the_formula_s(architecture: str, objective: Objective) -> None:
    """(Σ CE + objective) / M + T² Σ KL / (M - 1), each with its weight; the deepest is not taught back."""
    given, method = (
        batch(),
        SelfDistillation(student(architecture), objective, [1, 2, 3], 3.0, hard=0.5, soft=2),
    )
    method.eval()
    loss, parts = method(**given)
    loss.mean().backward()
    found = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    deepest, shallow = exit_logits(method.student, method.exits, **given["inputs"])
    rows, labels = torch.arange(24), given["labels"]
    expected, _ = objective(deepest, labels, given["teacher_logits"])
    expected, p = 0.5 * expected / 4, (deepest.detach() / 3).softmax(-1)
    for depth, z in shallow.items():
        hard = -z.log_softmax(-1)[rows, labels]
        soft = 9 * (p * (p.log() - (z / 3).log_softmax(-1))).sum(-1)
        torch.testing.assert_close(parts[f"exit{depth}/ce"], hard)
        torch.testing.assert_close(parts[f"exit{depth}/kl"], soft, rtol=1e-4, atol=1e-5)
        expected = expected + 0.5 * hard / 4 + 2 * soft / 3
    torch.testing.assert_close(loss, expected)
    expected.mean().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, method.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    assert {f"exits.{depth}.weight" for depth in (1, 2, 3)} < set(found)


def test_the_deepest_head_gets_nothing_from_the_shallow_ones() -> None:
    method = SelfDistillation(student(), HARD, [2], hard=0.0).eval()
    method(**batch())[0].mean().backward()
    gradient = method.student.score.weight.grad
    assert gradient is None or not gradient.any()
    assert bool(method.exits["2"].weight.grad.any())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for on in (False, True):
        method = SelfDistillation(student("gemma2"), HARD, [1, 3]).train()
        if on:
            method.student.gradient_checkpointing_enable({"use_reentrant": False})
        method(**batch())[0].mean().backward()
        found.append({name: p.grad for name, p in method.named_parameters()})
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("lora", [False, True])
def test_heads_are_trained_in_full_kept_at_the_best_and_read_again(lora: bool, tmp_path: Path) -> None:
    model, examples = student("llama"), tiny.examples()
    method = SelfDistillation(add_lora(model, r=4, alpha=8) if lora else model, HARD, [1, 2, 3])
    start = trainable_state(method.exits)
    settings = {"epochs": 6, "learning_rate": 3e-2, "schedule": "constant"}
    history = fit(
        method,
        examples,
        ALL[:16],
        tiny.training(tmp_path, **settings),
        dev=ALL[16:],
        evaluations=2,
        batch_rows=8,
        batch_tokens=64,
    )
    assert {"exit1/ce", "exit3/kl", "ce"} <= set(history["loss"][0])
    assert history["best"] < history["dev"][-1]["dev_log_loss"], "the test needs a run that overfits"
    assert all(not torch.equal(tensor, start[name]) for name, tensor in trainable_state(method.exits).items())
    method.eval()
    before = exit_logits(method.student, method.exits, **examples.inputs(ALL))
    save_exits(method.exits, tmp_path)
    for depth, state in load_exits(tmp_path).items():
        method.exits[str(depth)].reset_parameters()
        method.exits[str(depth)].load_state_dict(state)
    after = exit_logits(method.student, method.exits, **examples.inputs(ALL))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
