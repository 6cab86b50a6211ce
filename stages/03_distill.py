"""Stage 03: fold by fold, the student learns from hard labels and the teachers' cached logits."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from llmkd import ranks, units
from llmkd.config import Config
from llmkd.stage import DISTILL, TEACHERS, base, chosen, load_model, main, prepared, say, text_settings


def distill(config: Config, arguments: Namespace) -> None:
    folds = [
        int(fold) for fold in chosen(arguments.fold, [str(k) for k in range(config.folds.count)], "fold")
    ]
    kinds = ["student", "baseline"] if config.distill.baseline else ["student"]
    chosen_kinds = chosen(arguments.only, kinds, "only")
    jobs = {(kind, fold): units.student(config, kind, fold) for kind in chosen_kinds for fold in folds}
    jobs = {job: recipe for job, recipe in jobs.items() if not recipe.stands}
    if not jobs:
        return say(f"{Path(config.run) / DISTILL}: folds {folds} done")

    ranks.start(config.distill.deepspeed)
    from llmkd import crossfit
    from llmkd.models.lora import trainable_state
    from llmkd.models.pooling import resolve_precision
    from llmkd.train import arguments as trainer_arguments
    from llmkd.train import split

    table, labels, _ = prepared(config)
    source, _ = base(config, config.student)
    precision = resolve_precision(config.precision)
    trainer, batching = split(config.distill.training())
    training = trainer_arguments(Path(config.run) / DISTILL, seed=config.seed, **trainer)
    model, tokenizer = load_model(config, config.student, source, labels, precision)
    examples = crossfit.text_examples(
        table, tokenizer, config.task.kind, **text_settings(config, config.student)
    )
    start = trainable_state(model)
    for (kind, fold), recipe in jobs.items():
        learnt_from, objective = with_teachers(config, examples, table, labels, kind, fold)
        with recipe.writing(config.seed) as unit:
            metrics, counts = crossfit.fit_fold(
                model,
                start,
                objective,
                learnt_from,
                table,
                fold,
                unit.path,
                count=config.folds.count,
                views=["oof", "test"],
                name=config.student.name,
                labels=labels,
                training=training,
                precision=precision,
                **batching,
            )
            unit.metrics.update(metrics)
            unit.rows.update(counts)
        say(f"{recipe.directory}: development log loss {metrics['best']}")


def with_teachers(config: Config, examples: Any, table: Any, labels: list[str], kind: str, fold: int) -> Any:
    """The examples with the ensemble's logits beside them, and the objective over them."""
    from llmkd import crossfit
    from llmkd.objective import HARD, Objective

    if kind == "baseline":
        return examples, HARD
    root, distill = Path(config.run) / TEACHERS, config.distill
    names = [teacher.name for teacher in config.teachers]
    where = {name: lambda source, name=name: root / name / f"fold{source}" for name in names}
    joined = crossfit.teacher_logits(
        table, where, fold, count=config.folds.count, view=distill.view, labels=labels
    )
    degrees = distill.temperature
    temperatures = [degrees.get(name, 1.0) if isinstance(degrees, dict) else degrees for name in names]
    weights = [distill.teacher_weights.get(name, 1.0) for name in names]
    return examples.with_teachers(joined), Objective(
        distill.terms, names, weights, temperatures, distill.normalize
    )


if __name__ == "__main__":
    assert __doc__
    main(distill, __doc__, "fold", "only")
