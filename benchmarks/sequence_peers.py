"""Sequence distillation as one does it without llmkd: whole logits in a stock Trainer, and TRL's trainers.

Imports nothing of llmkd: it runs in TRL's own environment too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from student import DTYPES
from torch.nn.functional import kl_div


def prepared(way: str) -> Callable[[argparse.Namespace, Path], float]:
    """The way's training, with all that it imports imported."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import Trainer  # noqa: F401

    if way == "trl":
        from trl import DistillationTrainer  # noqa: F401
    if way == "gkd":
        from trl.experimental.gkd import GKDTrainer  # noqa: F401
    return {"plain": plain, "trl": distillation, "gkd": gkd}[way]


def dtypes(asked: argparse.Namespace) -> dict[str, torch.dtype]:
    """In which student and teacher are held."""
    return {"student": torch.float32, "teacher": DTYPES[asked.precision]}


def models(asked: argparse.Namespace, directory: Path) -> tuple[Any, Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load = AutoModelForCausalLM.from_pretrained
    student, teacher = (load(directory / name, dtype=dtype) for name, dtype in dtypes(asked).items())
    return student, teacher.eval(), AutoTokenizer.from_pretrained(directory / "student")


def settings(asked: argparse.Namespace, directory: Path) -> dict[str, Any]:
    return {
        "output_dir": str(directory / "out"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": asked.batch,
        "learning_rate": asked.lr,
        "lr_scheduler_type": "cosine",
        "bf16": asked.precision == "bf16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def trained(trainer: Any) -> float:
    """Mean loss of all steps."""
    trainer.train()
    return float(np.mean([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))


def batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Every token but the first is a target."""
    ids = torch.tensor([row["input_ids"] for row in rows])  # (B, L)
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def plain(asked: argparse.Namespace, directory: Path) -> float:
    from transformers import Trainer, TrainingArguments

    student, teacher, _ = models(asked, directory)

    class Distilling(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **more: Any) -> torch.Tensor:
            inputs.pop("labels")
            with torch.no_grad():
                wanted = teacher(**inputs).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)  # (N, V)
            said = model(**inputs).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)  # (N, V)
            return kl_div(said, wanted, reduction="batchmean", log_target=True)

    training = TrainingArguments(**settings(asked, directory))
    rows = [{"input_ids": row} for row in np.load(directory / "rows.npy").tolist()]
    return trained(Distilling(student, training, train_dataset=rows, data_collator=batch))


def gkd(asked: argparse.Namespace, directory: Path) -> float:
    """Off its own policy (lmbda 0), forward KL (beta 0)."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, tokenizer = models(asked, directory)
    training = GKDConfig(**settings(asked, directory), lmbda=0.0, beta=0.0, temperature=1.0)
    rows = Dataset.from_dict({"input_ids": np.load(directory / "rows.npy").tolist()})
    more = {"processing_class": tokenizer, "train_dataset": rows, "data_collator": batch}
    return trained(GKDTrainer(student, teacher, training, **more))


def distillation(asked: argparse.Namespace, directory: Path) -> float:
    """Forward KL (beta 0); the rows stand for what it would have generated."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    student, teacher, tokenizer = models(asked, directory)
    ids = torch.from_numpy(np.load(directory / "rows.npy"))  # (rows, L)

    class Given(DistillationTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
            found = ids[[row["row"] for row in inputs]]
            prompt, completion = found[:, :1], found[:, 1:]
            masks = {"prompt_mask": torch.ones_like(prompt), "completion_mask": torch.ones_like(completion)}
            count = torch.tensor(float(completion.numel()))
            return {"prompt_ids": prompt, "completion_ids": completion, **masks, "num_items_in_batch": count}

    more = {"beta": 0.0, "temperature": 1.0, "max_completion_length": asked.length - 1}
    training = DistillationConfig(**settings(asked, directory), **more)
    rows = Dataset.from_dict({"prompt": ["x"] * len(ids), "row": list(range(len(ids)))})
    return trained(Given(student, teacher, training, train_dataset=rows, processing_class=tokenizer))
