"""Cached with two heads; teachers that run beside the student against their cached logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from torch import Tensor, nn

from llmkd.errors import ModelError
from llmkd.losses import ce, kl
from llmkd.methods.cached import Cached
from llmkd.methods.online import Online
from llmkd.models.load import load_classifier
from llmkd.models.lora import add_lora, save_trained, trainable, trainable_state
from llmkd.models.pooling import class_logits
from llmkd.objective import Objective
from llmkd.train import fit, predict

ALL = np.arange(24)
TERMS = {"ce": 1.0, "kl": 1.0, "cosine": 0.5}


def objective(*names: str) -> Objective:
    return Objective(TERMS, names, [1.0, 0.5, 2.0][: len(names)], [2.0, 1.0, 3.0][: len(names)])


def batch(examples: Any, rows: Any = ALL) -> dict[str, Any]:
    found: dict[str, Any] = examples.batch(rows, len(rows), 1.0)["batch"]
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hard, self.soft = nn.Linear(4, 3), nn.Linear(4, 3)

    def head_logits(self, numbers: Tensor) -> dict[str, Tensor]:
        return {"hard": self.hard(numbers), "soft": self.soft(numbers)}


def test_hard_labels_go_to_the_hard_head_and_teachers_to_the_soft_one() -> None:
    torch.manual_seed(0)
    net, numbers = TwoHeads(), torch.randn(5, 4)
    labels, teachers = torch.tensor([0, 1, 2, 0, 1]), torch.randn(5, 1, 3)
    method = Cached(net, Objective({"ce": 1.0, "kl": 1.0}, ["t"], [1.0], [2.0], normalize=False))
    loss, parts = method({"numbers": numbers}, labels, teachers, beside={"other": {}})
    torch.testing.assert_close(parts["ce"], ce(net.hard(numbers), labels))
    torch.testing.assert_close(loss, parts["ce"] + kl(net.soft(numbers), teachers[:, 0], 2.0))
    parts["ce"].sum().backward()
    assert set(gradients(net)) == {"hard.weight", "hard.bias"}


def test_running_teachers_give_the_loss_and_gradient_of_their_cached_logits() -> None:
    """In another architecture, in training mode with dropout, and beside one that is only in the cache."""
    teachers = {"l.1": tiny.classifier("llama", 1), "b": tiny.classifier("bert", 2, hidden_dropout_prob=0.5)}
    examples = tiny.examples()
    cached = np.stack([predict(teacher, examples, ALL, 10_000) for teacher in teachers.values()], axis=1)
    third = np.random.default_rng(0).normal(size=(24, 1, 3)).astype(np.float32)
    examples = examples.with_teachers(np.concatenate([cached, third], axis=1))
    terms, students = objective("l.1", "b", "gbm"), [tiny.classifier("gemma2") for _ in range(2)]
    methods = [Online(students[0], terms, teachers), Cached(students[1], terms)]
    found = []
    for method in methods:
        loss, parts = method.train()(**batch(examples))
        loss.mean().backward()
        found.append((loss, parts))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    expected = gradients(students[1])
    torch.testing.assert_close(gradients(students[0]), expected, rtol=1e-5, atol=1e-6)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    assert not any(gradients(teacher) for teacher in teachers.values())


def test_a_running_teacher_in_nf4_teaches_as_its_cached_logits_do(tmp_path: Path) -> None:
    tiny.classifier(seed=1).save_pretrained(tmp_path)
    teacher = load_classifier(str(tmp_path), tiny.LABELS, load_in="nf4", pad_id=0)
    assert "Linear4bit" in {type(module).__name__ for module in teacher.modules()}
    examples = tiny.examples()
    cached = predict(teacher, examples, ALL, 10_000)[:, None]  # (24, 1, 3)
    students = [tiny.classifier("gemma2") for _ in range(2)]
    beside = Online(students[0], objective("t"), {"t": teacher}).train()
    losses = [beside(**batch(examples))[0]]
    losses.append(Cached(students[1], objective("t")).train()(**batch(examples.with_teachers(cached)))[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    for loss in losses:
        loss.mean().backward()
    torch.testing.assert_close(gradients(students[0]), gradients(students[1]), rtol=1e-3, atol=1e-4)
    assert not gradients(teacher)


def test_a_teacher_reads_its_own_tokens() -> None:
    student, teacher, examples = tiny.classifier(), tiny.classifier(seed=1), tiny.examples()
    other = tiny.examples(seed=5).inputs(ALL)
    _, parts = Online(student, objective("t"), {"t": teacher})(**batch(examples), beside={"t": other})
    logits = [class_logits(student, **examples.inputs(ALL)), class_logits(teacher, **other)]
    torch.testing.assert_close(parts["kl/t"], kl(*logits, 2.0))


def test_a_teacher_stays_frozen_in_evaluation_mode_and_in_its_own_dtype(tmp_path: Path) -> None:
    teacher = tiny.classifier(seed=1).bfloat16()
    method = Online(add_lora(tiny.classifier(), r=2, alpha=4), objective("t"), {"t": teacher})
    method.train()
    assert method.student.training
    assert not any(module.training for module in teacher.modules())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    start = trainable_state(method)
    assert all(name.startswith("student.") for name in start)
    history = fit(method, tiny.examples(), ALL, tiny.training(tmp_path), batch_rows=8, batch_tokens=64)
    assert "cosine/t" in history["loss"][0]
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
    moved = trainable(method)
    assert all(not torch.equal(moved[name], tensor) for name, tensor in start.items())


def test_an_adapter_learnt_beside_its_teacher_is_saved_alone(tmp_path: Path) -> None:
    student, inputs = add_lora(tiny.classifier(), r=2, alpha=4), tiny.examples().inputs(ALL)
    method = Online(student, objective("t"), {"t": tiny.classifier(seed=1)})
    fit(method, tiny.examples(), ALL, tiny.training(tmp_path), batch_rows=8, batch_tokens=64)
    save_trained(student, trainable_state(student), tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny.classifier(), str(tmp_path / "adapter"))
    torch.testing.assert_close(class_logits(again, **inputs), class_logits(student.eval(), **inputs))


def test_a_teacher_neither_here_nor_cached_is_refused() -> None:
    method = Online(tiny.classifier(), objective("t", "gbm"), {"t": tiny.classifier(seed=1)})
    with pytest.raises(ModelError, match="teacher gbm neither runs beside the student nor has cached logits"):
        method(**batch(tiny.examples()))
