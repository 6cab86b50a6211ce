"""What a stage makes a thing from, as far as the config says: the part of it that enters a fingerprint."""

from __future__ import annotations

from typing import Any

from llmkd.config import science
from llmkd.schema import Config
from llmkd.schema_models import External, Lightgbm, Llm, Model


def prepare_settings(config: Config) -> dict[str, Any]:
    """What stage 00 makes rows from."""
    task = science(config.task)
    for name in ("max_tokens", "max_words", "template", "mask_prompt", "pack"):  # of tokens, not of rows
        task.pop(name)
    if task["rows"] is None:
        task.pop("rows")
    if task["image"]:
        task["image"].pop("shift")
    return {"task": task, "folds": science(config.folds), "seed": config.seed}


def pretrain_settings(config: Config, model: Model) -> dict[str, Any]:
    """What stage 01 makes a model from."""
    names = ("model", "layers", "init", "pad_token", "trust_remote_code")
    settings = {key: model_settings(model)[key] for key in names}
    settings["phases"] = [science(phase) for phase in phases(config, model)]
    settings["task"] = {key: science(config.task)[key] for key in ("kind", "swap")}
    settings["task"] |= {
        "labels": config.task.labels,
        "leaks": config.task.leaks,
        "group": config.folds.group,
    }
    text = text_settings(config, model)
    text.pop("average_shifts", None)  # of what is cached, by which no weight is made
    if config.task.kind == "causal_lm":  # its phases read plain texts
        text = {"max_tokens": text["max_tokens"]}
    settings |= {"precision": config.precision, "text": text}
    if model.is_net:  # what the spec of its inputs is fitted by
        settings["features"] = config.task.features and science(config.task.features)
        settings["image"] = config.task.image and list(config.task.image.shape)
    return {**settings, "seed": seed_of(config, model)}


def seed_of(config: Config, model: Model) -> int:
    """The run's seed; a further one for each further model that starts alike, or they would be clones."""
    alike = [one.name for one in config.models if (one.model, one.init) == (model.model, model.init)]
    return config.seed + alike.index(model.name)


def is_made(config: Config, model: Model) -> bool:
    """Whether stage 01 makes it; else it starts from its checkpoint as it is."""
    return bool(model.init or model.layers or phases(config, model))


def phases(config: Config, model: Model) -> list[Any]:
    """The pretraining phases that are for this model."""
    return [phase for phase in config.pretrain if phase.models is None or model.name in phase.models]


def text_settings(config: Config, model: Model) -> dict[str, Any]:
    """How rows become text for one model: part of the fingerprint of all it makes."""
    task = config.task
    if model.is_net:  # it reads features or pixels, as stage 00 left them
        shift = task.image.shift if task.image else 0
        most = getattr(model, "average_shifts", 0)  # a teacher's alone
        averaged = {"average_shifts": most} if most else {}
        return {"shift": shift if model.shift is None else model.shift, **averaged}
    if task.kind == "causal_lm":
        settings = {"max_tokens": model.max_tokens or task.max_tokens, "pack": task.pack}
        return {**settings, "chats": "messages" in task.columns, "mask_prompt": task.mask_prompt}
    return {
        "template": task.template,
        "max_tokens": model.max_tokens or task.max_tokens,
        "max_words": task.max_words,
        "extra": task.extra,
    }


def teacher_settings(which: Llm | Lightgbm | External) -> dict[str, Any]:
    """What a teacher says of itself; an average over no shifts is not there, as in a text's."""
    settings = science(which)
    if not settings.get("average_shifts"):
        settings.pop("average_shifts", None)
    return settings


def model_settings(model: Model) -> dict[str, Any]:
    data = science(model)
    return {name: data[name] for name in Model.model_fields}
