"""Hidden states compared through a projection: the formula, the mask, the pooled vector, what is trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from llmkd.errors import ModelError
from llmkd.methods.feature import Feature
from llmkd.models.load import load_classifier
from llmkd.models.lora import add_lora, trainable, trainable_state
from llmkd.models.pooling import class_logits
from llmkd.objective import HARD, Objective
from llmkd.train import fit

ALL = np.arange(6)
SOFT = Objective({"ce": 1.0, "kl": 2.0}, ["t"], [1.0], [2.0])


def student(architecture: str = "llama", **settings: Any) -> Any:
    return tiny.classifier(architecture, num_hidden_layers=2, hidden_dropout_prob=0, **settings)


def teacher(architecture: str = "llama", **settings: Any) -> Any:
    return tiny.classifier(architecture, 1, num_hidden_layers=3, hidden_size=48, head_dim=24, **settings)


def batch(**more: Any) -> dict[str, Any]:
    return {**tiny.examples(6).batch(ALL, 6, 1.0)["batch"], **more}


def states(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """By transformers' own forward, one row at a time, so without padding."""
    rows = [int(mask.sum()) for mask in inputs["attention_mask"]]
    with torch.no_grad():
        return tuple(
            model.base_model(inputs["input_ids"][i : i + 1, :length], output_hidden_states=True).hidden_states
            for i, length in enumerate(rows)
        )


def distance(one: Tensor, two: Tensor, how: str) -> Tensor:
    """The mean over tokens of 1 - cos, or of the squared distance of unit vectors, which is its double."""
    cosines = (one * two).sum(-1) / (one.norm(dim=-1) * two.norm(dim=-1))
    return (1 - cosines).mean() * (2 if how == "mse" else 1)


@pytest.mark.parametrize("how", ["mse", "cosine"])
@pytest.mark.parametrize("at", ["tokens", "pooled"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_loss_is_the_objective_and_the_mean_over_pairs(kind: str, at: Any, how: Any) -> None:
    """Where rows are padded, a row has the loss it has alone."""
    mine, theirs, pairs = student(kind).eval(), teacher(kind).eval(), [("t", 3, 2), ("t", 0, 1)]
    method = Feature(mine, SOFT, {"t": theirs}, pairs, 0.7, how, at=at).eval()
    given = batch()
    with torch.no_grad():
        loss, parts = method(**given)
        logits = [class_logits(model, **given["inputs"]) for model in (mine, theirs)]
        expected = SOFT(logits[0], given["labels"], logits[1].unsqueeze(1))[0]
        own, other = states(mine, given["inputs"]), states(theirs, given["inputs"])
        last = -1 if kind == "llama" else 0
        for projector, (_, layer, to) in zip(method.projectors, pairs, strict=True):
            kept = slice(None) if at == "tokens" else [last]
            rows = [
                distance(projector(a[to][0, kept]), b[layer][0, kept], how)
                for a, b in zip(own, other, strict=True)
            ]
            torch.testing.assert_close(
                parts[f"hidden/t/{layer}-{to}"], torch.stack(rows), rtol=1e-4, atol=1e-5
            )
            expected = expected + 0.7 * torch.stack(rows) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_only_the_student_and_the_projectors_learn(tmp_path: Path) -> None:
    adapted, theirs = add_lora(student(), r=2, alpha=4), teacher()
    method = Feature(adapted, SOFT, {"t": theirs}, [("t", 2, 1)])
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    history = fit(method, tiny.examples(6), ALL, tiny.training(tmp_path), batch_rows=3, batch_tokens=64)
    assert "hidden/t/2-1" in history["loss"][0]
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainable(method))
    assert {name.split(".")[0] for name in moved} == {"student", "projectors"}


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for on in (False, True):
        mine = student()
        if on:
            mine.gradient_checkpointing_enable({"use_reentrant": False})
        method = Feature(mine, HARD, {"t": teacher()}, [("t", 2, 1)]).train()
        method(**batch())[0].mean().backward()
        found.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1])


def test_cached_logits_come_before_those_of_the_running_teacher() -> None:
    logits, method = torch.randn(6, 1, 3), Feature(student(), SOFT, {"t": teacher()}, [("t", 2, 1)])
    _, parts = method(**batch(teacher_logits=logits))
    own = class_logits(method.student, **batch()["inputs"])
    torch.testing.assert_close(parts["kl/t"], SOFT(own, batch()["labels"], logits)[1]["kl/t"])


def test_projectors_are_drawn_from_the_seed_alone() -> None:
    mine, theirs = student(), teacher()

    def drawn(seed: int) -> dict[str, Tensor]:
        return trainable_state(Feature(mine, HARD, {"t": theirs}, [("t", 2, 1)], seed=seed).projectors)

    first = drawn(3)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    torch.testing.assert_close(drawn(3), first, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before), "what is drawn afterwards is as without it"
    assert not torch.equal(drawn(4)["0.weight"], first["0.weight"])


def test_a_student_is_saved_without_its_projectors(tmp_path: Path) -> None:
    method = Feature(student(), HARD, {"t": teacher()}, [("t", 2, 1)])
    inputs = batch()["inputs"]
    fit(method, tiny.examples(6), ALL, tiny.training(tmp_path), batch_rows=3, batch_tokens=64)
    method.student.save_pretrained(tmp_path / "student")
    again = load_classifier(str(tmp_path / "student"), tiny.LABELS, load_in="fp32", pad_id=0)
    torch.testing.assert_close(class_logits(again, **inputs), class_logits(method.student.eval(), **inputs))


def test_other_tokens_can_only_be_compared_pooled() -> None:
    other = tiny.examples(6, seed=5).inputs(ALL)
    sizes = [tuple(inputs["input_ids"].shape) for inputs in (other, batch()["inputs"])]
    with pytest.raises(ModelError) as raised:
        Feature(student(), HARD, {"t": teacher()}, [("t", 2, 1)])(**batch(beside={"t": other}))
    assert str(raised.value) == (
        f"features: teacher t and the student (llama) read other tokens, {sizes[0]} and {sizes[1]}; "
        "compare them pooled, or give both one tokenizer"
    )
    loss, _ = Feature(student(), HARD, {"t": teacher()}, [("t", 2, 1)], at="pooled")(
        **batch(beside={"t": other})
    )
    assert bool(loss.isfinite().all())


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no pairs of layers; name at least one"),
        ([("x", 1, 1)], r"no teacher 'x'; there are \['t'\]"),
        ([("t", 4, 1)], r"teacher t has no layer 4; choose 0 \(embeddings\) to 3, its last"),
        ([("t", 3, 3)], r"the student has no layer 3; choose 0 \(embeddings\) to 2, its last"),
        ([("t", 1, -1)], "the student has no layer -1; choose 0"),
    ],
)
def test_a_layer_that_does_not_exist_is_refused_at_once(pairs: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Feature(student(), HARD, {"t": teacher()}, pairs)


def test_a_net_without_hidden_states_is_refused() -> None:
    with pytest.raises(
        ModelError, match="the student is no transformer with hidden states; use method: online"
    ):
        Feature(torch.nn.Linear(1, 1), HARD, {"t": teacher()}, [("t", 1, 1)])
