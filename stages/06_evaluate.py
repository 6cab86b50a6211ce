"""Stage 06: the artifact, loaded from disk, beside its teachers, its folds and its baseline."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from llmkd import ranks, run
from llmkd.config import Config, science
from llmkd.errors import ConfigError, DataError
from llmkd.stage import (
    DISTILL,
    EVALUATE,
    MERGE,
    QUANTIZE,
    TEACHERS,
    command,
    main,
    model_settings,
    prepared,
    say,
    text_settings,
)


def evaluate(config: Config, arguments: Namespace) -> None:
    if config.task.test is None:
        raise ConfigError(
            "task.test: none, and only rows that never entered a fold can judge; name a test file"
        )
    directory, root = Path(config.run) / EVALUATE, Path(config.run)
    artifacts = {MERGE: MERGE, **({QUANTIZE: QUANTIZE} if config.quantize else {})}
    needed = {**artifacts, **fold_units(config)}
    for name in needed:
        run.manifest(root / name, command(config, name.split("/")[0]))
    inputs = {"00_prepare": prepared(config)[2], **{name: run.digest(root / name) for name in needed}}
    settings = {"evaluate": science(config.evaluate), "text": text_settings(config, config.student)}
    settings["student"] = model_settings(config.student)
    if run.stands(directory, run.fingerprint(EVALUATE, settings, inputs)):
        return say(f"{directory}: done")

    ranks.start()
    with run.writing(directory, EVALUATE, settings, inputs, config.seed) as unit:
        metrics = judge(config, unit.path)
        unit.metrics.update(metrics)
        if ranks.is_main():
            run.write_json(unit.path / "metrics.json", metrics)
    say(summary(metrics))


def fold_units(config: Config) -> dict[str, str]:
    """Every finished fold whose logits are judged: {unit: whose}."""
    units = {}
    for fold in range(config.folds.count):
        for teacher in config.teachers:
            units[f"{TEACHERS}/{teacher.name}/fold{fold}"] = teacher.name
        units[f"{DISTILL}/{config.student.name}/fold{fold}"] = "student"
        if config.distill.baseline:
            units[f"{DISTILL}/{config.student.name}-baseline/fold{fold}"] = "baseline"
    return units


def judge(config: Config, directory: Path) -> dict[str, Any]:
    """metrics.json's content; the artifact's predictions go to directory/predictions.parquet."""
    from llmkd import judging
    from llmkd.evaluate import artifact_logits, bayes, drift
    from llmkd.models.artifact import size_bytes

    table, labels, _ = prepared(config)
    root = Path(config.run)
    units = fold_units(config)
    metrics: dict[str, Any] = {"teachers": {}}
    for whose in dict.fromkeys(units.values()):
        logits_files = [root / unit / "logits.parquet" for unit, owner in units.items() if owner == whose]
        found = judging.folds(table, logits_files, labels)
        if whose in ("student", "baseline"):
            metrics[whose] = {**found["test"], **({"oof": found["oof"]} if "oof" in found else {})}
        else:
            metrics["teachers"][whose] = found
    test = judging.TestRows(table, config.task.kind, len(labels))
    if not (test.labels >= 0).any():
        raise DataError(
            f"{config.task.test}: no test row has a label, so nothing can be judged; name the label column"
        )
    if test.bayes is not None:
        metrics["bayes_log_loss"] = bayes(test.bayes, test.labels)["expected"]
        metrics["bayes_log_loss_on_these_rows"] = bayes(test.bayes, test.labels)["on_these_rows"]
    text = text_settings(config, config.student)
    text["max_tokens"] = config.evaluate.max_tokens or text["max_tokens"]
    logits, latency = {}, {}
    for name, stage in {"merged": MERGE, **({"quantized": QUANTIZE} if config.quantize else {})}.items():
        logits[name], latency[name] = artifact_logits(
            root / stage / "model",
            test.table,
            config.task.kind,
            batch_tokens=config.evaluate.batch_tokens,
            precision=config.evaluate.precision,
            **text,
        )
        metrics[name] = test.scores(logits[name])
        if config.evaluate.tta == "swap":
            metrics[f"{name}_tta"] = test.scores(logits[name], swap=True)
    metrics["latency"] = latency[list(latency)[-1]] | {
        "merged_rows_per_second": latency["merged"]["rows_per_second"]
    }
    metrics["padding_share"] = metrics["latency"].pop("padding_share")
    metrics["size_bytes"] = {
        name: size_bytes(root / stage / "model")
        for name, stage in (("merged", MERGE), ("quantized", QUANTIZE))
        if name in logits
    }
    if "quantized" in logits:
        metrics["drift"] = drift(logits["merged"], logits["quantized"])
    if ranks.is_main():
        test.write(
            directory / "predictions.parquet",
            logits[list(logits)[-1]],
            labels,
            swap=config.evaluate.tta == "swap",
        )
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    rows = {f"teacher {name}": found["test"] for name, found in metrics["teachers"].items()}
    rows |= {
        name: metrics[name]
        for name in ("baseline", "student", "merged", "quantized", "quantized_tta")
        if name in metrics
    }
    lines = [f"{'':24}{'log loss':>10}{'accuracy':>10}{'ece':>8}{'rows':>8}"]
    for name, row in rows.items():
        lines.append(
            f"{name:24}{row['log_loss']:10.4f}{row['accuracy']:10.4f}{row['ece']:8.4f}{row['rows']:8}"
        )
    if "bayes_log_loss" in metrics:
        lines.append(
            f"{'Bayes floor':24}{metrics['bayes_log_loss']:10.4f}"
            f"  (on these rows {metrics['bayes_log_loss_on_these_rows']:.4f})"
        )
    if "drift" in metrics:
        size = metrics["size_bytes"]
        lines.append(
            f"8-bit against merged: {metrics['drift']}, {size['quantized'] / size['merged']:.2f} of the bytes"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    assert __doc__
    main(evaluate, __doc__)
