"""Going on with a training: what its trainer holds, into a checkpoint and back.

Bit-equal on one process. With several ranks the sums that are only logged are saved as their means, so a
training may go on with another number of them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers.trainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmkd import checkpoint, interrupt, ranks, sharded
from llmkd.checkpoint import over, under
from llmkd.errors import ModelError, Stopped
from llmkd.kept import Kept
from llmkd.models.lora import load_trainable, trainable, trainable_state

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmkd.steps import KeepBest, StepTrainer

LOAD = "deepspeed_load_checkpoint"  # the Trainer's own, of DeepSpeed's checkpoints
Found = tuple[dict[str, "Tensor"], dict[str, Any]]


class Saving(TrainerCallback):
    """Saves every `minutes`, and when the process is asked to stop: all ranks at the end of one step."""

    def __init__(
        self,
        trainer: StepTrainer,
        directory: Path,
        minutes: float,
        method: nn.Module,
        keep: KeepBest | None,
        found: Found | None,
    ) -> None:
        self.trainer, self.directory, self.minutes = trainer, directory, minutes
        self.method, self.keep, self.found = method, keep, found
        self.saved = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        due = time.monotonic() - self.saved >= 60 * self.minutes
        wanted = ranks.most(2 if interrupt.asked() else int(due))
        if wanted and state.global_step < state.max_steps:  # at the last step the whole training is saved
            control.should_save = True
            control.should_training_stop = wanted == 2

    def save(self) -> None:
        """After the step is logged: nothing of it is left to do."""
        trainer, keep = self.trainer, self.keep
        if trainer.is_deepspeed_enabled:
            optimizer, groups = sharded.optimizer_state(self.method, trainer.model_wrapped)
        else:
            optimizer, groups = checkpoint.optimizer_state(trainer.optimizer)
        names = sorted(trainer.parts)
        logged = [float(trainer._tr_loss), *(float(trainer.parts[name]) for name in names)]
        loss, *parts = (sum(values) / ranks.world() for values in zip(*ranks.gather(logged), strict=True))
        tensors = learnt(self.method) | over("optimizer", optimizer)
        facts = {
            "trainer": asdict(trainer.state),
            "deepspeed": bool(trainer.is_deepspeed_enabled),
            "groups": groups,
            "schedule": _schedule(trainer).state_dict(),
            "loss": loss,
            "logged": trainer._globalstep_last_logged,
            "parts": dict(zip(names, parts, strict=True)),
            "parts_since": trainer.parts_since,
            "skipped": trainer.skipped,
            "skipped_since": trainer.skipped_since,
            "random": ranks.gather(checkpoint.random_state()),
            "extra": checkpoint.extra_state(self.method),
        }
        if keep:
            tensors |= over("best", keep.state or {})
            facts["best"], facts["history"] = keep.best, keep.history
        if ranks.is_main():
            checkpoint.write(self.directory, trainer.state.global_step, tensors, facts)
        ranks.barrier()
        self.saved = time.monotonic()

    def finish(self, history: dict[str, Any]) -> None:
        """The training as a whole: begun again, it ends at once. Raises Stopped where a signal waits."""
        tensors = learnt(self.method)
        facts = {
            "trainer": asdict(self.trainer.state),
            "whole": history,
            "extra": checkpoint.extra_state(self.method),
        }
        if ranks.is_main():
            checkpoint.write(self.directory, self.trainer.state.global_step, tensors, facts)
        ranks.barrier()
        if signal := ranks.most(interrupt.asked() or 0):
            raise Stopped(signal, "this training is whole and saved")

    def load(self) -> int:
        """What the method had learnt and KeepBest had found; the step reached, 0 without one."""
        if self.found is None:
            return 0
        tensors, facts = self.found
        self._check(tensors)
        load_learnt(self.method, self.found)
        if self.keep and "best" in facts:
            self.keep.best, self.keep.history = facts["best"], facts["history"]
            self.keep.state = under("best", tensors) or None
        return int(facts["trainer"]["global_step"])

    def _check(self, tensors: dict[str, Tensor]) -> None:
        """Raise ModelError where the checkpoint is of a method that learns something else."""
        own = over("trained", trainable(self.method)) | over("buffers", checkpoint.buffers(self.method))
        # under ZeRO-3 a parameter's own shape is that of the piece this rank holds
        shapes = {name: tuple(getattr(one, "ds_shape", one.shape)) for name, one in own.items()}
        learnt = [name for name in tensors if name.startswith(("trained/", "buffers/"))]
        kept = {name: tuple(tensors[name].shape) for name in learnt}
        if odd := sorted({name for name, _ in shapes.items() ^ kept.items()}):
            raise ModelError(
                f"{self.directory}: another training's checkpoint ({odd[0]} differs); remove that "
                "directory to begin anew"
            )

    def load_optimizer(self) -> None:
        """The last that is read of a checkpoint's tensors: they are not kept beside what they became."""
        assert self.found
        tensors, facts = under("optimizer", self.found[0]), self.found[1]
        self.found[0].clear()
        if "whole" in facts:
            return
        if facts["deepspeed"] != bool(self.trainer.is_deepspeed_enabled):
            began = "with" if facts["deepspeed"] else "without"
            raise ModelError(
                f"{self.directory}: this training began {began} DeepSpeed, so its optimizer's state is of "
                f"another kind; go on {began} it, or remove that directory to begin anew"
            )
        if self.trainer.is_deepspeed_enabled:
            sharded.load_optimizer(self.method, self.trainer.model_wrapped, tensors, facts["groups"])
        else:
            checkpoint.load_optimizer(self.trainer.optimizer, tensors, facts["groups"])
        _schedule(self.trainer).load_state_dict(facts["schedule"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What the trainer has just set to nothing: the sums since the last entry of the log."""
        if self.found is None or "whole" in self.found[1]:
            return
        facts, trainer = self.found[1], self.trainer
        trainer._tr_loss = torch.tensor(facts["loss"], device=args.device)
        trainer._globalstep_last_logged = facts["logged"]
        trainer.parts = {
            name: torch.tensor(value, device=args.device) for name, value in facts["parts"].items()
        }
        trainer.parts_since = facts["parts_since"]
        trainer.skipped, trainer.skipped_since = facts["skipped"], facts["skipped_since"]

    def load_random(self) -> None:
        """Once, before the first batch is drawn. A rank that was not there goes on from its seed."""
        if self.found and self.found[1].get("random"):
            states = self.found[1].pop("random")
            if ranks.rank() < len(states):
                checkpoint.load_random(states[ranks.rank()])

    @contextmanager
    def trainer_state(self) -> Iterator[str | None]:
        """The Trainer reads its own state from a directory; None where it begins anew."""
        if self.found is None:
            yield None
            return
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "trainer_state.json").write_text(json.dumps(self.found[1]["trainer"]))
            with ExitStack() as stack:
                stack.callback(setattr, transformers.trainer, LOAD, getattr(transformers.trainer, LOAD))
                setattr(transformers.trainer, LOAD, lambda *_, **__: None)  # its format is pickle
                yield directory


def _schedule(trainer: StepTrainer) -> Any:
    """The scheduler itself, out of the wrapper that DeepSpeed's comes in."""
    return getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)


def keeping(directory: Path | None, minutes: float) -> tuple[Kept, Callable[[bool], None]]:
    """Logits that an interrupted prediction left, of all its ranks; and what saves this rank's.

    The second is called after each batch, and writes every `minutes`; told that it was the last, it writes
    what is not yet on the disk.
    """
    if directory is None:
        return Kept(), lambda last: None
    found = Kept()
    ranks_before = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    for name in ranks.gather(ranks_before)[0]:
        if saved := checkpoint.read(directory / name):
            found.add(saved[0]["rows"].numpy(), saved[0]["logits"].numpy())
    ranks.barrier()  # no rank writes before all have read
    found = found.once()
    own, when, count = directory / f"rank{ranks.rank()}", time.monotonic(), len(found)

    def save(last: bool) -> None:
        nonlocal when, count
        if len(found) > count and (last or time.monotonic() - when >= 60 * minutes):
            rows, logits = map(torch.from_numpy, found.joined())
            checkpoint.write(own, len(found), {"rows": rows, "logits": logits}, {})
            when, count = time.monotonic(), len(found)

    return found, save


def learnt(method: nn.Module) -> dict[str, Tensor]:
    """All of a method that learning changes. Under ZeRO-3 every rank must call it."""
    return over("trained", trainable_state(method)) | over("buffers", checkpoint.buffers(method))


def load_learnt(method: nn.Module, found: Found) -> None:
    tensors, facts = found
    load_trainable(method, under("trained", tensors))
    checkpoint.load_extra(method, under("buffers", tensors), facts["extra"])
