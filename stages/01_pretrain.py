"""Stage 01: models made from tiny configs, and continued pretraining of teachers and student."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from llmkd import ranks, run
from llmkd.config import Config, Model, Pretrain, TrainTokenizer
from llmkd.stage import PRETRAIN, chosen, main, phases, prepared, pretrain_settings, say, text_settings


def pretrain(config: Config, arguments: Namespace) -> None:
    for name in chosen(arguments.model, [model.name for model in config.models], "model"):
        model = next(model for model in config.models if model.name == name)
        if model.init or phases(config, model):
            make(config, model)
        else:
            say(f"{name}: starts from {model.model} as it is")


def make(config: Config, model: Model) -> None:
    directory = Path(config.run) / PRETRAIN / model.name
    settings = pretrain_settings(config, model)
    inputs = {f"data {i}": run.source_digest(phase.data) for i, phase in enumerate(phases(config, model))}
    supervised = any(phase.objective == "supervised" for phase in phases(config, model))
    if model.init or supervised:  # a tokenizer is trained on the rows; other rows are held against test rows
        inputs["00_prepare"] = prepared(config)[2]
    if run.stands(directory, run.fingerprint(PRETRAIN, settings, inputs)):
        return say(f"{directory}: done")
    for phase in phases(config, model):
        ranks.start(phase.deepspeed)
    with run.writing(directory, PRETRAIN, settings, inputs, config.seed) as unit:
        source = start_from(config, model, unit.path / "model")
        for i, phase in enumerate(phases(config, model)):
            history = run_phase(config, model, phase, source, unit.path)
            source = str(unit.path / "model")
            unit.metrics[f"phase {i}"] = history
            say(f"{directory}: {phase.objective} on {phase.data}, loss {history['loss'][-1]['loss']}")
    say(f"{directory}: made")


def start_from(config: Config, model: Model, directory: Path) -> str:
    """A checkpoint's name, or the directory of a model just made from its tiny config."""
    if model.init is None:
        assert model.model is not None
        return model.model
    if ranks.is_main():
        from llmkd.models.load import init_model, load_tokenizer, train_tokenizer

        table, labels, _ = prepared(config)
        asked = model.init.tokenizer
        if isinstance(asked, TrainTokenizer):
            tokenizer = train_tokenizer(training_texts(config, table), asked.vocab_size)
        else:
            tokenizer = load_tokenizer(asked, model.pad_token)
        todo = phases(config, model)
        causal = bool(todo) and todo[0].objective == "causal_lm"
        init_model(
            model.init.architecture,
            model.init.config,
            tokenizer,
            directory,
            labels=labels,
            causal=causal,
            seed=config.seed,
        )
    ranks.barrier()
    return str(directory)


def training_texts(config: Config, table: Any) -> list[str]:
    """The rows' own words, template included; test rows never shape a tokenizer."""
    from llmkd import tasks

    kind = tasks.KINDS[config.task.kind]
    rows = [row for row in table.to_pylist() if row["part"] == "train" and not row["swapped"]]
    template = config.task.template or kind.TEMPLATE
    return [template.format_map({**row, **kind.computed(row)}) for row in rows]


def run_phase(config: Config, model: Model, phase: Pretrain, source: str, directory: Path) -> dict[str, Any]:
    """One phase from `source` into directory/model; an adapter is merged into a fresh float base."""
    from llmkd.models import continued
    from llmkd.models.pooling import resolve_precision
    from llmkd.train import arguments, split

    trainer, batching = split(phase.training())
    training = arguments(directory, seed=config.seed, **trainer)
    examples_of = causal_examples if phase.objective == "causal_lm" else supervised_examples
    return continued.pretrain(
        source,
        directory,
        examples=lambda tokenizer: examples_of(config, model, phase, tokenizer),
        causal=phase.objective == "causal_lm",
        labels=prepared(config)[1],
        lora=phase.lora.model_dump() if phase.lora else None,
        load_in=phase.load_in,
        precision=resolve_precision(config.precision),
        pad_token=model.pad_token,
        attention=model.attention,
        seed=config.seed,
        training=training,
        **batching,
    )


def causal_examples(config: Config, model: Model, phase: Pretrain, tokenizer: Any) -> Any:
    from llmkd.tasks.causal_lm import block_examples, read_texts

    texts = read_texts(phase.data, phase.columns.get("text", "text"))[: phase.rows]
    return block_examples(texts, tokenizer, phase.max_tokens or model.max_tokens or config.task.max_tokens)


def supervised_examples(config: Config, model: Model, phase: Pretrain, tokenizer: Any) -> Any:
    import pyarrow as pa

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
        rows.held_out(ours, task.kind, task.extra),
        kind=task.kind,
        swap=task.swap,
        group=config.folds.group,
        folds=1,
        seed=config.seed,
        leaks=task.leaks,
    )
    say(f"{phase.data}: shared with the test rows {report['leaks']}")
    table = table.filter(pa.array([part == "train" for part in table["part"].to_pylist()]))
    text = text_settings(config, model)
    text["max_tokens"] = phase.max_tokens or text["max_tokens"]
    return crossfit.text_examples(table, tokenizer, task.kind, **text)


if __name__ == "__main__":
    assert __doc__
    main(pretrain, __doc__, "model")
