"""One call: classifiers that teach, a model that learns and labelled rows in; a model directory out.

What the stages do over folds, once and without a run: the same examples, objective, training step and scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkd import crossfit, ranks, run
from llmkd.errors import ConfigError, RunError
from llmkd.evaluate import Logits, scores, softmax
from llmkd.given import Given, declared, given, label_names, labelled_rows, name_of
from llmkd.objective import HARD, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmkd.batches import Examples, Rows
    from llmkd.given import Data, Source

STAGE = "distill_model"  # what the manifest of a directory calls its maker
METHODS = ("cached", "online")
WITH_CONFIG = (
    "feature",
    "self_distillation",
    "mutual",
    "sequence",
)  # methods that need more than a call takes
COLUMNS = {"classification": ("text",), "preference": ("prompt", "response_a", "response_b")}


class Distilled(NamedTuple):
    student: PreTrainedModel
    metrics: dict[str, Any]


def distill_model(
    teacher: Source | list[Source],
    student: Source,
    train_dataset: Data,
    eval_dataset: Data | None = None,
    output_dir: str | Path = "distilled",
    *,
    temperature: float = 4.0,
    alpha: float = 0.7,
    epochs: float = 5,
    method: Literal["cached", "online"] = "cached",
    tokenizer: PreTrainedTokenizerBase | None = None,
    kind: Literal["classification", "preference"] = "classification",
    text_column: str = "text",
    label_column: str = "label",
    labels: Sequence[str] | None = None,
    baseline: bool = False,
    dev_share: float = 0.1,
    lora: Mapping[str, Any] | None = None,
    learning_rate: float = 5e-5,
    batch_rows: int = 32,
    batch_tokens: int = 8192,
    max_tokens: int = 512,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    teacher_load_in: Literal["auto", "fp32", "bf16", "nf4", "int8"] = "auto",
    seed: int = 42,
) -> Distilled:
    """Train a student by α T² KL(teacher || student) + (1 - α) CE (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        teacher: a sequence classifier that is fine-tuned already; of a list, whose labels and their order
            must agree, the mean of the KLs is taken. Objects are not copied; `online` freezes them.
        student: any checkpoint that can become a sequence classifier, or such a classifier as an object,
            which is trained in place. Models are hub ids, directories or objects, or a tuple of one of
            these and its tokenizer; `tokenizer` is for the objects that come without.
        train_dataset: a datasets.Dataset, a pyarrow Table, a DataFrame, or what `llmkd.sources.read` reads.
            Labels are ints or names; rows labelled -1 learn from the teachers alone.
        eval_dataset: rows that are only scored; training rows with the same texts are left out.
        output_dir: gets the model, its tokenizer and a manifest.json, all at once, when the student is
            trained. What an earlier call wrote there is replaced, anything else is refused.
        method: `cached` runs the teachers over the rows once, `online` in every step, for the same loss.
        kind: a row is one text (in text_column), or a prompt, response_a and response_b.
        labels: their names in order; else those of the teacher, or those of the dataset.
        baseline: also train the student, from the same start, on the labels alone.
        dev_share: this share of the training rows is not learnt from but chooses the checkpoint, by log
            loss; 0 keeps the last one.
        lora: r, alpha, and dropout and targets if wanted; the adapter is merged before saving. Without it
            every weight learns. Either way the student is held in float32.
        batch_rows: rows of an optimizer step; they are cut into micro-batches of batch_tokens.
        teacher_load_in: how teachers given by name are held; auto is the precision they compute in.

    Returns the student in evaluation mode and the metrics: rows (train, dev, eval, left_out), steps,
    dev_log_loss and, with an eval_dataset, the `llmkd.evaluate.scores` of student, baseline and, in a
    list, teachers. Raises an LlmkdError of one line, before training, for what cannot be used.
    """
    _check_arguments(temperature, alpha, method, kind, dev_share, precision, lora)
    if baseline and eval_dataset is None:
        raise ConfigError("baseline=True has nothing to be scored on: give an eval_dataset")
    if teacher == []:
        raise ConfigError("teacher=[] teaches nothing: give at least one model")
    several = teacher if isinstance(teacher, list) else [teacher]
    teachers = [given("teacher", one, tokenizer, max_tokens) for one in several]
    pupil = given("student", student, tokenizer, max_tokens)
    names = label_names(teachers, pupil, labels, declared(train_dataset, label_column))
    source = {"train": train_dataset, **({} if eval_dataset is None else {"test": eval_dataset})}
    columns = {name: text_column if kind == "classification" else name for name in COLUMNS[kind]}
    ranks.start()
    table, parts, left_out = labelled_rows(source, kind, columns, label_column, names, dev_share, seed)

    from llmkd.models.pooling import resolve_precision

    arithmetic = resolve_precision(precision)
    training = {"epochs": epochs, "learning_rate": learning_rate, "batch_rows": batch_rows}
    settings = {
        "models": {"teachers": [name_of(one) for one in teachers], "student": name_of(pupil), "lora": lora},
        "loss": {"temperature": temperature, "alpha": alpha, "method": method},
        "rows": {"kind": kind, "labels": names, "dev_share": dev_share, "max_tokens": max_tokens},
        "training": {**training, "precision": arithmetic},
    }
    with _writing(Path(output_dir).resolve(), settings, seed, [*teachers, pupil]) as unit:
        model, metrics = _learn(
            teachers,
            pupil,
            parts,
            names,
            unit.path,
            objective=hinton(len(teachers), temperature, alpha),
            read=partial(crossfit.text_examples, table, kind=kind, template=None, max_tokens=max_tokens),
            truth=table["label"].to_numpy().astype(np.int64)[parts["eval"]],
            online=method == "online",
            baseline=baseline,
            lora=lora,
            held_in=arithmetic if teacher_load_in == "auto" else teacher_load_in,
            precision=arithmetic,
            training={**training, "batch_tokens": batch_tokens, "seed": seed},
        )
        unit.metrics.update(metrics)
        unit.rows.update({part: len(at) for part, at in parts.items()}, left_out=left_out)
        if ranks.is_main():
            model.save_pretrained(unit.path)
            pupil.tokenizer.save_pretrained(unit.path)
    return Distilled(model, {"rows": unit.rows, **metrics})


def _learn(
    teachers: Sequence[Given],
    pupil: Given,
    parts: Mapping[str, Rows],
    labels: Sequence[str],
    directory: Path,
    *,
    objective: Objective,
    read: Callable[[PreTrainedTokenizerBase], Examples],
    truth: NDArray[np.int64],
    online: bool,
    baseline: bool,
    lora: Mapping[str, Any] | None,
    held_in: str,
    precision: str,
    training: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Run the teachers, train the baseline and the student, and score them all on the rows of eval.

    truth: the labels of those rows. training: keyword arguments as `llmkd.train.split` takes them.
    """
    from llmkd.methods.cached import Cached
    from llmkd.methods.online import Online
    from llmkd.models.lora import load_trainable, trainable_state
    from llmkd.train import arguments, fit, predict, split

    trainer, batching = split(training)
    schedule = arguments(directory, **trainer)
    logits = partial(predict, batch_tokens=batching["batch_tokens"], precision=precision)
    examples, running, said = _taught(
        teachers,
        read(pupil.tokenizer),
        parts,
        online=online,
        load=lambda one: _loaded(one, labels, held_in, schedule.seed),
        read=read,
        logits=logits,
    )
    network, found = _learner(pupil, labels, lora, schedule.seed), {}
    if baseline:
        start = trainable_state(network)
        labelled = parts["train"][examples.labels[parts["train"]] >= 0]
        fit(Cached(network, HARD, precision), examples, labelled, schedule, dev=parts["dev"], **batching)
        found["baseline"] = scores(softmax(logits(network, examples, parts["eval"])), truth)
        load_trainable(network, start)
    method = (
        Online(network, objective, running, precision) if online else Cached(network, objective, precision)
    )
    history = fit(method, examples, parts["train"], schedule, dev=parts["dev"], **batching)
    model = _merged(network)
    metrics = {"steps": history["steps"], "dev_log_loss": history["best"], **found}
    if len(parts["eval"]):
        metrics["student"] = scores(softmax(logits(model, examples, parts["eval"])), truth)
        metrics["teachers"] = [scores(softmax(one), truth) for one in said]
    return model, metrics


def hinton(teachers: int, temperature: float, alpha: float) -> Objective:
    """α mean over teachers of T² KL + (1 - α) CE; the teachers are called teacher0, teacher1, ..."""
    terms = {name: weight for name, weight in (("ce", 1 - alpha), ("kl", alpha)) if weight}
    names = [f"teacher{i}" for i in range(teachers)]
    return Objective(terms, names, [1 / teachers] * teachers, [temperature] * teachers, normalize=False)


def _check_arguments(
    temperature: float,
    alpha: float,
    method: str,
    kind: str,
    dev_share: float,
    precision: str,
    lora: Mapping[str, Any] | None,
) -> None:
    if method in WITH_CONFIG:
        raise ConfigError(
            f"method={method!r} takes more than one call does: write a config with "
            f"distill: {{method: {method}}} and run stages/03_distill.py"
        )
    for name, value, known in (
        ("method", method, METHODS),
        ("kind", kind, tuple(COLUMNS)),
        ("precision", precision, ("auto", "bf16", "fp32")),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is unknown: use {' or '.join(known)}")
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} does not divide logits: take one above 0")
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha={alpha} is no share of the loss: take one from 0 to 1")
    if not 0 <= dev_share <= 0.5:
        raise ConfigError(f"dev_share={dev_share} is no part of the training rows: take one from 0 to 0.5")
    if lora is not None and not {"r", "alpha"} <= set(lora) <= {"r", "alpha", "dropout", "targets"}:
        raise ConfigError(
            f"lora={dict(lora)}: give r and alpha, dropout and targets if wanted, and nothing else"
        )


def _writing(
    directory: Path, settings: Mapping[str, Any], seed: int, models: Sequence[Given]
) -> AbstractContextManager[run.Unit]:
    """`run.writing`, but never over one of the models, nor over what a stage made."""
    for one in models:
        if isinstance(one.model, str) and Path(one.model).resolve() == directory:
            raise RunError(
                f"output_dir {directory} is the {one.who.split()[0]}'s own: name another directory"
            )
    if (directory / run.MANIFEST).is_file() and run.manifest(directory)["stage"] != STAGE:
        raise RunError(f"output_dir {directory} belongs to a run: name another directory")
    return run.writing(directory, STAGE, settings, {}, seed)


def _loaded(one: Given, labels: Sequence[str], load_in: str, seed: int) -> PreTrainedModel:
    """The model on its device: read now where a name was given."""
    import torch

    from llmkd.models.load import load_classifier

    model = one.model
    if isinstance(model, str):
        pad = int(one.tokenizer.pad_token_id)  # type: ignore[arg-type]
        model = load_classifier(model, labels, load_in=load_in, pad_id=pad, seed=seed)
    if torch.cuda.is_available() and not getattr(model.config, "quantization_config", None):
        model.to("cuda")  # type: ignore[arg-type]
    return model


def _taught(
    teachers: Sequence[Given],
    examples: Examples,
    parts: Mapping[str, Rows],
    *,
    online: bool,
    load: Callable[[Given], PreTrainedModel],
    read: Callable[[PreTrainedTokenizerBase], Examples],
    logits: Callable[[PreTrainedModel, Examples, Rows], Logits],
) -> tuple[Examples, dict[str, Any], list[Logits]]:
    """The student's examples with the teachers' logits, or their inputs, beside them; the teachers that run
    on; and the logits of each on the rows of eval. One that is cached is gone before the next is loaded."""
    running, beside, columns, evaluated = {}, {}, [], []
    for i, one in enumerate(teachers):
        network, own = load(one), read(one.tokenizer)
        evaluated.append(logits(network, own, parts["eval"]))  # (rows, C)
        if online:
            running[f"teacher{i}"], beside[f"teacher{i}"] = network, own.inputs
        else:
            columns.append(logits(network, own, parts["train"]))  # (rows, C)
        del network
    if online:
        return replace(examples, beside=beside), running, evaluated
    heard = np.zeros((len(examples.ids), len(columns), columns[0].shape[1]), dtype=np.float32)  # (N, T, C)
    heard[parts["train"]] = np.stack(columns, axis=1)
    return examples.with_teachers(heard), {}, evaluated


def _learner(one: Given, labels: Sequence[str], lora: Mapping[str, Any] | None, seed: int) -> Any:
    """The student in float32, with its labels' names, and its adapter where there is one."""
    from transformers import set_seed

    from llmkd.models.lora import add_lora

    model: Any = _loaded(one, labels, "fp32", seed).float()
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {name: i for i, name in enumerate(labels)}
    model.config.get_text_config().pad_token_id = one.tokenizer.pad_token_id
    set_seed(seed)  # of the adapter, whatever was loaded before
    return add_lora(model, **lora) if lora else model


def _merged(network: Any) -> PreTrainedModel:
    """The model itself, its adapter added to its weights: exact, as both are float32."""
    if hasattr(network, "peft_config"):
        network = network.merge_and_unload().requires_grad_(True)
    return network.eval()  # type: ignore[no-any-return]
