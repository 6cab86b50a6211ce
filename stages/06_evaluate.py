"""Stage 06: the artifact, loaded from disk, beside its teachers, its folds and its baseline."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from llmkd import libraries, ranks, run, units
from llmkd.errors import ConfigError, DataError, ModelError
from llmkd.inputs import EVALUATE, MERGE, QUANTIZE, prepared
from llmkd.schema import Config
from llmkd.settings import text_settings
from llmkd.stage import main, say
from llmkd.tracking import Track, record


def evaluate(config: Config, arguments: Namespace) -> None:
    if config.task.test is None:
        raise ConfigError("task.test: none, and only rows that never entered a fold can judge; name a file")
    for artifact in arguments.artifact:
        judge_other(config, Path(artifact))
    if not arguments.artifact:
        judge_run(config)


def judge_run(config: Config) -> None:
    """This run's own artifact, beside everything that led to it."""
    root, recipe = Path(config.run), units.evaluated(config)
    if recipe.stands:
        return say(f"{recipe.directory}: done")
    libraries.load()
    ranks.start()
    stages = [MERGE, QUANTIZE] if config.quantize else [MERGE]
    paths = {{MERGE: "merged", QUANTIZE: "quantized"}[stage]: root / stage / "model" for stage in stages}
    with recipe.writing(config.seed) as unit:
        if config.task.kind == "causal_lm":
            judge_language(config, paths, unit, True)
        else:
            judge_classifier(config, paths, unit)
    if ranks.is_main():
        from llmkd.reporting import write_report

        metrics = json.loads((root / EVALUATE / "metrics.json").read_text(encoding="utf-8"))
        record(Track(config.tracking, root, EVALUATE, recipe.settings), metrics)
        say(str(write_report(root)))


def judge_classifier(config: Config, paths: dict[str, Path], unit: run.Unit) -> None:
    from llmkd.card import of_config, write_card

    metrics = {**cached_scores(config), **artifact_scores(config, paths, unit.path, own=True)}
    sections = [config.distill_of(student).in_phases() for student in config.students]
    # teachers' predictions on the test rows, never their labels, were among the soft labels
    metrics["transductive"] = any("test" in phase.rows for phases in sections for phase in phases)
    # stage 04 fitted it on the folds' unseen rows
    fitted = run.manifest(Path(config.run) / MERGE)["metrics"]["calibration"]
    metrics["calibration"] = fitted | metrics["calibration"]
    if ranks.is_main():
        write_card(unit.path, **of_config(config, prepared(config)[1], metrics))
    finish(metrics, unit)


def judge_other(config: Config, artifact: Path) -> None:
    """Any Hugging Face classifier directory, on this run's test rows."""
    digest = run.source_digest(f"{artifact}/*")
    # most artifacts' folders are called `model`: the digest keeps one's result from replacing another's
    directory = Path(config.run) / f"{EVALUATE}-{artifact.resolve().name}-{digest[:8]}"
    inputs = {"00_prepare": prepared(config)[2], "artifact": digest}
    recipe = units.Recipe(directory, EVALUATE, units.judging_settings(config), inputs)
    if recipe.stands:
        return say(f"{directory}: done")
    ranks.start()
    with recipe.writing(config.seed) as unit:
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


def cached_scores(config: Config) -> dict[str, Any]:
    """Scores of all that left logits: teachers and earlier students, peers, the baseline's and the
    student's folds. At the top of each its own part: out of fold for a teacher, else on the test rows."""
    from llmkd import judging

    table, labels, _ = prepared(config)
    metrics: dict[str, Any] = {"teachers": {}}
    for whose, recipes in units.judged(config).items():
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


def check_labels(own: list[str], labels: list[str], path: Path) -> None:
    """Classes are compared by number, so their names must agree, unless they are LABEL_0, LABEL_1, ..."""
    unnamed = [f"LABEL_{number}" for number in range(len(labels))]
    if own not in (labels, unnamed):
        raise ModelError(f"{path}: its classes are {own}, not {labels}; set id2label in its config.json")


def artifact_scores(
    config: Config, paths: dict[str, Path], directory: Path, *, own: bool = False
) -> dict[str, Any]:
    """Scores, drift, size and speed of model directories; all logits and the last one's predictions are
    written, and the last one is also scored at its temperature."""
    from llmkd import description, judging
    from llmkd.calibration import effect
    from llmkd.evaluate import artifact_logits, bayes, drift
    from llmkd.models.artifact import size_bytes

    table, labels, _ = prepared(config)
    test = judging.TestRows(table, config.task.kind, len(labels))
    if not (test.labels >= 0).any():
        raise DataError(f"{config.task.test}: no row has a label, so nothing can be judged; name task.label")
    for path in paths.values():
        check_labels(description.read(path)["labels"], labels, path)
    text, asked, metrics = text_settings(config, config.student), config.evaluate, dict[str, Any]()
    if asked.max_tokens:
        text["max_tokens"] = asked.max_tokens
    if test.bayes is not None:
        metrics.update(bayes(test.bayes, test.labels))
    logits, speeds = {}, {}
    for name, path in paths.items():
        logits[name], metrics["latency"], outputs = artifact_logits(
            path,
            test.table,
            config.task.kind,
            batch_tokens=asked.batch_tokens,
            precision=asked.precision,
            text=text,
            # the word is of the student's own code alone
            trust_remote_code=own and config.student.trust_remote_code,
        )
        speeds[name] = metrics["latency"]["rows_per_second"]
        metrics[name] = test.scores(logits[name])
        if asked.tta == "swap":
            metrics[f"{name}_tta"] = test.scores(logits[name], swap=True)
    if outputs:  # of the last, which is the one that is shipped
        metrics["outputs"] = {
            name: {**test.scores(found), "rows_per_second": speed} for name, (found, speed) in outputs.items()
        }
    temperature = description.read(path)["temperature"]
    metrics["calibration"] = {"temperature": temperature}
    if temperature:
        before, after = (test.probabilities(logits[name], temperature=by) for by in (1.0, temperature))
        metrics["calibration"]["test"] = found = effect(before, after, test.labels)
        metrics |= {when: found[when] for when in ("ece_before", "ece_after")}
        metrics[f"{name}_calibrated"] = test.scores(logits[name], temperature=temperature)
        if asked.tta == "swap":
            both = test.scores(logits[name], swap=True, temperature=temperature)
            metrics[f"{name}_tta_calibrated"] = both
    metrics["padding_share"] = metrics["latency"].pop("padding_share")
    metrics["latency"]["artifacts"] = speeds  # rows a second of each
    metrics["size_bytes"] = {name: size_bytes(path) for name, path in paths.items()}
    if {"merged", "quantized"} <= set(logits):
        metrics["drift"] = drift(logits["merged"], logits["quantized"])
    if ranks.is_main():
        test.write(directory / "predictions.parquet", logits[name], labels, swap=asked.tta == "swap")
        test.write_logits(directory / "logits.parquet", logits, labels)
    return metrics


if __name__ == "__main__":
    assert __doc__
    main(evaluate, __doc__, "artifact")
