"""The training step: its gradient, its schedule, its log, the best checkpoint; and inference."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from llmkd import train
from llmkd.errors import DataError, ModelError
from llmkd.methods.cached import Cached
from llmkd.methods.feature import Feature
from llmkd.methods.next_token import WholeLogits, next_token
from llmkd.methods.online import Online
from llmkd.methods.sequence import Sequence
from llmkd.models.lora import add_lora, trainable, trainable_state
from llmkd.objective import HARD, Objective
from llmkd.train import dev_log_loss, fit, predict

ALL = np.arange(24)


def run(
    directory: Path, method: nn.Module, examples: Any, rows: Any = ALL, *, settings: Any = None, **more: Any
) -> dict[str, Any]:
    arguments = tiny.training(directory, **(settings or {}))
    return fit(method, examples, rows, arguments, **{"batch_rows": 8, "batch_tokens": 64, **more})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("batch_tokens", [8, 60, 10_000])
def test_a_step_s_gradient_is_the_full_batch_s(
    batch_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the micro-batches, what the optimizer sees is the gradient of the rows' mean loss."""
    model, examples = tiny.classifier(), tiny.examples(10)
    plain = tiny.classifier()
    logits = torch.cat([plain(**examples.inputs(np.array([row]))).logits for row in range(10)])
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(examples.labels)).backward()
    seen: list[dict[str, Tensor]] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **k: (seen.append(gradients(model)), step(self, *a, **k))[1],
    )
    history = run(
        tmp_path,
        Cached(model, HARD),
        examples,
        np.arange(10),
        settings={"clip": 1e9},
        batch_rows=10,
        batch_tokens=batch_tokens,
    )
    assert len(seen) == history["steps"] == 1
    expected = gradients(plain)
    assert set(seen[0]) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_logged_loss_is_the_rows_mean(tmp_path: Path) -> None:
    model, examples = tiny.classifier(), tiny.examples()
    expected = dev_log_loss(model, examples, ALL, 64, "fp32")
    history = run(tmp_path, Cached(model, HARD), examples, batch_rows=24)
    assert history["loss"][0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_every_term_is_logged_and_they_add_up_to_the_loss(tmp_path: Path) -> None:
    examples = tiny.examples().with_teachers(
        np.random.default_rng(1).normal(size=(24, 2, 3)).astype(np.float32)
    )
    terms = {"ce": 1.0, "kl": 0.5, "cosine": 2.0}
    objective = Objective(terms, ["x", "y"], [1.0, 3.0], [1.0, 2.0])
    history = run(tmp_path, Cached(tiny.classifier(), objective), examples, batch_tokens=40)
    assert len(history["loss"]) == 3
    for entry in history["loss"]:
        soft = sum(
            weight * terms[term] * entry[f"{term}/{name}"]
            for term in ("kl", "cosine")
            for name, weight in (("x", 1.0), ("y", 3.0))
        )
        assert entry["loss"] == pytest.approx((entry["ce"] + soft) / (1 + 2.5 * 4), abs=2e-5)


def test_the_student_ends_at_its_best_development_log_loss(tmp_path: Path) -> None:
    model, examples = tiny.classifier(), tiny.examples()
    fitted, held = np.arange(16), np.arange(16, 24)
    history = run(
        tmp_path,
        Cached(model, HARD),
        examples,
        fitted,
        settings={"epochs": 6, "learning_rate": 3e-2, "schedule": "constant"},
        dev=held,
        evaluations=2,
    )
    losses = [entry["dev_log_loss"] for entry in history["dev"]]
    assert [entry["step"] for entry in history["dev"]] == list(range(1, 13))
    assert history["best"] == min(losses) < losses[-1], "the test needs a run that overfits"
    assert dev_log_loss(model, examples, held, 64, "fp32") == pytest.approx(min(losses), abs=1e-6)


def test_the_last_step_is_judged_also_where_no_evaluation_falls_on_it(tmp_path: Path) -> None:
    history = run(
        tmp_path,
        Cached(tiny.classifier(), HARD),
        tiny.examples(),
        np.arange(20),
        settings={"epochs": 1.4},
        dev=np.arange(20, 24),
        evaluations=2,
        batch_rows=4,
    )
    assert [entry["step"] for entry in history["dev"]] == [2, 4, 6, 7]


@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", 2), ("cosine", 0.25), ("linear", 0)])
def test_the_learning_rate_follows_its_schedule_to_the_end(
    schedule: str, warmup: float, tmp_path: Path
) -> None:
    """The schedule's length is in optimizer steps, not in micro-batches."""
    history = run(
        tmp_path,
        Cached(tiny.classifier(), HARD),
        tiny.examples(),
        settings={"epochs": 8 / 3, "schedule": schedule, "warmup": warmup},
        batch_tokens=40,
    )
    assert history["steps"] == 8
    steps = round(warmup if warmup >= 1 else warmup * 8)
    for step, entry in enumerate(history["loss"]):
        left = (step - steps) / (8 - steps)
        fall = 1 - left if schedule == "linear" else (1 + math.cos(math.pi * left)) / 2
        assert entry["learning_rate"] == pytest.approx(
            1e-3 * (step / steps if step < steps else fall), rel=1e-5
        )


def test_two_trainings_over_one_model_are_as_alike_as_their_start(tmp_path: Path) -> None:
    model, examples = add_lora(tiny.classifier(), r=4, alpha=8, dropout=0.1), tiny.examples()
    start, found = trainable_state(model), []
    for _ in range(2):
        train.load_trainable(model, start)
        found.append([entry["loss"] for entry in run(tmp_path, Cached(model, HARD), examples)["loss"]])
    assert found[0] == found[1]


def test_only_what_is_trainable_moves(tmp_path: Path) -> None:
    model = add_lora(tiny.classifier(), r=4, alpha=8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(tmp_path, Cached(model, HARD), tiny.examples(), settings={"epochs": 2})
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainable(model))


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    found = [
        run(
            tmp_path,
            Cached(add_lora(tiny.classifier(), r=4, alpha=8), HARD),
            tiny.examples(),
            gradient_checkpointing=on,
        )["loss"]
        for on in (False, True)
    ]
    for one, two in zip(*found, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_needs_layers_but_no_embeddings_to_hook(tmp_path: Path) -> None:
    class Hookless:
        supports_gradient_checkpointing = True

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any) -> None:
            self.asked = gradient_checkpointing_kwargs

    net = Hookless()
    train._checkpoint_gradients(net)
    assert net.asked == {"use_reentrant": False}
    with pytest.raises(ModelError, match="gradient_checkpointing: Linear has nothing to checkpoint; set it"):
        run(tmp_path, Cached(nn.Linear(1, 1), HARD), tiny.examples(), gradient_checkpointing=True)


def test_phases_of_several_methods_follow_each_other_on_one_student(tmp_path: Path) -> None:
    """Each begins where the one before was best, and the last one's hooks are gone."""
    model, examples, dev = add_lora(tiny.classifier(), r=4, alpha=8), tiny.examples(), np.arange(16, 24)
    teacher = tiny.classifier(seed=1)
    methods = [
        Feature(model, HARD, {"t": teacher}, [("t", 1, 1)]),
        Cached(model, HARD),
        Online(model, Objective({"ce": 1.0, "kl": 1.0}, ["t"], [1.0], [1.0]), {"t": teacher}),
    ]
    for method in methods:
        before = dev_log_loss(model, examples, dev, 64, "fp32")
        history = run(tmp_path, method, examples, np.arange(16), dev=dev, evaluations=2)
        assert dev_log_loss(model, examples, dev, 64, "fp32") == pytest.approx(history["best"], abs=1e-6)
        assert history["best"] != pytest.approx(before, abs=1e-6)


def test_without_rows_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no rows to train on; check folds\.count"):
        run(tmp_path, Cached(tiny.classifier(), HARD), tiny.examples(), ALL[:0])


def test_a_loss_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    examples = tiny.examples().with_teachers(np.full((24, 1, 3), np.nan, dtype=np.float32))
    objective = Objective({"ce": 1, "kl": 1}, ["x"], [1], [1])
    with pytest.raises(ModelError, match="the loss of 8 rows is not finite: row0"):
        run(tmp_path, Cached(tiny.classifier(), objective), examples)


def test_a_deepspeed_config_that_did_nothing_is_refused(tmp_path: Path) -> None:
    trainer = type("T", (), {"model_wrapped": nn.Linear(1, 1)})()
    arguments = type("A", (), {"deepspeed": "zero2.json"})()
    with pytest.raises(ModelError, match="deepspeed was asked for, but the model ran as Linear"):
        train._check_engine(trainer, arguments)


SIZES = ("batch_rows", "batch_tokens", "evaluations")


def test_split_leaves_no_field_out() -> None:
    from llmkd.schema_distill import Distill

    fields = Distill().training()
    trainer, batching = train.split(fields)
    assert {**trainer, **batching} == fields
    assert set(batching) == {*SIZES, "gradient_checkpointing", "on_nan", "checkpoint_minutes"}


def test_logits_stand_in_the_order_asked_for_each_row_once() -> None:
    model, examples = tiny.classifier().eval(), tiny.examples()
    rows = np.random.default_rng(3).permutation(24)[:17]
    found = predict(model, examples, rows, 40)
    with torch.no_grad():
        alone = [model(**examples.inputs(rows[i : i + 1])).logits[0] for i in range(17)]
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found), torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert predict(model, examples, rows[:0], 40).shape[0] == 0


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_the_rows_and_each_counts_once(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny.classifier(), tiny.examples()
    expected = predict(model, examples, ALL, 40)
    parts: list[Any] = []
    forwards: list[int] = []
    model.score.register_forward_hook(lambda *_: forwards.append(train.ranks.rank()))
    monkeypatch.setattr(train.ranks, "world", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(train.ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(train.ranks, "gather", lambda found: (parts.append(found), [*parts])[1])
        if rank == world - 1:
            np.testing.assert_allclose(predict(model, examples, ALL, 40), expected, atol=1e-6)
        else:
            with pytest.raises(KeyError):  # the other ranks' rows are not here yet
                predict(model, examples, ALL, 40)
    assert len({forwards.count(rank) for rank in range(world)}) == 1  # collectives must match
    assert {row for found, _ in parts for row in found[0].tolist()} == set(range(24))


def test_a_row_whose_logits_are_not_finite_is_named() -> None:
    model, examples = tiny.classifier(), tiny.examples()
    rare = next(
        token for token in range(3, 64) if sum(token in row_tokens(examples, row) for row in ALL) == 1
    )
    row = next(row for row in ALL if rare in row_tokens(examples, row))
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = float("nan")
    with pytest.raises(ModelError, match=rf"logits of 1 rows are not finite, first \['row{row}'\]"):
        predict(model, examples, ALL, 10_000)


def row_tokens(examples: Any, row: int) -> list[int]:
    found: list[int] = examples.inputs(np.array([row]))["input_ids"][0].tolist()
    return found


@pytest.mark.parametrize("training", [True, False])
def test_inference_leaves_the_mode_as_it_was(training: bool) -> None:
    model = add_lora(tiny.classifier(), r=2, alpha=2, dropout=0.5).train(training)
    first = predict(model, tiny.examples(), ALL, 64)
    assert model.training == training
    np.testing.assert_array_equal(first, predict(model, tiny.examples(), ALL, 64))  # no dropout


def test_next_token_is_the_mean_over_real_targets() -> None:
    model, examples = tiny.causal_lm().eval(), tiny.examples(5)
    with torch.no_grad():
        loss, parts = next_token(model)(examples.inputs(np.arange(5)), torch.full((5,), -1))
        for row in range(5):
            ids = examples.inputs(np.array([row]))["input_ids"]
            plain = model(input_ids=ids, labels=ids).loss
            assert loss[row].item() == pytest.approx(plain.item(), rel=1e-4)
    torch.testing.assert_close(parts["ce"], loss)


def test_a_head_that_does_more_than_multiply_and_cap_keeps_its_own_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    examples, labels = tiny.examples(5), torch.full((5,), -1)
    assert isinstance(next_token(tiny.causal_lm()), Sequence)
    told = tiny.causal_lm(logit_scale=0.5)
    assert isinstance(next_token(told), WholeLogits)
    plain = LlamaForCausalLM.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        found = plain(*args, **kwargs)
        found.logits = found.logits / 3
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    model = tiny.causal_lm().eval()  # whose config tells nothing of it
    method = next_token(model)
    assert isinstance(method, WholeLogits)
    with torch.no_grad():
        loss, parts = method(examples.inputs(np.arange(5)), labels)
        for row in range(5):
            ids = examples.inputs(np.array([row]))["input_ids"]
            own = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            expected = -own[torch.arange(ids.shape[1] - 1), ids[0, 1:]].mean()
            assert loss[row].item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(parts["ce"], loss)


def test_a_language_model_s_step_weighs_tokens_alike(tmp_path: Path) -> None:
    """A row's weight is its number of targets, so the step's loss is the mean over all its tokens."""
    weights = (tiny.examples().lengths - 1).astype(np.float64)
    model, examples = tiny.causal_lm(), tiny.examples(weights=weights)
    with torch.no_grad():
        rows, _ = next_token(model)(examples.inputs(ALL), torch.from_numpy(examples.labels))
    expected = float((rows * torch.from_numpy(weights)).sum() / weights.sum())
    history = run(tmp_path, next_token(model), examples, batch_rows=24, batch_tokens=50)
    assert history["loss"][0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_bf16_computes_in_bf16_and_trains_in_float32(tmp_path: Path) -> None:
    model = add_lora(tiny.classifier().bfloat16(), r=4, alpha=8)
    seen: list[torch.dtype] = []
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj.lora_A.default")
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    history = run(tmp_path, Cached(model, HARD, "bf16"), tiny.examples(), dev=np.arange(4))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert math.isfinite(history["best"])
