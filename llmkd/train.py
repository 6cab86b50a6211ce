"""The one training step: the Hugging Face Trainer around a method, and inference over the same batches."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.trainer_utils import set_seed

from llmkd import ranks
from llmkd.batches import Examples, Rows, Steps, padding_share, sorted_batches
from llmkd.errors import DataError, ModelError
from llmkd.models.lora import load_trainable, trainable_state
from llmkd.models.pooling import autocast, class_logits

if TYPE_CHECKING:
    from collections.abc import Iterator

ENGINE = "_llmkd_engine"  # where a student keeps the engine that trained it last


def arguments(
    directory: Path,
    *,
    epochs: float,
    learning_rate: float,
    schedule: str = "cosine",
    warmup: float = 0,
    weight_decay: float = 0,
    betas: tuple[float, float] = (0.9, 0.95),
    clip: float = 1.0,
    deepspeed: str | None = None,
    seed: int = 42,
) -> TrainingArguments:
    """The Trainer's arguments. Under ZeRO-3 they must exist before a model is loaded, to shard it."""
    forget_sharding()
    training = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        max_grad_norm=clip,
        per_device_train_batch_size=1,  # an item of the loader is a whole optimizer step
        deepspeed=deepspeed,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if ranks.world() > 1 and not torch.cuda.is_available() else None,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_nan_inf_filter=False,
        logging_steps=0.1,
        disable_tqdm=False,
        save_strategy="no",
        report_to=[],
    )
    # one process trains on one device; a node's other GPUs are for torchrun and deepspeed, not DataParallel
    training._n_gpu = min(training.n_gpu, 1)
    return training


def forget_sharding() -> None:
    """Models loaded from here on are whole: a DeepSpeed training before this one leaves two switches on."""
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


class StepTrainer(Trainer):
    """A Trainer whose loader yields whole optimizer steps, each a list of this rank's micro-batches."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = DataLoader(self.train_dataset, batch_size=None, shuffle=False)  # type: ignore[arg-type]
        loader.set_epoch = self.train_dataset.set_epoch  # type: ignore[attr-defined, union-attr]
        return loader

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Each micro-batch forward and backward; gradients meet over the ranks at the last one only."""
        self.loss_is_scaled_for_ga = True  # every micro-batch carries its share of the step's mean
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
        for name, part in parts.items():
            self.parts[name] = self.parts.get(name, 0) + (part.detach() * weight).sum()
        return (loss * weight).sum()

    parts: dict[str, Any]
    parts_since: int

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every term on its own, as a mean a row since the last time, over all ranks."""
        steps = self.state.global_step - self.parts_since
        if "loss" in logs and steps and self.parts:
            means = torch.stack([self.parts[name] for name in sorted(self.parts)]) / steps
            everywhere = [means.tolist()] if ranks.world() == 1 else ranks.gather(means.tolist())
            for name, values in zip(sorted(self.parts), zip(*everywhere, strict=True), strict=True):
                logs[name] = round(sum(values) / len(values), 6)
            self.parts, self.parts_since = {}, self.state.global_step
        super().log(logs, start_time)


class KeepBest(TrainerCallback):
    """Scores the student on development rows and keeps what it had learnt at its lowest log loss."""

    def __init__(self, student: nn.Module, score: Callable[[], float], evaluations: int) -> None:
        self.student, self.score, self.evaluations = student, score, evaluations
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
            self.best, self.state = log_loss, trainable_state(self.student)


def fit(
    method: nn.Module,
    examples: Examples,
    train: Rows,
    training: TrainingArguments,
    *,
    dev: Rows | None = None,
    batch_rows: int,
    batch_tokens: int,
    evaluations: int = 1,
    gradient_checkpointing: bool = False,
) -> dict[str, Any]:
    """Train `method.student` on the rows `train`; with `dev` rows, leave it at its best log loss on them.

    Returns the history: {"loss": [every log entry], "dev": [{step, dev_log_loss}], "steps", "best",
    "padding_share"}.
    Raises DataError without rows, ModelError where the loss is not finite.
    """
    if not len(train):
        raise DataError("no rows to train on; check folds.count and the prepared rows")
    student: nn.Module = method.student  # type: ignore[assignment]
    _begin_anew(student, training)
    if gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        student.enable_input_require_grads()  # type: ignore[operator]
    set_seed(training.seed)
    steps = Steps(examples, train, batch_rows, batch_tokens, training.seed, ranks.rank(), ranks.world())
    keep = None
    if dev is not None:
        dev = dev[examples.labels[dev] >= 0]
    if dev is not None and len(dev):
        precision = str(getattr(method, "precision", "fp32"))
        keep = KeepBest(
            student, lambda: dev_log_loss(student, examples, dev, batch_tokens, precision), evaluations
        )
    trainer = StepTrainer(
        model=method,
        args=training,
        train_dataset=steps,
        callbacks=[keep] if keep else [],  # type: ignore[arg-type]
    )
    trainer.parts, trainer.parts_since = {}, 0
    trainer.train()
    _check_engine(trainer, training)
    if training.deepspeed:
        student.__dict__[ENGINE] = trainer.model_wrapped  # as an attribute it would become a submodule
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    if not all(math.isfinite(entry["loss"]) for entry in losses):
        raise ModelError("the training loss is not finite; lower learning_rate or check the teachers' logits")
    if keep and keep.state:
        load_trainable(student, keep.state)
    return {
        "loss": losses,
        "dev": keep.history if keep else [],
        "best": keep.best if keep else None,
        "steps": trainer.state.global_step,
        "padding_share": padding_share([rows for step in steps.steps for rows in step], examples.lengths),
    }


def _begin_anew(student: nn.Module, training: TrainingArguments) -> None:
    """Every training has an engine of its own, also the next fold's over the same student.

    The one before ends here and not with its training, as ZeRO-3's weights are only whole, in `predict`,
    through its hooks. Accelerate refuses a second DeepSpeed plugin until its state is reset, as the
    Trainer's own hyperparameter search does it.
    """
    engine = student.__dict__.pop(ENGINE, None)
    if engine is not None:
        engine.destroy()
    gc.collect()  # DDP's hooks on the gradients go with its trainer, which a cycle keeps
    if not training.deepspeed:
        return
    training.hf_deepspeed_config = HfTrainerDeepSpeedConfig(training.deepspeed)
    training.hf_deepspeed_config.trainer_config_process(training)
    training.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=training.hf_deepspeed_config)
    AcceleratorState._reset_state()


def _check_engine(trainer: Trainer, training: TrainingArguments) -> None:
    """A DeepSpeed config that is silently ignored would train, and report, something else."""
    if training.deepspeed and type(trainer.model_wrapped).__name__ != "DeepSpeedEngine":
        raise ModelError(
            f"deepspeed was asked for, but the model ran as {type(trainer.model_wrapped).__name__}"
        )


def predict(
    model: nn.Module, examples: Examples, rows: Rows, batch_tokens: int, precision: str = "fp32"
) -> NDArray[np.float32]:
    """Raw logits (len(rows), C), float32, in the order of `rows`; every row once, whatever the ranks.

    Raises ModelError naming the row where a logit is not finite.
    """
    batches = sorted_batches(rows, examples.lengths, batch_tokens)
    # under ZeRO-3 every rank must run equally many forwards: the last one, the shortest, is run again
    # where their number does not divide, and counted once
    fill = -len(batches) % ranks.world()
    mine = (batches + batches[-1:] * fill)[ranks.rank() :: ranks.world()]
    device = next(model.parameters()).device
    found: dict[int, NDArray[np.float32]] = {}
    bar = tqdm(mine, "logits", delay=5, leave=False, disable=not ranks.is_main())
    with _inference(model), autocast(precision, device):
        for batch in bar:
            inputs = {name: tensor.to(device) for name, tensor in examples.inputs(batch).items()}
            logits = class_logits(model, **inputs).cpu().numpy()
            found.update(zip(batch.tolist(), logits, strict=True))
    merged = {row: logits for part in ranks.gather(found) for row, logits in part.items()}
    result = np.stack([merged[row] for row in rows.tolist()]) if len(rows) else np.zeros((0, 0), np.float32)
    _check_finite(result, (examples.ids[row] for row in rows.tolist()))
    return result


def _check_finite(logits: NDArray[np.float32], ids: Iterable[str]) -> None:
    if np.isfinite(logits).all():
        return
    bad = [id for id, row in zip(ids, logits, strict=True) if not np.isfinite(row).all()]
    raise ModelError(f"logits of {len(bad)} rows are not finite, first {bad[:3]}; try precision: fp32")


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is as before afterwards.

    nf4 layers stay in training mode: in evaluation bitsandbytes repacks them for the CPU, which
    breaks the next backward. They hold no dropout, so nothing else depends on it.
    """
    was_training = model.training
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def dev_log_loss(
    model: nn.Module, examples: Examples, rows: Rows, batch_tokens: int, precision: str
) -> float:
    """Mean negative log-likelihood of the hard labels."""
    logits = torch.from_numpy(predict(model, examples, rows, batch_tokens, precision))
    labels = torch.from_numpy(examples.labels[rows])
    return float(torch.nn.functional.cross_entropy(logits, labels))


def split(training: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A section's hyperparameters as keyword arguments: those of `arguments`, those of `fit`."""
    batching = {"batch_rows", "batch_tokens", "evaluations", "gradient_checkpointing"}
    trainer = {name: value for name, value in training.items() if name not in batching}
    return trainer, {name: value for name, value in training.items() if name in batching}
