"""Stage 00: labelled rows, read and checked, into rows.parquet with swapped copies and folds."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Literal

from llmkd import run
from llmkd.config import Config
from llmkd.stage import PREPARE, main, prepare_settings, say


def prepare(config: Config, arguments: Namespace) -> None:
    task = config.task
    directory = Path(config.run) / PREPARE
    settings = prepare_settings(config)
    inputs = {
        part: run.source_digest(source)
        for part, source in (("train", task.train), ("test", task.test))
        if source
    }
    if run.stands(directory, run.fingerprint(PREPARE, settings, inputs)):
        return say(f"{directory}: done")
    with run.writing(directory, PREPARE, settings, inputs, config.seed) as unit:
        write_rows(config, unit)
    report = unit.metrics["report"]
    say(f"{directory}: {unit.rows}, leaks {report['leaks']}, duplicates {report['duplicates']}")


def write_rows(config: Config, unit: run.Unit) -> None:
    import pyarrow.parquet as pq

    from llmkd import ranks, rows, tasks

    task = config.task
    labels = task.labels or list(tasks.KINDS[task.kind].LABELS)  # a config without either is refused
    tables, checks = {}, {}
    parts: tuple[Literal["train", "test"], ...] = ("train", "test")
    for part in parts:
        if source := getattr(task, part):
            tables[part], checks[part] = rows.canonical(
                rows.read(source, seed=config.seed),
                part=part,
                kind=task.kind,
                columns=task.columns,
                label=task.label,
                labels=labels,
                label_values=task.label_values,
                id_column=task.id,
                extra=task.extra,
                turns=task.turns,
                empty=task.empty,
            )
    table, report = rows.prepare(
        tables["train"],
        tables.get("test"),
        kind=task.kind,
        swap=task.swap,
        group=config.folds.group,
        folds=config.folds.count,
        stratify=config.folds.stratify,
        seed=config.seed,
        leaks=task.leaks,
    )
    if ranks.is_main():
        table = table.replace_schema_metadata({"labels": json.dumps(labels)})
        pq.write_table(table, unit.path / "rows.parquet", compression="zstd")
    unit.metrics.update(labels=labels, report={**report, "read": checks})
    unit.rows.update({part: sum(row == part for row in table["part"].to_pylist()) for part in tables})


if __name__ == "__main__":
    main(prepare, __doc__)
