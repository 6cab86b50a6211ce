"""Stage 02: every teacher fold by fold; its logits on seen, unseen and test rows cached."""

import os
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from llmkd import libraries, ranks, units
from llmkd.inputs import TEACHERS, base, prepared
from llmkd.loading import examples_of, load_model
from llmkd.schema import Config
from llmkd.schema_models import External, Lightgbm, Llm
from llmkd.settings import seed_of
from llmkd.stage import chosen, main, say


def teachers(config: Config, arguments: Namespace) -> None:
    names = chosen(arguments.teacher, [teacher.name for teacher in config.teachers], "teacher")
    folds = chosen(arguments.fold, [str(fold) for fold in range(config.folds.count)], "fold")
    if config.task.kind == "causal_lm":
        from llmkd import lm

        return lm.capture(config, names)
    # networks first: only the first rank grows trees, while the others would wait for it
    for teacher in sorted(config.teachers, key=lambda teacher: teacher.kind != "llm"):
        if teacher.name not in names:
            continue
        recipes = {int(fold): units.teacher(config, teacher, int(fold)) for fold in folds}
        todo = {fold: recipe for fold, recipe in recipes.items() if not recipe.stands}
        if not todo:
            say(f"{Path(config.run) / TEACHERS / teacher.name}: folds {', '.join(folds)} done")
        elif isinstance(teacher, Llm):
            fine_tune(config, teacher, todo)
        elif not ranks.is_main():  # the others are nothing that several ranks could share
            continue
        elif isinstance(teacher, Lightgbm):
            grow(config, teacher, todo)
        else:
            ask(config, teacher, todo)


def fine_tune(config: Config, teacher: Llm, todo: dict[int, units.Recipe]) -> None:
    """A network, its base loaded once for all folds."""
    libraries.load()
    ranks.start(teacher.deepspeed)
    from llmkd import crossfit
    from llmkd.methods.cached import Cached
    from llmkd.models.lora import trainable_state
    from llmkd.models.pooling import resolve_precision
    from llmkd.objective import HARD
    from llmkd.train import arguments, split

    table, labels, _ = prepared(config)
    precision = resolve_precision(config.precision)
    trainer, batching = split(teacher.training())
    training = arguments(Path(config.run) / TEACHERS / teacher.name, seed=seed_of(config, teacher), **trainer)
    model, reader = load_model(config, teacher, base(config, teacher)[0], labels, precision)
    examples = examples_of(config, teacher, table, reader)
    method, start = Cached(model, HARD, precision), trainable_state(model)
    for fold, recipe in todo.items():
        rows = crossfit.learning_rows(table, fold, config.folds.count, ["train"], soft=False)
        with recipe.writing(config.seed) as unit:
            metrics, counts = crossfit.fit_fold(
                model,
                start,
                [crossfit.Fit(method, HARD, examples, rows, training, batching)],
                table,
                fold,
                unit.path,
                count=config.folds.count,
                views=[*config.views, "test", "transfer"],
                name=teacher.name,
                labels=labels,
                precision=precision,
                checkpoints=unit.checkpoints,
                track=units.track(config, recipe),
            )
            unit.metrics.update(metrics)
            unit.rows.update(counts)
        say(f"{recipe.directory}: {told(metrics['best'])}")


def grow(config: Config, teacher: Lightgbm, todo: dict[int, units.Recipe]) -> None:
    """Boosted trees over the features of tabular rows, or the computed fields of texts."""
    from llmkd import crossfit, folds
    from llmkd.teachers import lightgbm as trees
    from llmkd.teachers.columns import feature_columns

    table, labels, _ = prepared(config)
    asked = config.task.features
    columns = feature_columns(
        table, config.task.kind, asked.columns if asked else config.task.extra, teacher.fields
    )
    features = trees.frame(columns, set(asked.categorical) & set(columns) if asked else None)
    for fold, recipe in todo.items():
        with recipe.writing(config.seed, alone=True) as unit:
            count = config.folds.count
            rows = crossfit.learning_rows(table, fold, count, ["train"], soft=False)
            model, history = trees.fit_fold(
                features,
                crossfit.training_labels(table),
                rows,
                folds.dev_rows(table, fold) if count > 1 else None,
                len(labels),
                params=teacher.params,
                rounds=teacher.rounds,
                early_stopping=teacher.early_stopping,
                seed=config.seed,
                threads=int(os.environ.get("OMP_NUM_THREADS", 0)),
            )
            trees.save(model, unit.path / "model.txt")
            predict = partial(trees.logits, model, features)
            leave(config, unit, table, fold, teacher.name, labels, predict)
            unit.metrics.update(history)
            unit.rows["train"] = len(rows)
        say(f"{recipe.directory}: {told(history['best'])}")


def ask(config: Config, teacher: External, todo: dict[int, units.Recipe]) -> None:
    """What another tool said of the rows, whatever it was trained on: the same in every view."""
    import numpy as np

    from llmkd import tasks
    from llmkd.teachers import file

    table, labels, _ = prepared(config)
    ids, parts = np.asarray(table["id"].to_pylist(), dtype=object), table["part"].to_numpy()
    found = np.full((len(table), len(labels)), np.nan, dtype=np.float32)
    for part, source in units.said_in(config, teacher):
        said = file.read(
            source,
            id_column=teacher.id if teacher.path else None if part == "transfer" else config.task.id,
            part=part,
            labels=labels,
            logits=teacher.logits,
            probabilities=teacher.probabilities,
            verdict=teacher.verdict,
            verdict_values=teacher.verdict_values,
            smoothing=teacher.smoothing,
        )
        rows = np.flatnonzero(parts == part)
        mirror = tasks.KINDS[config.task.kind].mirror(len(labels)) if config.task.swap else None
        found[rows] = file.align(*said, ids[rows].tolist(), source=source, mirror=mirror)
    for fold, recipe in todo.items():
        with recipe.writing(config.seed, alone=True) as unit:
            leave(config, unit, table, fold, teacher.name, labels, found.__getitem__)
        say(f"{recipe.directory}: {len(table)} rows")


def leave(
    config: Config, unit: Any, table: Any, fold: int, name: str, labels: list[str], logits_of: Any
) -> None:
    """logits.parquet of all views of one fold."""
    from llmkd import crossfit
    from llmkd.ids import Ids

    asked = [*config.views, "test", "transfer"]
    views = crossfit.view_rows(table, fold, config.folds.count)
    rows = {view: at for view, at in views.items() if view in asked and len(at)}
    found = {view: logits_of(at) for view, at in rows.items()}
    crossfit.write_views(unit.path, Ids(table["id"]), rows, found, name, labels)
    unit.rows.update({view: len(at) for view, at in rows.items()})


def told(best: float | None) -> str:
    return "trained on all rows" if best is None else f"development log loss {best:.6f}"


if __name__ == "__main__":
    assert __doc__
    main(teachers, __doc__, "teacher", "fold")
