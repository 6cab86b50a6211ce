"""Stage 06: the artifact, loaded from disk, beside its teachers, its folds and its baseline."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from llmkd import ranks, run, units
from llmkd.config import science
from llmkd.errors import ConfigError, DataError
from llmkd.schema import Config
from llmkd.stage import EVALUATE, MERGE, QUANTIZE, main, model_settings, prepared, say, text_settings


def evaluate(config: Config, arguments: Namespace) -> None:
    if config.task.test is None:
        raise ConfigError("task.test: none, and only rows that never entered a fold can judge; name a file")
    settings = {"evaluate": science(config.evaluate), "text": text_settings(config, config.student)}
    settings["student"] = model_settings(config.student)
    if arguments.artifact:
        for artifact in arguments.artifact:
            judge_other(config, Path(artifact), settings)
    else:
        judge_run(config, settings)


def judge_run(config: Config, settings: dict[str, Any]) -> None:
    """This run's own artifact, beside everything that led to it."""
    root = Path(config.run)
    folds = [recipe for recipes in fold_units(config).values() for recipe in recipes]
    artifact = units.quantized(config) if config.quantize else units.merged(config)
    inputs = {**units.rows(config), **units.finished(config, *folds, artifact)}
    if run.stands(root / EVALUATE, run.fingerprint(EVALUATE, settings, inputs)):
        return say(f"{root / EVALUATE}: done")
    ranks.start()
    stages = [MERGE, QUANTIZE] if config.quantize else [MERGE]
    paths = {{MERGE: "merged", QUANTIZE: "quantized"}[stage]: root / stage / "model" for stage in stages}
    with run.writing(root / EVALUATE, EVALUATE, settings, inputs, config.seed) as unit:
        if config.task.kind == "causal_lm":
            return judge_language(config, paths, unit, True)
        metrics = {**cached_scores(config), **artifact_scores(config, paths, unit.path)}
        sections = [config.distill_of(student).in_phases() for student in config.students]
        # teachers' predictions on the test rows, never their labels, were among the soft labels
        metrics["transductive"] = any("test" in phase.rows for phases in sections for phase in phases)
        finish(metrics, unit)


def judge_other(config: Config, artifact: Path, settings: dict[str, Any]) -> None:
    """Any Hugging Face classifier directory, on this run's test rows."""
    digest = run.source_digest(f"{artifact}/*")
    # most artifacts' folders are called `model`: the digest keeps one's result from replacing another's
    directory = Path(config.run) / f"{EVALUATE}-{artifact.resolve().name}-{digest[:8]}"
    inputs = {"00_prepare": prepared(config)[2], "artifact": digest}
    if run.stands(directory, run.fingerprint(EVALUATE, settings, inputs)):
        return say(f"{directory}: done")
    ranks.start()
    with run.writing(directory, EVALUATE, settings, inputs, config.seed) as unit:
        if config.task.kind == "causal_lm":
            return judge_language(config, {"artifact": artifact}, unit, False)
        finish(artifact_scores(config, {"artifact": artifact}, unit.path), unit)


def judge_language(config: Config, paths: dict[str, Path], unit: run.Unit, whole: bool) -> None:
    from llmkd.lm_judging import judge, summary

    metrics = judge(config, paths, whole=whole)
    if ranks.is_main():
        run.write_json(unit.path / "metrics.json", metrics)
    say(summary(metrics))


def finish(metrics: dict[str, Any], unit: run.Unit) -> None:
    from llmkd.judging import summary

    unit.metrics.update(metrics)
    if ranks.is_main():
        run.write_json(unit.path / "metrics.json", metrics)
    say(summary(metrics))


def fold_units(config: Config) -> dict[str, list[units.Recipe]]:
    """Whose folds left logits that are judged; the student last, after its baseline."""
    folds = range(config.folds.count)
    leave = [which for which in config.teachers if which not in units.beside(config, config.student)]
    found = {which.name: [units.teacher(config, which, fold) for fold in folds] for which in leave}
    found |= {which.name: units.students(config, which=which) for which in config.students[:-1]}
    if config.distill_of(config.student).baseline:
        found["baseline"] = units.students(config, "baseline")
    return {**found, "student": units.students(config)}


def cached_scores(config: Config) -> dict[str, Any]:
    """Scores of all that left logits: teachers and earlier students, peers, the baseline's and the
    student's folds. At the top of each its own part: out of fold for a teacher, else on the test rows."""
    from llmkd import judging

    table, labels, _ = prepared(config)
    metrics: dict[str, Any] = {"teachers": {}}
    for whose, recipes in fold_units(config).items():
        directories = [recipe.directory for recipe in recipes]
        found = judging.folds(table, [directory / "logits.parquet" for directory in directories], labels)
        if whose in ("student", "baseline"):
            metrics[whose] = {**found.pop("test"), **found}
        else:
            metrics["teachers"][whose] = {**found.pop("oof", found["test"]), **found}
        for peer in config.peers if whose == "student" else ():
            files = [directory / "peers" / peer.name / "logits.parquet" for directory in directories]
            found = judging.folds(table, files, labels)
            metrics.setdefault("peers", {})[peer.name] = {**found.pop("oof", found["test"]), **found}
    return metrics


def artifact_scores(config: Config, paths: dict[str, Path], directory: Path) -> dict[str, Any]:
    """Scores, drift, size and speed of model directories; predictions of the last are written."""
    from llmkd import judging
    from llmkd.evaluate import artifact_logits, bayes, drift
    from llmkd.models.artifact import size_bytes

    table, labels, _ = prepared(config)
    test = judging.TestRows(table, config.task.kind, len(labels))
    if not (test.labels >= 0).any():
        raise DataError(f"{config.task.test}: no row has a label, so nothing can be judged; name task.label")
    text, asked, metrics = text_settings(config, config.student), config.evaluate, dict[str, Any]()
    if asked.max_tokens:
        text["max_tokens"] = asked.max_tokens
    if test.bayes is not None:
        metrics.update(bayes(test.bayes, test.labels))
    logits = {}
    for name, path in paths.items():
        logits[name], metrics["latency"], outputs = artifact_logits(
            path,
            test.table,
            config.task.kind,
            batch_tokens=asked.batch_tokens,
            precision=asked.precision,
            text=text,
        )
        metrics[name] = test.scores(logits[name])
        if asked.tta == "swap":
            metrics[f"{name}_tta"] = test.scores(logits[name], swap=True)
    if outputs:  # of the last, which is the one that is shipped
        metrics["outputs"] = {
            name: {**test.scores(found), "rows_per_second": speed} for name, (found, speed) in outputs.items()
        }
    metrics["padding_share"] = metrics["latency"].pop("padding_share")
    metrics["size_bytes"] = {name: size_bytes(path) for name, path in paths.items()}
    if {"merged", "quantized"} <= set(logits):
        metrics["drift"] = drift(logits["merged"], logits["quantized"])
    if ranks.is_main():
        last = logits[list(logits)[-1]]
        test.write(directory / "predictions.parquet", last, labels, swap=asked.tta == "swap")
    return metrics


if __name__ == "__main__":
    assert __doc__
    main(evaluate, __doc__, "artifact")
