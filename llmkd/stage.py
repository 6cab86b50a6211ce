"""What every script in stages/ starts with: its command line, its config, its finished inputs."""

import argparse
import gc
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkd import interrupt, ranks, run, tracking
from llmkd.config import load, science
from llmkd.errors import ConfigError, LlmkdError, RunError, Stopped
from llmkd.parser import Parser
from llmkd.schema import Config, Model

if TYPE_CHECKING:
    import pyarrow as pa

    from llmkd.batches import Examples

PREPARE, PRETRAIN, TEACHERS = "00_prepare", "01_pretrain", "02_teachers"
DISTILL, MERGE, QUANTIZE, EVALUATE = "03_distill", "04_merge", "05_quantize", "06_evaluate"


def main(body: Callable[[Config, argparse.Namespace], None], description: str, *flags: str) -> None:
    """Run a stage's body with the config and the flags of this process's command line; see `telling`."""
    with telling():
        config, arguments = parse(description, flags)
        tracking.check(config.tracking)
        body(config, arguments)


@contextmanager
def telling() -> Iterator[None]:
    """Around a command: what a user can mend ends as one line on stderr and exit code 2.

    SIGTERM and Ctrl-C end it with 143 and 130, once what can be gone on with is saved.
    """
    # Libraries' notices (a missing GPU kernel, an old cache name) are nothing that a user here can act on.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that spin while they wait make a shared machine ten times slower. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree", "DeepSpeed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        with interrupt.heard():
            yield
    except LlmkdError as error:
        _tell("\n".join(f"error: {line}" for line in str(error).split("\n")))
        sys.exit(2)
    except Stopped as stopped:
        name = signal.Signals(stopped.signal).name
        if ranks.is_main():
            _tell(f"stopped by {name}: {stopped}; the same command goes on from there")
        sys.exit(128 + stopped.signal)
    except PermissionError as error:
        _tell(f"error: {' '.join(str(error).split())}; give this user the right, or name another place")
        sys.exit(2)
    except Exception as error:
        if not run.is_disk_full(error):
            raise
        _tell(f"error: {' '.join(str(error).split())}; free some space, then the same command goes on")
        sys.exit(2)
    finally:
        ranks.stop()


def _tell(text: str) -> None:
    """On lines of its own, also where a progress bar stands."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def parse(
    description: str, flags: Sequence[str] = (), argv: Sequence[str] | None = None
) -> tuple[Config, argparse.Namespace]:
    """--config, dotted overrides, and the stage's own flags (`--fold` and the like, each repeatable)."""
    parser = Parser(description=description)
    parser.add_argument("--config", required=True, help="the run's YAML, e.g. configs/demo.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.subkey=value", help="dotted overrides of the config"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    for flag in flags:
        parser.add_argument(
            f"--{flag}", action="append", default=[], help=f"only this {flag}; may be repeated"
        )
    arguments = parser.parse_intermixed_args(argv)
    return load(arguments.config, arguments.overrides), arguments


def chosen(asked: Sequence[str], known: Sequence[str], flag: str) -> list[str]:
    """The items a flag asks for, all of them by default. Raises ConfigError on one that is not there."""
    for item in asked:
        if item not in known:
            raise ConfigError(f"--{flag} {item}: there is no such {flag}; choose among {', '.join(known)}")
    return [item for item in known if not asked or item in asked]


def say(text: str) -> None:
    if ranks.is_main():
        print(text, flush=True)


def command(config: Config, stage: str) -> str:
    """The remedy for a missing input: the command that makes it."""
    return f"run: python stages/{stage}.py {config.given}"


def rows_directory(config: Config) -> Path:
    """Stage 00's finished directory. Raises RunError where it is missing or of another config."""
    directory = Path(config.run) / PREPARE
    _check_settings(config, directory, prepare_settings(config))
    return directory


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
    settings = {key: model_settings(model)[key] for key in ("model", "layers", "init", "pad_token")}
    settings["phases"] = [science(phase) for phase in phases(config, model)]
    settings["task"] = {key: science(config.task)[key] for key in ("kind", "swap")}
    settings["task"] |= {
        "labels": config.task.labels,
        "leaks": config.task.leaks,
        "group": config.folds.group,
    }
    text = text_settings(config, model)
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


def _check_settings(config: Config, directory: Path, settings: dict[str, Any]) -> None:
    """Stages 00 and 01 read raw files, which may be large: settings are compared here, no fingerprints."""
    remedy = command(config, directory.relative_to(config.run).parts[0])
    if run.manifest(directory, remedy).get("settings") != json.loads(json.dumps(settings, default=str)):
        raise RunError(f"{directory}: made from another config; {remedy}")


def prepared(config: Config) -> tuple["pa.Table", list[str], str]:
    """Stage 00's rows, the label names and the digest of its directory."""
    from llmkd import mapped

    directory = rows_directory(config)
    digest = run.digest(directory, command(config, PREPARE))  # before a byte of it is believed
    table = mapped.table(directory / "rows.parquet")
    return table, json.loads(table.schema.metadata[b"labels"]), digest


def is_made(config: Config, model: Model) -> bool:
    """Whether stage 01 makes it; else it starts from its checkpoint as it is."""
    return bool(model.init or model.layers or phases(config, model))


def checkpoint(model: Model) -> dict[str, str]:
    """The digest of a checkpoint that lies on this disk; a hub's is known by its name."""
    named = {"": model.model, " tokenizer": model.init.tokenizer if model.init else None}
    local = {
        what: Path(name) for what, name in named.items() if isinstance(name, str) and Path(name).is_dir()
    }
    return {f"{model.name}{what}": run.checkpoint_digest(path) for what, path in local.items()}


def base(config: Config, model: Model) -> tuple[str, dict[str, str]]:
    """Where a model's weights come from before fine-tuning, and its digest where they lie on disk."""
    if not is_made(config, model):
        assert model.model is not None
        return model.model, checkpoint(model)
    directory = Path(config.run) / PRETRAIN / model.name
    _check_settings(config, directory, pretrain_settings(config, model))
    made_from = run.manifest(directory, command(config, PRETRAIN))["inputs"].get(PREPARE)
    if made_from not in (None, run.digest(rows_directory(config), command(config, PREPARE))):
        raise RunError(f"{directory}: made from other rows; {command(config, PRETRAIN)}")
    return str(directory / "model"), {
        f"{PRETRAIN}/{model.name}": run.digest(directory, command(config, PRETRAIN))
    }


def phases(config: Config, model: Model) -> list[Any]:
    """The pretraining phases that are for this model."""
    return [phase for phase in config.pretrain if phase.models is None or model.name in phase.models]


def text_settings(config: Config, model: Model) -> dict[str, Any]:
    """How rows become text for one model: part of the fingerprint of all it makes."""
    task = config.task
    if model.is_net:  # it reads features or pixels, as stage 00 left them
        return {"shift": task.image.shift if task.image else 0}
    if task.kind == "causal_lm":
        settings = {"max_tokens": model.max_tokens or task.max_tokens, "pack": task.pack}
        return {**settings, "chats": "messages" in task.columns, "mask_prompt": task.mask_prompt}
    return {
        "template": task.template,
        "max_tokens": model.max_tokens or task.max_tokens,
        "max_words": task.max_words,
        "extra": task.extra,
    }


def model_settings(model: Model) -> dict[str, Any]:
    data = science(model)
    return {name: data[name] for name in Model.model_fields}


def load_in(model: Model, precision: str) -> str:
    """A frozen base is held in the arithmetic's own precision; weights that are trained, in float32."""
    if model.load_in != "auto":
        return model.load_in
    return precision if model.lora else "fp32"


def load_model(
    config: Config, model: Model, source: str, labels: Sequence[str], precision: str
) -> tuple[Any, Any]:
    """A classifier or a language model, with its adapter where it has one, on its device; its tokenizer.

    One of the package's nets comes with its features' spec in place of a tokenizer.
    """
    import torch

    from llmkd.models.lora import add_lora

    gc.collect()  # the model before this one, where there was one: its trainer holds it in a cycle
    network, reader = load_base(config, model, source, labels, load_in(model, precision))
    if model.lora:
        causal = config.task.kind == "causal_lm"
        network = add_lora(network, causal=causal, **model.lora.model_dump())
    if torch.cuda.is_available() and model.load_in not in ("nf4", "int8"):
        network.to("cuda")
    return network, reader


def load_base(
    config: Config, model: Model, source: str, labels: Sequence[str], held_in: str
) -> tuple[Any, Any]:
    """A model for the task without an adapter, in fp32, bf16, nf4 or int8; and what reads rows for it."""
    if model.is_net:
        from transformers import AutoModelForSequenceClassification

        from llmkd import features
        from llmkd.models.nets import register

        register()
        network = AutoModelForSequenceClassification.from_pretrained(source, local_files_only=True)
        return network.float(), features.load(Path(source))
    from transformers import set_seed

    from llmkd.models.load import check_budget, load_causal_lm, load_classifier, load_tokenizer

    tokenizer = load_tokenizer(source, model.pad_token)
    if config.task.kind == "causal_lm":
        network = load_causal_lm(source, load_in=held_in, attention=model.attention)
        set_seed(seed_of(config, model))  # an adapter is drawn next, alike on every rank
        check_budget(network.config, source, model.max_tokens or config.task.max_tokens)
        return network, tokenizer
    network = load_classifier(
        source,
        labels,
        load_in=held_in,
        pad_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
        attention=model.attention,
        seed=seed_of(config, model),
    )
    check_budget(network.config, source, model.max_tokens or config.task.max_tokens)
    return network, tokenizer


def examples_of(config: Config, model: Model, table: "pa.Table", reader: Any) -> "Examples":
    """All rows as one model reads them: in its tokenizer's ids, or by its features' spec. A language
    model's are the training rows alone, less those without a target."""
    from llmkd import crossfit, features

    settings = text_settings(config, model)
    if config.task.kind == "causal_lm":
        from llmkd import lm

        return lm.examples(table, reader, "train", **settings)[0]
    if not model.is_net:
        return crossfit.text_examples(table, reader, config.task.kind, **settings)
    return features.examples(
        table, reader, table["id"].to_pylist(), crossfit.training_labels(table), **settings
    )


def parts(config: Config, what: str) -> list[str]:
    """What may run side by side of a stage: the config's models, its teacher:fold pairs, or its folds."""
    folds = [str(fold) for fold in range(config.folds.count)]
    if what == "models":
        return [model.name for model in config.models]
    if what == "folds":  # of a chain, a student's folds wait for those of the one before it
        return folds if len(config.students) == 1 else []
    asked = folds[:1] if config.task.kind == "causal_lm" else folds  # one cache serves all folds
    return [f"{teacher.name}:{fold}" for teacher in config.teachers for fold in asked]


if __name__ == "__main__":  # what `make -j` asks
    print(*parts(load(sys.argv[2], sys.argv[3:]), sys.argv[1]))
