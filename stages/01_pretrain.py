"""Stage 01: models made from tiny configs, and continued pretraining of teachers and student."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from llmkd import libraries, ranks, units
from llmkd.errors import DataError
from llmkd.inputs import PRETRAIN, prepared
from llmkd.schema import Config
from llmkd.schema_models import Model, TrainTokenizer
from llmkd.schema_training import Pretrain
from llmkd.settings import is_made, phases, seed_of, text_settings
from llmkd.stage import chosen, last_loss, main, say
from llmkd.tracking import Track


def pretrain(config: Config, arguments: Namespace) -> None:
    for name in chosen(arguments.model, [model.name for model in config.models], "model"):
        model = next(model for model in config.models if model.name == name)
        if is_made(config, model):
            make(config, model)
        else:
            say(f"{name}: starts from {model.model} as it is")


def make(config: Config, model: Model) -> None:
    recipe = units.pretrained(config, model)
    directory = recipe.directory
    if recipe.stands:
        return say(f"{directory}: done")
    libraries.load()
    for phase in phases(config, model):
        ranks.start(phase.deepspeed)
    with recipe.writing(config.seed) as unit:
        source = start_from(config, model, unit.path / "model")
        for i, phase in enumerate(phases(config, model)):
            checkpoints = unit.checkpoints / f"phase{i}"
            where = f"{PRETRAIN}/{model.name}/phase{i}"
            track = Track(config.tracking, Path(config.run), where, recipe.settings)
            history = run_phase(config, model, phase, source, unit.path, checkpoints, track)
            source = str(unit.path / "model")
            unit.metrics[f"phase {i}"] = history
            say(f"{directory}: {phase.objective} on {phase.data}, {last_loss(history)}")
    say(f"{directory}: made")


def start_from(config: Config, model: Model, directory: Path) -> str:
    """A checkpoint's name, or the directory of a model just made from its tiny config."""
    if model.init is None and model.layers is None:
        assert model.model is not None
        return model.model
    if ranks.is_main():
        (init if model.init else shorten)(config, model, directory)
    ranks.barrier()
    return str(directory)


def shorten(config: Config, model: Model, directory: Path) -> None:
    """A checkpoint with some of its layers only, as a smaller student's start."""
    from llmkd.models.load import keep_layers

    assert model.model
    assert model.layers
    keep_layers(model.model, model.layers, directory, trust_remote_code=model.trust_remote_code)


def init(config: Config, model: Model, directory: Path) -> None:
    """Random weights, with a tokenizer or features' spec that is fitted on training rows."""
    assert model.init
    table, labels, _ = prepared(config)
    if model.is_net:
        from llmkd import features
        from llmkd.models.nets import init_net

        task = config.task
        train = table.filter(table["part"].to_numpy() == "train")
        columns, image = (asked.model_dump() if asked else None for asked in (task.features, task.image))
        spec = features.fit(train, columns, image)
        init_net(
            model.init.architecture,
            model.init.config,
            spec,
            directory,
            labels=labels,
            seed=seed_of(config, model),
        )
    else:
        from llmkd.models.load import init_model, load_tokenizer, train_tokenizer

        asked = model.init.tokenizer
        if isinstance(asked, TrainTokenizer):
            tokenizer = train_tokenizer(training_texts(config, table), asked.vocab_size)
        else:
            tokenizer = load_tokenizer(asked, model.pad_token, trust_remote_code=model.trust_remote_code)
        todo = phases(config, model)
        causal = config.task.kind == "causal_lm" or (bool(todo) and todo[0].objective == "causal_lm")
        init_model(
            model.init.architecture,
            model.init.config,
            tokenizer,
            directory,
            labels=labels,
            causal=causal,
            seed=seed_of(config, model),
        )


def training_texts(config: Config, table: Any) -> list[str]:
    """The rows' own words, template included; test rows never shape a tokenizer."""
    import pyarrow.compute as pc

    from llmkd import tasks

    if config.task.kind == "causal_lm":
        from llmkd import lm_rows

        return lm_rows.plain_texts(table, "messages" in config.task.columns)
    kind = tasks.KINDS[config.task.kind]
    mine = pc.and_(pc.equal(table["part"], "train"), pc.invert(table["swapped"]))
    rows = table.filter(mine).to_pylist()
    template = config.task.template or kind.TEMPLATE
    return [template.format_map({**row, **kind.computed(row)}) for row in rows]


def run_phase(
    config: Config,
    model: Model,
    phase: Pretrain,
    source: str,
    directory: Path,
    checkpoints: Path,
    track: Track,
) -> dict[str, Any]:
    """One phase from `source` into directory/model; an adapter is merged into a fresh float base."""
    from llmkd.loading import settle
    from llmkd.models import continued
    from llmkd.models.pooling import resolve_precision
    from llmkd.train import arguments, split

    settle()
    trainer, batching = split(phase.training())
    training = arguments(directory, seed=config.seed, **trainer)
    of = causal_examples if phase.objective == "causal_lm" else supervised_examples

    def examples(tokenizer: Any) -> Any:
        try:
            return of(config, model, phase, tokenizer)
        except DataError as error:  # it speaks of training rows, as stage 00's errors do
            where = f"pretrain.{config.pretrain.index(phase)}.data = {phase.data}"
            raise DataError(f"{where}: {str(error).removeprefix('train: ')}") from None

    return continued.pretrain(
        source,
        directory,
        examples=examples,
        causal=phase.objective == "causal_lm",
        labels=prepared(config)[1],
        lora=phase.lora.model_dump() if phase.lora else None,
        load_in=phase.load_in,
        precision=resolve_precision(config.precision),
        pad_token=model.pad_token,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
        seed=config.seed,
        training=training,
        checkpoints=checkpoints,
        track=track,
        **batching,
    )


def causal_examples(config: Config, model: Model, phase: Pretrain, tokenizer: Any) -> Any:
    from llmkd.tasks.blocks import block_examples
    from llmkd.tasks.causal_lm import read_texts

    texts = read_texts(phase.data, phase.columns.get("text", "text"))
    if config.task.kind == "causal_lm":  # the test rows judge what comes of it
        from llmkd import lm_rows

        texts = lm_rows.without_test_texts(texts, prepared(config)[0], "messages" in config.task.columns)
    texts = texts[: phase.rows]
    return block_examples(texts, tokenizer, phase.max_tokens or model.max_tokens or config.task.max_tokens)


def supervised_examples(config: Config, model: Model, phase: Pretrain, tokenizer: Any) -> Any:
    import pyarrow.compute as pc

    from llmkd import crossfit, rows

    task = config.task
    ours, labels, _ = prepared(config)
    table, _ = rows.canonical(
        rows.read(phase.data, seed=config.seed).slice(0, phase.rows),
        part="train",
        kind=task.kind,
        columns=phase.columns,
        label=phase.label,
        labels=labels,
        label_values=phase.label_values,
        id_column=None,
        extra=task.extra,
        turns="text",
        empty="drop",
    )
    table, report = rows.prepare(
        table,
        rows.of_part(ours, "test", task.kind, task.extra),
        kind=task.kind,
        swap=task.swap,
        group=config.folds.group,
        folds=1,
        seed=config.seed,
        leaks=task.leaks,
        known=rows.of_part(ours, "train", task.kind, task.extra),  # their labels would reach every fold
    )
    say(f"{phase.data}: shared with the test rows, and in_train with the training rows, {report['leaks']}")
    table = table.filter(pc.equal(table["part"], "train"))
    text = text_settings(config, model)
    text["max_tokens"] = phase.max_tokens or text["max_tokens"]
    return crossfit.text_examples(table, tokenizer, task.kind, **text)


if __name__ == "__main__":
    assert __doc__
    main(pretrain, __doc__, "model")
