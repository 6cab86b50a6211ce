"""A training that is cut off at any step, and begun again, ends as the one that nothing disturbed."""

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmkd import checkpoint, digests, interrupt
from llmkd.capture import cache_teacher
from llmkd.crossfit import Fit, fit_in_turn
from llmkd.errors import ConfigError, ModelError, Stopped
from llmkd.layout import Layout
from llmkd.methods.cached import Cached
from llmkd.methods.mutual import Mutual
from llmkd.models.lora import add_lora, trainable_state
from llmkd.objective import HARD, Objective
from llmkd.resume import Saving, learnt
from llmkd.train import fit, predict

TRAIN, DEV = np.arange(20), np.arange(20, 24)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Every training collects twice: it need not look through all that was imported before."""
    gc.freeze()
    yield
    gc.unfreeze()


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


def objective(**terms: float) -> Objective:
    return Objective(terms, ["t"], [1.0], [1.0])


def cached() -> Any:
    """LoRA with dropout, so that the state of the generators counts."""
    model = add_lora(tiny.classifier(), r=2, alpha=4, dropout=0.3)
    return Cached(model, objective(ce=1, kl=1))


def mutual() -> Any:
    peers = {"one": tiny.classifier("llama", 1), "two": tiny.classifier("bert", 2)}
    return Mutual(peers, HARD)


class Counting(Cached):
    """Counts its batches, a running mean and a number that no tensor holds; both change what it learns."""

    def __init__(self) -> None:
        super().__init__(tiny.classifier("qwen2"), HARD)
        self.register_buffer("mean", torch.zeros(()))
        self.batches = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"batches": self.batches}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]

    def forward(self, inputs: Any, labels: Any, teacher_logits: Any = None, beside: Any = None) -> Any:
        loss, parts = super().forward(inputs, labels)
        self.batches += 1
        self.mean += 0.1 * (loss.mean().detach() - self.mean)
        return loss * (1 + self.mean + self.batches / 10), parts


METHODS: dict[str, Callable[[], Any]] = {"cached": cached, "mutual": mutual, "counting": Counting}


def examples(name: str) -> Any:
    found = tiny.examples()
    logits = np.random.default_rng(1).normal(size=(24, 1, 3)).astype(np.float32)
    if name == "mutual":
        return replace(found, beside={"two": found.inputs})

    def shifted(inputs: dict[str, Any]) -> dict[str, Any]:
        """An augmentation: it draws from torch's generator when a batch is made."""
        moved = (inputs["input_ids"] + torch.randint(0, 2, inputs["input_ids"].shape)) % 64
        return {**inputs, "input_ids": moved}

    return replace(found.with_teachers(logits), augment=shifted)


def train(name: str, directory: Path, checkpoints: Path | None, **more: Any) -> tuple[Any, dict[str, Any]]:
    """Three epochs of five steps; the learnt state and the history."""
    method = METHODS[name]()
    training = tiny.training(directory, epochs=3, learning_rate=1e-2)
    settings = {"batch_rows": 4, "batch_tokens": 48, "evaluations": 2, "dev": DEV, **more}
    history = fit(
        method, examples(name), TRAIN, training, checkpoints=checkpoints, checkpoint_minutes=0, **settings
    )
    return learnt(method), history


def kill(step: int, monkeypatch: pytest.MonkeyPatch, train: Callable[..., Any], *args: Any) -> None:
    """A training that dies as soon as this step is saved."""
    save = Saving.save

    def killed(self: Saving) -> None:
        save(self)
        if self.trainer.state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Saving, "save", killed)
        with pytest.raises(Killed):
            train(*args)


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("cached", [1, 5]), ("cached", [3, 14]), ("mutual", [7, 10]), ("counting", [5, 7])],
)
def test_a_killed_training_ends_bit_equal(
    name: str, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, buffers and counts; losses, terms and development scores; between epochs and inside them."""
    whole, expected = train(name, tmp_path, None)
    for step in steps:
        kill(step, monkeypatch, train, name, tmp_path, tmp_path / "checkpoint")
    found, history = train(name, tmp_path, tmp_path / "checkpoint")
    same(found, whole)
    assert history == expected
    assert len(history["loss"]) == 7
    assert [path.name[:13] for path in (tmp_path / "checkpoint").iterdir()] == ["step000000015"]


def test_an_optimizer_of_the_other_kind_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmkd import checkpoint

    kill(3, monkeypatch, train, "cached", tmp_path, tmp_path / "checkpoint")
    tensors, facts = checkpoint.read(tmp_path / "checkpoint") or ({}, {})
    assert facts["deepspeed"] is False
    checkpoint.write(tmp_path / "checkpoint", 4, tensors, {**facts, "deepspeed": True})
    with pytest.raises(ModelError, match=r"began with DeepSpeed, .* go on with it, or remove that directory"):
        train("cached", tmp_path, tmp_path / "checkpoint")


def test_another_training_s_checkpoint_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(3, monkeypatch, train, "cached", tmp_path, tmp_path / "checkpoint")
    for other in ("mutual", "counting"):
        with pytest.raises(
            ModelError, match=r"checkpoint: another training's .* differs\); remove .* anew\Z"
        ):
            train(other, tmp_path, tmp_path / "checkpoint")


def test_a_whole_training_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, expected = train("cached", tmp_path, tmp_path / "checkpoint")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("llmkd.steps.StepTrainer.train", refuse)
    found, history = train("cached", tmp_path, tmp_path / "checkpoint")
    same(found, whole)
    assert history == expected


def test_half_an_epoch_ends_where_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(checkpoints: Path | None) -> Any:
        method = cached()
        training = tiny.training(tmp_path, epochs=0.6)
        more = {"checkpoints": checkpoints, "checkpoint_minutes": 0}
        history = fit(method, examples("cached"), TRAIN, training, batch_rows=4, batch_tokens=48, **more)
        return learnt(method), history["steps"]

    whole, count = half(None)
    kill(2, monkeypatch, half, tmp_path / "checkpoint")
    for _ in range(2):
        found, steps = half(tmp_path / "checkpoint")
        same(found, whole)
        assert steps == count == 3


@pytest.mark.parametrize("damage", ["flipped", "cut", "half-written", "lost"])
def test_a_damaged_checkpoint_is_never_gone_on_with(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = train("cached", tmp_path, None)
    kill(4, monkeypatch, train, "cached", tmp_path, tmp_path / "checkpoint")
    (path,) = (tmp_path / "checkpoint").iterdir()
    data = bytearray(path.read_bytes())
    if damage == "half-written":
        path.rename(path.with_name("next.tmp"))
    elif damage == "lost":
        path.unlink()
    else:
        data[-9] ^= 1
        path.write_bytes(bytes(data[: -100 if damage == "cut" else None]))
    found, _ = train("cached", tmp_path, tmp_path / "checkpoint")
    same(found, whole)
    assert (f"{path}: damaged (sha256)" in capsys.readouterr().out) == (damage in ("flipped", "cut"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 15), (signal.SIGINT, 2)])
def test_a_signal_finishes_the_step_and_saves(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = train("cached", tmp_path, None)
    step = Saving.on_step_end

    def signalled(self: Saving, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), number)
        step(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, interrupt.heard():
        patch.setattr(Saving, "on_step_end", signalled)
        with pytest.raises(Stopped) as stopped:
            train("cached", tmp_path, tmp_path / "checkpoint")
    assert stopped.value.signal == code
    assert str(stopped.value) == "step 4 of 15 is saved"
    found, history = train("cached", tmp_path, tmp_path / "checkpoint")
    same(found, whole)
    assert history == expected


def test_a_signal_where_nothing_is_to_be_saved_is_heard_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interrupt.heard(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_at_once_unless_a_launcher_passed_the_first_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sent = list[tuple[int, int]]()
    with interrupt.heard(), interrupt.deferred():
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == "SIGINT: stops after this step or block; again in 3 s: at once\n"
        monkeypatch.setattr(os, "kill", lambda *one: sent.append(one))
        signal.raise_signal(signal.SIGTERM)
        assert (interrupt.asked(), sent) == (signal.SIGINT, [])
        monkeypatch.setattr(interrupt, "SAME", 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert sent == [(os.getpid(), signal.SIGTERM)]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the system's own handler ends it"


def test_phases_go_on_in_the_phase_they_were_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def phases(checkpoints: Path | None) -> Any:
        method, rows = cached(), examples("cached")
        batching = {"batch_rows": 4, "batch_tokens": 48, "checkpoint_minutes": 0}
        objectives = [objective(kl=1), HARD, objective(ce=1, kl=2)]
        fits = [
            Fit(method, one, rows, TRAIN, tiny.training(tmp_path, learning_rate=1e-2), batching)
            for one in objectives
        ]
        return (history := fit_in_turn(fits, DEV, checkpoints)) and (learnt(method), history)

    whole, expected = phases(None)
    for step in (2, 4, 3):
        kill(step, monkeypatch, phases, tmp_path / "checkpoint")
    found, history = phases(tmp_path / "checkpoint")
    same(found, whole)
    assert history == expected


def test_a_logit_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    model, rows = tiny.classifier(), np.arange(24)
    whole, right = predict(model, tiny.examples(), rows, 48), model.score.weight.detach().clone()
    model.score.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="logits of 24 rows are not finite"):
        predict(model, tiny.examples(), rows, 48, keep=tmp_path, keep_minutes=0)
    model.score.weight.data.copy_(right)
    np.testing.assert_array_equal(predict(model, tiny.examples(), rows, 48, keep=tmp_path), whole)


def test_a_prediction_asks_only_for_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny.classifier(), np.arange(24)[::-1].copy()
    whole = predict(model, tiny.examples(), rows, 48)
    asked: list[int] = []
    write = checkpoint.write

    def killed(*args: Any) -> None:
        write(*args)
        if args[1] > 10:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", killed)
        with pytest.raises(Killed):
            predict(model, tiny.examples(), rows, 48, keep=tmp_path / "keep", keep_minutes=0)
    some = tiny.examples()
    inputs = some.inputs
    object.__setattr__(some, "inputs", lambda rows: (asked.extend(rows.tolist()), inputs(rows))[1])
    found = predict(model, some, rows, 48, keep=tmp_path / "keep", keep_minutes=0)
    np.testing.assert_array_equal(found, whole)
    assert 0 < len(asked) < 14


def test_a_prediction_that_is_asked_to_stop_saves_what_it_found(tmp_path: Path) -> None:
    """At once, whatever the minutes."""
    model, rows, some = tiny.classifier(), np.arange(24), tiny.examples()
    whole, inputs, asked = predict(model, some, rows, 48), some.inputs, list[int]()

    def signalled(batch: Any) -> Any:
        if len(asked) > 10:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.extend(batch.tolist())
        return inputs(batch)

    def counted(batch: Any) -> Any:
        asked.extend(batch.tolist())
        return inputs(batch)

    with interrupt.heard(), pytest.raises(Stopped):
        predict(model, replace(some, inputs=signalled), rows, 48, keep=tmp_path)
    before = len(asked)
    found = predict(model, replace(some, inputs=counted), rows, 48, keep=tmp_path)
    np.testing.assert_array_equal(found, whole)
    assert before > 10
    assert len(asked) == 24, "no row twice"


@pytest.mark.parametrize("whose", ["another run's", "another part's"])
def test_a_whole_checkpoint_of_another_run_or_part_is_not_gone_on_with(
    whose: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same shapes, and whole: what it is of is all that tells it from the unit's own."""
    units = {name: tmp_path / name / "checkpoint" for name in ("one", "two")}
    for name, unit in units.items():
        unit.mkdir(parents=True)
        (unit / "fingerprint").write_text(name)
        for part in ("fit0", "fit1"):
            checkpoint.write(unit / part, 3, {"a": torch.zeros(2)}, {"of": [name, part]})
    target = units["one"] / "fit0"
    for path in target.iterdir():
        path.unlink()
    (swapped,) = (units["two"] / "fit0" if whose == "another run's" else units["one"] / "fit1").iterdir()
    shutil.copy2(swapped, target)
    noise = b"no tensors"
    (target / f"step000000004-{digests.sha(noise)}.safetensors").write_bytes(noise)
    assert checkpoint.read(target) is None
    assert f"{target / swapped.name}: not this unit's own, left aside" in capsys.readouterr().out
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    found = checkpoint.read(tmp_path / "moved" / "checkpoint" / "fit1")
    assert found is not None, "a run may be moved"
    assert found[1] == {"of": ["one", "fit1"]}


def poisoned(name: str = "cached") -> Any:
    """Examples whose row 7 has teachers' logits that make its loss infinite."""
    found = tiny.examples()
    logits = np.zeros((24, 1, 3), dtype=np.float32)
    logits[7] = np.nan
    return found.with_teachers(logits)


def learn_poisoned(directory: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    method = Cached(tiny.classifier(), objective(ce=1, kl=1))
    training = tiny.training(directory, learning_rate=1e-2)
    history = fit(method, poisoned(), TRAIN, training, batch_rows=4, batch_tokens=48, **more)
    return method, history


def test_a_loss_that_is_not_finite_stops_at_once_and_names_its_row(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"step \d: the loss of 1 rows is not finite: row7; lower [^\n]*\Z"):
        learn_poisoned(tmp_path)


def test_a_step_that_is_not_finite_is_skipped_and_counted_where_so_asked(tmp_path: Path) -> None:
    method, history = learn_poisoned(tmp_path, on_nan="skip")
    assert history["skipped"] == [["row7"]]
    assert history["steps"] == 5
    assert all(np.isfinite(entry[key]) for entry in history["loss"] for key in ("loss", "ce", "kl/t"))
    assert len(history["loss"]) == 4, "a log of every step, but of the one that was not taken"
    assert all(tensor.isfinite().all() for tensor in trainable_state(method).values())


@pytest.mark.parametrize("where", ["everywhere", "one of several micro-batches"])
def test_a_gradient_that_is_not_finite_stops_too(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is of one micro-batch of those that a step adds up; all rows of the step are named."""
    calls = list[int]()

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("inf")

    method = Cached(tiny.classifier(), HARD)
    forward = method.forward

    def steep(**kwargs: Any) -> Any:
        loss, parts = forward(**kwargs)
        calls.append(len(loss))
        return Steep.apply(loss) if where == "everywhere" or len(calls) == 2 else loss, parts

    monkeypatch.setattr(method, "forward", steep)
    with pytest.raises(ModelError, match=r"step 1: the gradient of these 4 rows is not finite: row"):
        fit(method, tiny.examples(), TRAIN, tiny.training(tmp_path), batch_rows=4, batch_tokens=20)
    assert len(calls) > 2
    assert sum(calls) == 4


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_next_token_logits_that_are_not_finite_name_their_row(value: str, tmp_path: Path) -> None:
    """Else a cache would hold words of weight 0, or none."""
    model, rows = tiny.causal_lm(), tiny.examples()
    rows = replace(rows, weights=(rows.lengths - 1).astype(np.float64))
    only = {i: set(rows.inputs(np.array([i]))["input_ids"][0, :-1].tolist()) for i in range(24)}
    row, token = next(
        (row, token)
        for row in only
        for token in only[row]
        if not any(token in only[other] for other in only if other != row)
    )
    with torch.no_grad():
        if value == "nan":
            model.get_input_embeddings().weight[token] = float(value)
        else:
            model.lm_head.weight[:, 0] = torch.inf
    layout = Layout("topk", 4, 64)
    settings = {"batch_tokens": 50, "chunk": 7, "shard_tokens": 60}
    found = rf"'row{row}'" if value == "nan" else r"'row\d+'"
    with pytest.raises(ModelError, match=rf"next-token logits of row {found} are not finite; .*\Z"):
        cache_teacher(model.eval(), rows, tmp_path, layout, {}, **settings)
    assert not (tmp_path / "manifest.json").exists()


def test_skipping_under_deepspeed_is_refused(tmp_path: Path) -> None:
    training = tiny.training(tmp_path)
    training.deepspeed = "zero2.json"
    with pytest.raises(ConfigError, match=r"on_nan: skip cannot .* use on_nan: stop"):
        fit(cached(), examples("cached"), TRAIN, training, batch_rows=4, batch_tokens=48, on_nan="skip")
