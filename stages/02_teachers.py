"""Stage 02: every teacher fine-tuned fold by fold; its logits on seen, unseen and test rows cached."""

from argparse import Namespace
from pathlib import Path

from llmkd import ranks, run
from llmkd.config import Config, Teacher, science
from llmkd.stage import (
    TEACHERS,
    base,
    chosen,
    load_model,
    main,
    prepared,
    say,
    text_settings,
)


def teachers(config: Config, arguments: Namespace) -> None:
    names = chosen(arguments.teacher, [teacher.name for teacher in config.teachers], "teacher")
    folds = chosen(arguments.fold, [str(fold) for fold in range(config.folds.count)], "fold")
    for teacher in config.teachers:
        if teacher.name in names:
            teach(config, teacher, [int(fold) for fold in folds])


def teach(config: Config, teacher: Teacher, folds: list[int]) -> None:
    table, labels, digest = prepared(config)
    source, inputs = base(config, teacher)
    inputs = {"00_prepare": digest, **inputs}
    settings = {"teacher": science(teacher), "text": text_settings(config, teacher), "views": config.views}
    root = Path(config.run) / TEACHERS / teacher.name
    mark = {fold: run.fingerprint(TEACHERS, {**settings, "fold": fold}, inputs) for fold in folds}
    todo = [fold for fold in folds if not run.stands(root / f"fold{fold}", mark[fold])]
    if not todo:
        return say(f"{root}: folds {folds} done")

    ranks.start(teacher.deepspeed)
    from llmkd import crossfit
    from llmkd.models.lora import trainable_state
    from llmkd.models.pooling import resolve_precision
    from llmkd.objective import HARD
    from llmkd.train import arguments, split

    precision = resolve_precision(config.precision)
    trainer, batching = split(teacher.training())
    training = arguments(root, seed=config.seed, **trainer)
    model, tokenizer = load_model(config, teacher, source, labels, precision)
    examples = crossfit.text_examples(table, tokenizer, config.task.kind, **text_settings(config, teacher))
    start = trainable_state(model)
    for fold in todo:
        with run.writing(
            root / f"fold{fold}", TEACHERS, {**settings, "fold": fold}, inputs, config.seed
        ) as unit:
            metrics, counts = crossfit.fit_fold(
                model,
                start,
                HARD,
                examples,
                table,
                fold,
                unit.path,
                count=config.folds.count,
                views=[*config.views, "test"],
                name=teacher.name,
                labels=labels,
                training=training,
                precision=precision,
                **batching,
            )
            unit.metrics.update(metrics)
            unit.rows.update(counts)
        say(f"{root / f'fold{fold}'}: development log loss {metrics['best']}")


if __name__ == "__main__":
    assert __doc__
    main(teachers, __doc__, "teacher", "fold")
