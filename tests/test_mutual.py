"""Peers: each one's gradient is that of its own loss, with the others' predictions as constants."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmkd.errors import ModelError
from llmkd.methods.mutual import Mutual
from llmkd.models.load import load_classifier
from llmkd.models.lora import add_lora, save_trained, trainable, trainable_state
from llmkd.models.pooling import class_logits
from llmkd.objective import HARD, Objective
from llmkd.train import dev_log_loss, fit

ALL = np.arange(24)


def peers(count: int = 3) -> dict[str, Any]:
    kinds = ["llama", "bert", "gemma2"][:count]
    return {f"p.{kind}": tiny.classifier(kind, seed).eval() for seed, kind in enumerate(kinds)}


def batch() -> dict[str, Any]:
    examples = tiny.examples().with_teachers(
        np.random.default_rng(0).normal(size=(24, 1, 3)).astype(np.float32)
    )
    return {
        **examples.batch(ALL, 24, 1.0)["batch"],
        "beside": {"p.bert": tiny.examples(seed=5).inputs(ALL)},
    }


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("objective", [HARD, Objective({"ce": 1.0, "kl": 2.0}, ["t"], [1.0], [3.0])])
def test_each_peer_has_the_gradient_of_its_own_plain_loss(count: int, objective: Objective) -> None:
    given, found = batch(), Mutual(peers(count), objective, 4.0, weight=0.7)
    loss, parts = found(**given)
    loss.mean().backward()
    plain, total = peers(count), torch.zeros(24)
    read = {name: given["beside"].get(name, given["inputs"]) for name in plain}
    with torch.no_grad():
        fixed = {name: class_logits(peer, **read[name]) for name, peer in plain.items()}
    for name, peer in plain.items():
        logits = class_logits(peer, **read[name])
        own, _ = objective(logits, given["labels"], given["teacher_logits"])
        for other, z in fixed.items():
            if other != name:
                p, log_q = (z / 4).softmax(-1), (logits / 4).log_softmax(-1)
                own = own + 0.7 * 16 * (p * (p.log() - log_q)).sum(-1) / (count - 1)
        own.mean().backward()
        total = total + own.detach()
        for key, parameter in found.peers[name].named_parameters():
            expected = peer.get_parameter(key).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")
        assert {f"{name}/ce", f"{name}/mutual"} <= set(parts)
    torch.testing.assert_close(loss, total)


def test_all_peers_end_where_the_first_was_best(tmp_path: Path) -> None:
    """Also an adapter beside a peer that learns in full."""
    both = {"a": add_lora(tiny.classifier(), r=4, alpha=8), "b": tiny.classifier("bert", 1)}
    method, examples, states = Mutual(both, HARD), tiny.examples(), list[Any]()
    start = trainable_state(method)
    assert {name.split(".")[0] for name in start} == {"student", "others"}
    settings = {"epochs": 6, "learning_rate": 3e-2, "schedule": "constant"}
    step = torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.optim.AdamW,
            "step",
            lambda self, *a, **k: (step(self, *a, **k), states.append(trainable_state(method)))[0],
        )
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
    losses = [entry["dev_log_loss"] for entry in history["dev"]]
    best = losses.index(min(losses))
    assert best < len(losses) - 1, "the test needs a run that overfits"
    torch.testing.assert_close(trainable_state(method), states[best], rtol=0, atol=0)
    assert dev_log_loss(both["a"], examples, ALL[16:], 64, "fp32") == pytest.approx(history["best"], abs=1e-6)
    assert set(trainable(method)) == set(start)


def test_peers_are_saved_each_on_its_own(tmp_path: Path) -> None:
    both = {"a": tiny.classifier(), "b": tiny.classifier("bert", 1)}
    fit(
        Mutual(both, HARD),
        tiny.examples(),
        ALL,
        tiny.training(tmp_path),
        batch_rows=8,
        batch_tokens=64,
        gradient_checkpointing=True,
    )
    for name, peer in both.items():
        assert peer.is_gradient_checkpointing
        save_trained(peer, trainable_state(peer), tmp_path / name)
        again = load_classifier(str(tmp_path / name), tiny.LABELS, load_in="fp32", pad_id=0).eval()
        inputs = tiny.examples().inputs(ALL)
        torch.testing.assert_close(class_logits(again, **inputs), class_logits(peer.eval(), **inputs))


def test_one_peer_alone_is_refused() -> None:
    with pytest.raises(ModelError, match=r"mutual learning among \['p.llama'\]: add a peer"):
        Mutual(peers(1), HARD)
