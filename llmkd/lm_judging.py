"""Stage 06 of a language model: teachers, the student before and after, and its artifacts, side by side."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkd import units
from llmkd.inputs import base, prepared
from llmkd.lm import load_teacher, tokenizer_of, vocabulary
from llmkd.lm_rows import examples
from llmkd.loading import load_base, load_model
from llmkd.schema import Config
from llmkd.schema_models import Llm
from llmkd.settings import text_settings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from llmkd.batches import Examples

PROMPT = 16  # tokens, at most, of a text that is gone on with


def judge(config: Config, paths: Mapping[str, Path], *, whole: bool) -> dict[str, Any]:
    """Each model's figures by `evaluate_lm` on the test rows, and its greedy continuations of some.

    paths: artifacts by name. whole: this run's student too, before and after, and its baseline.
    Returns {"teachers": {name: figures}, name: figures, "size_bytes", "continuations"}, and with both
    "merged" and "quantized" "drift": the KL and the agreement of the latter with the former. The student's
    and the baseline's figures are means over the folds, and their continuations the last fold's.
    """
    from llmkd.generation import check_packing, evaluate_lm
    from llmkd.models.artifact import size_bytes

    asked, tokenizer = config.evaluate, tokenizer_of(config)
    vocab = vocabulary(config, tokenizer)
    settings = text_settings(config, config.student)
    settings["max_tokens"] = asked.max_tokens or settings["max_tokens"]
    rows, counts = examples(prepared(config)[0], tokenizer, "test", **settings)
    prompts = _prompts(rows, asked.continuations)
    said: dict[str, list[str]] = {}

    def figures(name: str, model: nn.Module, teachers: Mapping[str, nn.Module]) -> dict[str, float]:
        if config.task.pack:
            check_packing(model)
        said[name] = _said(model, tokenizer, prompts, asked.new_tokens, vocab)
        return evaluate_lm(
            model,
            rows,
            np.arange(len(rows.ids)),
            batch_tokens=asked.batch_tokens,
            vocab=vocab,
            teachers=teachers,
            precision=asked.precision,
        )

    teachers = {
        which.name: load_teacher(config, which, asked.precision)
        for which in config.teachers
        if isinstance(which, Llm)
    }
    metrics: dict[str, Any] = {"rows": counts}
    metrics["teachers"] = {name: figures(f"teacher {name}", one, {}) for name, one in teachers.items()}
    merged: nn.Module | None = None
    candidates = {**(_led_to(config) if whole else {}), **_artifacts(config, paths, tokenizer, whole)}
    for name, loads in candidates.items():
        extra = {"merged": merged} if name == "quantized" and merged is not None else {}
        found = []
        for load in loads:
            gc.collect()
            model = load()
            found.append(figures(name, model, {**teachers, **extra}))
        metrics[name] = _mean(found)
        merged = model if name == "merged" else merged
    if "kl/merged" in metrics.get("quantized", {}):
        drift = {what: metrics["quantized"].pop(f"{what}/merged") for what in ("kl", "agreement")}
        metrics["drift"] = drift
    metrics["size_bytes"] = {name: size_bytes(path) for name, path in paths.items()}
    texts = [str(tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in prompts]
    metrics["continuations"] = [
        {"prompt": text, "said": {name: found[i] for name, found in said.items()}}
        for i, text in enumerate(texts)
    ]
    return metrics


def _mean(folds: list[dict[str, float]]) -> dict[str, float]:
    means = {name: sum(one[name] for one in folds) / len(folds) for name in folds[0]}
    return {**means, "perplexity": math.exp(means["nll"])}


def _led_to(config: Config) -> dict[str, list[Callable[[], Any]]]:
    """How to load this run's student before any training, its baseline's folds, and the student's."""
    from llmkd.models.load import on_device
    from llmkd.models.lora import load_trained

    student, precision = config.student, config.evaluate.precision
    source = base(config, student)[0]

    def trained(recipe: units.Recipe) -> Any:
        model, _ = load_model(config, student, source, (), precision)
        load_trained(model, recipe.directory / "adapter")
        return model

    def folds(kind: str) -> list[Callable[[], Any]]:
        return [partial(trained, recipe) for recipe in units.students(config, kind)]

    before = [lambda: on_device(load_base(config, student, source, (), precision)[0])]
    baseline = {"baseline": folds("baseline")} if config.distill_of(student).baseline else {}
    return {"before": before, **baseline, "student": folds("student")}


def _artifacts(
    config: Config, paths: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase, own: bool
) -> dict[str, list[Callable[[], Any]]]:
    """How to load model directories, `own` ones of this run or others. ConfigError for another vocabulary."""
    import torch

    from llmkd.models.artifact import load_artifact
    from llmkd.tasks.causal_lm import shared_vocabulary

    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if config.evaluate.precision == "fp32" else None
    trust = own and config.student.trust_remote_code  # the word is of the student's own code alone

    def load(path: Path) -> Any:
        model, reader = load_artifact(path, device=device, dtype=dtype, causal=True, trust_remote_code=trust)
        shared_vocabulary(tokenizer, {str(path): reader})  # type: ignore[dict-item]
        return model

    return {name: [partial(load, path)] for name, path in paths.items()}


def _prompts(rows: Examples, count: int) -> list[list[int]]:
    """The first rows' tokens up to the first target; where that is the row's second token, up to its half."""
    found = []
    for row in range(min(count, len(rows.ids))):
        at = np.array([row])
        ids = rows.inputs(at)["input_ids"][0].tolist()
        marked = rows.beside["targets"](at)["mask"][0].tolist() if "targets" in rows.beside else [False, True]
        first = marked.index(True)
        found.append(ids[: first if first > 1 else max(1, min(PROMPT, len(ids) // 2))])
    return found


def _said(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    new_tokens: int,
    vocab: int,
) -> list[str]:
    from llmkd.generation import continuations

    if not prompts:
        return []
    pad, eos = int(tokenizer.pad_token_id), tokenizer.eos_token_id  # type: ignore[arg-type]
    said = continuations(
        model,
        prompts,
        max_new_tokens=new_tokens,
        vocab=vocab,
        pad_id=pad,
        eos_id=eos,  # type: ignore[arg-type]
    )
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in said]


def summary(metrics: Mapping[str, Any]) -> str:
    """metrics.json as a table for a person, with what each model says after some prompts."""
    teachers = list(metrics["teachers"])
    rows = {f"teacher {name}": metrics["teachers"][name] for name in teachers}
    shown = ("before", "baseline", "student", "merged", "quantized", "artifact")
    rows |= {name: metrics[name] for name in shown if name in metrics}
    heads = "".join(f"{'KL to ' + name:>16}{'same top word':>15}" for name in teachers)
    lines = [f"{'test texts':20}{'perplexity':>12}{'targets':>9}{'tokens/s':>10}{heads}"]
    for name, row in rows.items():
        line = f"{name:20}{row['perplexity']:12.4f}{row['tokens']:9.0f}{row['tokens_per_second']:10.0f}"
        found = [(row.get(f"kl/{one}"), row.get(f"agreement/{one}")) for one in teachers]
        lines.append(line + "".join(f"{kl:16.4f}{same:15.2%}" for kl, same in found if kl is not None))
    if "drift" in metrics:
        size, drift = metrics["size_bytes"], metrics["drift"]
        lines.append(
            f"quantized against merged: {size['quantized'] / size['merged']:.2f} of the bytes, "
            f"KL {drift['kl']:.1e}, same top word in {drift['agreement']:.2%}"
        )
    for one in metrics["continuations"]:
        lines += ["", f"{'prompt':20}{_line(one['prompt'])}"]
        lines += [f"{name:20}{_line(text)}" for name, text in one["said"].items()]
    return "\n".join(lines)


def _line(text: str) -> str:
    return " ".join(text.split())
