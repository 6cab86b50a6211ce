"""What one would write without llmkd: a loop in plain PyTorch, and the stock Hugging Face Trainer.

Both also as ranks under torchrun, where a step's micro-batches are dealt out and gradients meet once a step.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from typing import Any

import numpy as np
import torch
from torch import distributed, nn


def recipe_loss(logits: torch.Tensor, labels: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
    """(CE + Σ KL + Σ cosine) / 5 as the reference recipe writes it; a mean over the batch."""
    from torch.nn.functional import cosine_embedding_loss, cross_entropy, kl_div

    logits = logits.float()
    loss = cross_entropy(logits, labels)
    for teacher in teachers.unbind(1):  # (B, C)
        loss = loss + kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
        one = torch.ones(len(logits), device=logits.device)
        loss = loss + cosine_embedding_loss(logits.softmax(-1), teacher.softmax(-1), one)
    return loss / (1 + 2 * teachers.shape[1])


def world() -> tuple[int, int]:
    """This rank's number, and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def over_ranks(total: float, count: int) -> float:
    """The mean over all ranks' rows."""
    both = torch.tensor([total, count], dtype=torch.float64)
    if world()[1] > 1:
        distributed.all_reduce(both)
    return float(both[0] / both[1])


def add_gradients(trained: list[nn.Parameter]) -> None:
    """Summed over ranks, in one message."""
    if world()[1] == 1:
        return
    gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in trained]
    whole = nn.utils.parameters_to_vector(gradients)
    distributed.all_reduce(whole)
    for value, part in zip(trained, whole.split([one.numel() for one in gradients]), strict=True):
        value.grad = part.view_as(value)


def plain(model: nn.Module, data: Any, asked: argparse.Namespace, micro: int) -> float:
    from llmkd.models.pooling import autocast

    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=asked.lr, betas=(0.9, 0.95), weight_decay=0)
    steps = math.ceil(len(data.ids) / asked.step_rows)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, total, seen = np.random.default_rng(3).permutation(len(data.ids)), 0.0, 0
    number, many = world()
    model.train()
    for begin in range(0, len(order), asked.step_rows):
        step = order[begin : begin + asked.step_rows]
        for at in range(micro * number, len(step), micro * many):
            rows = step[at : at + micro]
            teachers, labels = (
                torch.from_numpy(data.teacher_logits[rows]),
                torch.from_numpy(data.labels[rows]),
            )
            with autocast(asked.precision, "cpu"):
                logits = model(**data.inputs(rows)).logits
            loss = recipe_loss(logits, labels, teachers)
            (loss * len(rows) / len(step)).backward()
            total, seen = total + loss.item() * len(rows), seen + len(rows)
        add_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return over_ranks(total, seen)


def stock(model: nn.Module, data: Any, asked: argparse.Namespace, micro: int) -> float:
    """As its documentation shows it. Returns the mean loss of all rows."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from llmkd.models.load import train_tokenizer

    total, (_, many) = [], world()
    micro = min(micro, asked.step_rows // many)

    class Distilling(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **more: Any) -> torch.Tensor:
            labels, teachers = inputs.pop("labels"), inputs.pop("teacher_logits")
            loss: torch.Tensor = recipe_loss(model(**inputs).logits, labels, teachers)
            total.append((loss.item(), len(labels)))
            return loss

    rows = [
        {
            "input_ids": data.inputs(torch.tensor([row]).numpy())["input_ids"][0].tolist(),
            "label": int(data.labels[row]),
            "teacher_logits": data.teacher_logits[row].tolist(),
        }
        for row in range(len(data.ids))
    ]
    with tempfile.TemporaryDirectory() as directory:
        training = TrainingArguments(
            directory,
            num_train_epochs=1,
            learning_rate=asked.lr,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=asked.step_rows // (micro * many),
            adam_beta2=0.95,
            bf16=asked.precision == "bf16",
            use_cpu=True,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
        )
        collator = DataCollatorWithPadding(train_tokenizer(["any words will do"], 300))
        Distilling(model=model, args=training, train_dataset=rows, data_collator=collator).train()
    return over_ranks(sum(loss * count for loss, count in total), sum(count for _, count in total))
