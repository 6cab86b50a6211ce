"""One optimizer step of the Hugging Face Trainer: micro-batches, loss terms, and what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmkd import ranks
from llmkd.batches import Rows
from llmkd.errors import ModelError
from llmkd.models.lora import trainable_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmkd.resume import Saving


class StepTrainer(Trainer):
    """A Trainer whose loader yields whole optimizer steps, each a list of this rank's micro-batches."""

    saving: Saving | None = None
    on_nan = "stop"

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A sampler's batch is the number of one step, so that the Trainer can skip those already done."""
        steps: Any = self.train_dataset
        numbers = [[number] for number in range(len(steps))]
        loader: DataLoader[Any] = DataLoader(steps, batch_sampler=numbers, collate_fn=itemgetter(0))
        loader.set_epoch = steps.set_epoch  # type: ignore[attr-defined]
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        self._load_rng_state(None)  # augmentation draws, and it comes before the Trainer would do this
        if self.state.global_step >= self.state.max_steps:  # a training that was whole already
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The method has its weights by now."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and self.saving:
            self.saving.load_optimizer()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.saving:
            self.saving.load_random()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.saving
        self.saving.save()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Each micro-batch forward and backward; gradients meet over the ranks at the last one only."""
        self.loss_is_scaled_for_ga = True  # every micro-batch carries its share of the step's mean
        self.micros, self.loss_before = [], self._tr_loss.clone()
        losses = []
        for i, micro in enumerate(inputs):
            with self._unsynchronised(model, last=i == len(inputs) - 1):
                losses.append(super().training_step(model, micro))
        return torch.stack(losses).sum()

    @contextmanager
    def _unsynchronised(self, model: nn.Module, last: bool) -> Iterator[None]:
        self.accelerator.gradient_state._set_sync_gradients(last)
        if last or self.is_deepspeed_enabled:  # DeepSpeed keeps its own boundary, from sync_gradients
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, parts = model(**inputs["batch"])  # (B,), {name: (B,)}
        weight = inputs["weight"]  # (B,)
        sums = {name: (part.detach() * weight).sum() for name, part in parts.items()}
        self.micros.append((inputs["rows"], loss.detach(), sums))
        return (loss * weight).sum()

    micros: list[tuple[Rows, Tensor, dict[str, Tensor]]]  # of this step
    loss_before: Tensor
    parts: dict[str, Any]
    parts_since: int
    skipped: list[list[str]]  # the ids of each step that was not taken
    skipped_since: int

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """All gradients are in place and no weight has moved yet (DeepSpeed's have: it can only stop)."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        whole = torch.stack([loss.isfinite().all() for _, loss, _ in self.micros]).all()
        finite = bool(whole) and (norm is None or math.isfinite(float(norm)))
        if ranks.most(int(not finite)):
            self._refuse_step(model)
            return None
        for _, _, sums in self.micros:
            for name, value in sums.items():
                self.parts[name] = self.parts.get(name, 0) + value
        return norm

    def _refuse_step(self, model: nn.Module) -> None:
        """Stop, naming the rows; or leave the weights and the sums as they were before this step."""
        examples = self.train_dataset.examples  # type: ignore[union-attr]
        rows = [row for rows, loss, _ in self.micros for row in rows[~loss.isfinite().cpu().numpy()]]
        bad = sorted({examples.ids[row] for part in ranks.gather(rows) for row in part})
        what = f"the loss of {len(bad)} rows is"
        if not bad:
            everywhere = ranks.gather([row for rows, _, _ in self.micros for row in rows])
            bad = sorted({examples.ids[row] for part in everywhere for row in part})
            what = f"the gradient of these {len(bad)} rows is"
        if self.on_nan == "stop":
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise ModelError(
                f"step {self.state.global_step + 1}: {what} not finite: {', '.join(bad[:5])}{more}; "
                "lower learning_rate, try precision: fp32, or see what these rows hold"
            )
        self.skipped.append(bad)
        model.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
        self._tr_loss = self.loss_before

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every term on its own, as a mean a row since the last time, over all ranks and steps taken."""
        steps = self.state.global_step - self.parts_since
        if "loss" in logs and steps:
            taken = steps - (len(self.skipped) - self.skipped_since)
            names = sorted(self.parts)
            if taken:
                logs["loss"] *= steps / taken
                means = [(self.parts[name] / taken).item() for name in names]
                everywhere = [means] if ranks.world() == 1 else ranks.gather(means)
                for name, values in zip(names, zip(*everywhere, strict=True), strict=True):
                    logs[name] = round(sum(values) / len(values), 6)
            else:
                del logs["loss"]  # no step, no loss
            self.parts, self.parts_since = {}, self.state.global_step
            self.skipped_since = len(self.skipped)
        super().log(logs, start_time)


class KeepBest(TrainerCallback):
    """Scores the student on development rows and keeps what its method had learnt at its lowest log loss."""

    def __init__(self, method: nn.Module, score: Callable[[], float], evaluations: int) -> None:
        self.method, self.score, self.evaluations = method, score, evaluations
        self.best, self.history = math.inf, list[dict[str, float]]()
        self.state: dict[str, Tensor] | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps_an_epoch = state.max_steps / max(args.num_train_epochs, 1e-9)
        every = max(1, round(steps_an_epoch / self.evaluations))
        if state.global_step % every and state.global_step != state.max_steps:
            return
        log_loss = self.score()
        self.history.append({"step": state.global_step, "dev_log_loss": log_loss})
        if log_loss < self.best:
            self.best, self.state = log_loss, trainable_state(self.method)
