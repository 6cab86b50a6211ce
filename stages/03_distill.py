"""Stage 03: fold by fold, each student of the chain learns from hard labels and its teachers' logits."""

from argparse import Namespace
from pathlib import Path

from llmkd import libraries, ranks, units
from llmkd.inputs import DISTILL, base, prepared
from llmkd.loading import examples_of, load_model
from llmkd.schema import Config
from llmkd.schema_models import Student
from llmkd.stage import chosen, last_loss, main, say


def distill(config: Config, arguments: Namespace) -> None:
    folds = [
        int(fold) for fold in chosen(arguments.fold, [str(k) for k in range(config.folds.count)], "fold")
    ]
    names = chosen(arguments.student, [student.name for student in config.students], "student")
    kinds = chosen(arguments.only, ["student", "baseline"], "only")
    for which in config.students:
        if which.name in names:
            learn(config, which, [kind for kind in kinds if kind in units.kinds_of(config, which)], folds)


def learn(config: Config, which: Student, kinds: list[str], folds: list[int]) -> None:
    jobs = {(kind, fold): units.student(config, which, kind, fold) for kind in kinds for fold in folds}
    jobs = {job: recipe for job, recipe in jobs.items() if not recipe.stands}
    root = Path(config.run) / DISTILL
    if not jobs:
        return say(f"{root / which.name}: folds {folds} done")

    section = config.distill_of(which)
    libraries.load()
    ranks.start(section.deepspeed)
    from llmkd import assemble, crossfit, lm
    from llmkd.models.lora import trainable_state
    from llmkd.models.pooling import resolve_precision
    from llmkd.train import arguments, split

    table, labels, _ = prepared(config)
    precision = resolve_precision(config.precision)
    # ZeRO-3 cuts up what is loaded for as long as these stay: transformers keeps a weak reference alone
    sharding = arguments(root, seed=config.seed, **split(section.training())[0])
    model, reader = load_model(config, which, base(config, which)[0], labels, precision)
    del sharding  # each training has its own
    examples = examples_of(config, which, table, reader)
    start = trainable_state(model)
    for (kind, fold), recipe in jobs.items():
        with recipe.writing(config.seed) as unit:
            what = config, which, kind, fold, model, examples, table
            if config.task.kind == "causal_lm":
                fits, facts = lm.fits(*what, root, precision)
            else:
                fits, facts = assemble.fits(*what, labels, root, precision)
            metrics, counts = crossfit.fit_fold(
                model,
                start,
                fits,
                table,
                fold,
                unit.path,
                count=config.folds.count,
                views=units.student_views(config, which),
                name=which.name,
                labels=labels,
                precision=precision,
                checkpoints=unit.checkpoints,
                track=units.track(config, recipe),
            )
            unit.metrics.update(metrics, **facts)
            unit.rows.update(counts)
        best = metrics["best"]  # None without development rows
        said = last_loss(metrics) if best is None else f"development log loss {best:.6f}"
        say(f"{recipe.directory}: {said}")
        del fits  # before the next fold's teachers or peers are loaded


if __name__ == "__main__":
    assert __doc__
    main(distill, __doc__, "fold", "student", "only")
