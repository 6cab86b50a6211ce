"""Stage 02: every teacher fine-tuned fold by fold; its logits on seen, unseen and test rows cached."""

from argparse import Namespace
from pathlib import Path

from llmkd import ranks, units
from llmkd.config import Config, Teacher
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
    recipes = {fold: units.teacher(config, teacher, fold) for fold in folds}
    todo = {fold: recipe for fold, recipe in recipes.items() if not recipe.stands}
    root = Path(config.run) / TEACHERS / teacher.name
    if not todo:
        return say(f"{root}: folds {folds} done")

    ranks.start(teacher.deepspeed)
    from llmkd import crossfit
    from llmkd.models.lora import trainable_state
    from llmkd.models.pooling import resolve_precision
    from llmkd.objective import HARD
    from llmkd.train import arguments, split

    table, labels, _ = prepared(config)
    source, _ = base(config, teacher)
    precision = resolve_precision(config.precision)
    trainer, batching = split(teacher.training())
    training = arguments(root, seed=config.seed, **trainer)
    model, tokenizer = load_model(config, teacher, source, labels, precision)
    examples = crossfit.text_examples(table, tokenizer, config.task.kind, **text_settings(config, teacher))
    start = trainable_state(model)
    for fold, recipe in todo.items():
        with recipe.writing(config.seed) as unit:
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
        say(f"{recipe.directory}: development log loss {metrics['best']}")


if __name__ == "__main__":
    assert __doc__
    main(teachers, __doc__, "teacher", "fold")
