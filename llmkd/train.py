"""The one training step: the Hugging Face Trainer around a method, and inference over the same batches."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from numpy.typing import NDArray
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.trainer_utils import set_seed

from llmkd import checkpoint, interrupt, ranks
from llmkd.batches import Examples, Rows, Steps, padding_share, sorted_batches
from llmkd.errors import ConfigError, DataError, ModelError, Stopped
from llmkd.kept import Kept, in_order
from llmkd.models.lora import load_trainable
from llmkd.models.pooling import autocast, class_logits, without_dropout
from llmkd.progress import bar
from llmkd.resume import Saving, keeping, load_learnt
from llmkd.steps import KeepBest, StepTrainer
from llmkd.tracking import Track, tracked

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
    on_nan: str = "stop",
    checkpoints: Path | None = None,
    checkpoint_minutes: float = 10,
    track: Track | None = None,
) -> dict[str, Any]:
    """Train `method` on the rows `train`; with `dev` rows, leave it where its student's log loss was lowest.

    That goes for all that the method trains: heads, projectors and peers follow the student's checkpoint.

    checkpoints: a directory that is this training's own. Every `checkpoint_minutes`, and on SIGTERM or
    Ctrl-C, the training is saved there, and begun again it goes on from there; when it is whole, it is not
    done again. on_nan: "stop", or "skip" steps whose loss or gradient is not finite.
    track: where its curves are kept, if anywhere.

    Returns the history: {"loss": [every log entry], "dev": [{step, dev_log_loss}], "steps", "best",
    "padding_share", "skipped": [the ids of each step that was skipped]}.
    Raises DataError without rows, ModelError naming the rows where a loss or gradient is not finite,
    Stopped after a signal, once it is saved.
    """
    if not len(train):
        raise DataError("no rows to train on; check folds.count and the prepared rows")
    if on_nan == "skip" and training.deepspeed:
        raise ConfigError("on_nan: skip cannot take back a step of DeepSpeed's; use on_nan: stop")
    found = checkpoint.read(checkpoints) if checkpoints else None
    student: nn.Module = method.student  # type: ignore[assignment]
    _begin_anew(student, training)
    if found and "whole" in found[1] and not training.deepspeed:
        load_learnt(method, found)
        return dict(found[1]["whole"])
    if gradient_checkpointing:
        for model in getattr(method, "peers", {"student": student}).values():
            _checkpoint_gradients(model)
    set_seed(training.seed)
    steps = Steps(examples, train, batch_rows, batch_tokens, training.seed, ranks.rank(), ranks.world())
    keep = None
    own = getattr(method, "dev_loss", None)  # a language model's: its rows have no labels
    if dev is not None and own is None:
        dev = dev[examples.labels[dev] >= 0]
    if dev is not None and len(dev):
        precision = str(getattr(method, "precision", "fp32"))
        score = partial(dev_log_loss, student, precision=precision) if own is None else own
        keep = KeepBest(method, partial(score, examples, dev, batch_tokens), evaluations)
    with tracked(track, lambda: keep.history if keep else [], resumed=found is not None) as curves:
        trainer = StepTrainer(
            model=method,
            args=training,
            train_dataset=steps,
            callbacks=[*([keep] if keep else []), *curves],  # type: ignore[list-item]
        )
        trainer.parts, trainer.parts_since = {}, 0
        trainer.on_nan, trainer.skipped, trainer.skipped_since = on_nan, [], 0
        if checkpoints is None:
            trainer.train()
        else:
            _train_on(trainer, Saving(trainer, checkpoints, checkpoint_minutes, method, keep, found), steps)
    _check_engine(trainer, training)
    if training.deepspeed:
        student.__dict__[ENGINE] = trainer.model_wrapped  # as an attribute it would become a submodule
    if keep and keep.state:
        load_trainable(method, keep.state)
    history = {
        "loss": [entry for entry in trainer.state.log_history if "loss" in entry],
        "dev": keep.history if keep else [],
        "best": keep.best if keep else None,
        "steps": trainer.state.global_step,
        "padding_share": padding_share([rows for step in steps.steps for rows in step], examples.lengths),
        "skipped": trainer.skipped,
    }
    if found and "whole" in found[1]:  # under DeepSpeed, whose engine a prediction needs
        return dict(found[1]["whole"])
    if trainer.saving:
        trainer.saving.finish(history)
    return history


def _train_on(trainer: StepTrainer, saving: Saving, steps: Steps) -> None:
    """From the step that the checkpoint holds, or the first. Raises Stopped where a signal ended it early."""
    trainer.saving = saving
    trainer.add_callback(saving)  # after KeepBest: what is saved has been scored
    steps.set_epoch(saving.load() // len(steps))
    with saving.trainer_state() as state, interrupt.deferred():
        trainer.train(resume_from_checkpoint=state)
    signal = ranks.most(interrupt.asked() or 0)
    if signal and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(signal, f"step {trainer.state.global_step} of {trainer.state.max_steps} is saved")


def _checkpoint_gradients(student: Any) -> None:
    """Raises ModelError for a net without layers to checkpoint; one may have no input embeddings to hook."""
    if not getattr(student, "supports_gradient_checkpointing", False):
        raise ModelError(
            f"gradient_checkpointing: {type(student).__name__} has nothing to checkpoint; set it to false"
        )
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(student, "enable_input_require_grads"):
        student.enable_input_require_grads()


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
    model: nn.Module,
    examples: Examples,
    rows: Rows,
    batch_tokens: int,
    precision: str = "fp32",
    *,
    keep: Path | None = None,
    keep_minutes: float = 10,
) -> NDArray[np.float32]:
    """Raw logits (len(rows), C), float32, in the order of `rows`; every row once, whatever the ranks.

    keep: a directory of this prediction's own, for what is found: begun again it asks for the rest alone.
    Raises ModelError naming the row where a logit is not finite.
    """
    found, save = keeping(keep, keep_minutes)
    batches = sorted_batches(rows, examples.lengths, batch_tokens)
    known = found.known(len(examples.lengths))
    batches = [batch for batch in batches if not known[batch].all()]
    # under ZeRO-3 every rank must run equally many forwards: the last one, the shortest, is run again
    # where their number does not divide, and counted once
    fill = -len(batches) % ranks.world()
    mine = (batches + batches[-1:] * fill)[ranks.rank() :: ranks.world()]
    device = next(model.parameters()).device
    odd = Kept()  # not finite: told below, and asked for anew by the next call
    try:
        with inference(model), autocast(precision, device):
            for batch in bar(mine, "logits"):
                inputs = {name: tensor.to(device) for name, tensor in examples.inputs(batch).items()}
                logits = _mean_logits(model, examples.copies(inputs) if examples.copies else [inputs])
                values = logits.cpu().numpy()  # (B, C)
                finite = np.isfinite(values).all(-1)
                fresh = finite & ~known[batch]
                found.add(batch[fresh], values[fresh])
                odd.add(batch[~finite], values[~finite])
                save(False)
    finally:  # also of what a signal or an error ends
        save(True)
    result = in_order(rows, [part for both in ranks.gather([found.joined(), odd.joined()]) for part in both])
    _check_finite(result, (examples.ids[row] for row in rows.tolist()))
    return result


def _mean_logits(model: nn.Module, copies: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
    """A batch's logits (B, C), the mean over its copies."""
    return torch.stack([class_logits(model, **inputs) for inputs in copies]).mean(0)


def _check_finite(logits: NDArray[np.float32], ids: Iterable[str]) -> None:
    if np.isfinite(logits).all():
        return
    bad = [id for id, row in zip(ids, logits, strict=True) if not np.isfinite(row).all()]
    raise ModelError(f"logits of {len(bad)} rows are not finite, first {bad[:3]}; try precision: fp32")


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is as before afterwards."""
    was_training = model.training
    without_dropout(model)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def dev_log_loss(
    model: nn.Module, examples: Examples, rows: Rows, batch_tokens: int, precision: str
) -> float:
    """Mean negative log-likelihood of the hard labels; images as they are, averaged over no shifts."""
    examples = replace(examples, copies=None)
    logits = torch.from_numpy(predict(model, examples, rows, batch_tokens, precision))
    labels = torch.from_numpy(examples.labels[rows])
    return float(torch.nn.functional.cross_entropy(logits, labels))


def split(training: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A section's hyperparameters as keyword arguments: those of `arguments`, those of `fit`."""
    batching = {"batch_rows", "batch_tokens", "evaluations", "gradient_checkpointing"}
    batching |= {"on_nan", "checkpoint_minutes"}
    trainer = {name: value for name, value in training.items() if name not in batching}
    return trainer, {name: value for name, value in training.items() if name in batching}
