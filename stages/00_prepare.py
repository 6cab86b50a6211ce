"""Stage 00: labelled rows, read and checked, into rows.parquet with swapped copies and folds."""

import json
from argparse import Namespace
from typing import Any

from llmkd import run, units
from llmkd.schema import Config
from llmkd.schema_distill import Part
from llmkd.stage import main, say


def prepare(config: Config, arguments: Namespace) -> None:
    recipe = units.prepared(config)
    if recipe.stands:
        return say(f"{recipe.directory}: done")
    with recipe.writing(config.seed) as unit:
        write_rows(config, unit)
    say(f"{recipe.directory}: {told(unit.rows, unit.metrics['report'])}")


def told(counts: dict[str, int], report: dict[str, Any]) -> str:
    """What became of the rows, in words."""
    rows = ", ".join(f"{count:,} {part}" for part, count in counts.items())
    said = [f"{rows} rows", f"{report['leaks']['rows']} in both train and test ({report['leaks']['policy']})"]
    for part, found in report["duplicates"].items():
        said.append(f"{part}: {found['rows']} repeat another, {found['conflicting']} of several labels")
    return "; ".join(said)


def sources(config: Config) -> dict[Part, Any]:
    """The raw table of each part that the task has."""
    from llmkd.sources import read, sentences

    task = config.task
    found: dict[Part, Any] = {"train": read(task.train, seed=config.seed).slice(0, task.rows)}
    if task.test:
        found["test"] = read(task.test, seed=config.seed)
    if asked := task.transfer:
        table = read(asked.data, seed=config.seed)
        columns = task.columns if asked.columns is None else asked.columns
        if asked.sentences:
            table = sentences(table, columns.get("text", "text"), *asked.sentences)
        found["transfer"] = table.slice(0, asked.rows)
    if "messages" in task.columns:
        from llmkd.lm_rows import chats_as_text

        return {part: chats_as_text(table, task.columns["messages"], part) for part, table in found.items()}
    return found


def write_rows(config: Config, unit: run.Unit) -> None:
    import pyarrow.compute as pc

    from llmkd import mapped, ranks, rows, tasks

    task = config.task
    labels = task.labels or list(tasks.KINDS[task.kind].LABELS or ())  # a config without either is refused
    features, image = (asked.model_dump() if asked else None for asked in (task.features, task.image))
    tables, checks = {}, {}
    for part, source in sources(config).items():
        further = task.transfer if part == "transfer" else None
        tables[part], checks[part] = rows.canonical(
            source,
            part=part,
            kind=task.kind,
            columns=task.columns if further is None or further.columns is None else further.columns,
            label=None if further or task.kind == "causal_lm" else task.label,
            labels=labels,
            label_values=task.label_values,
            id_column=None if further else task.id,
            extra=task.extra,
            features=features,
            image=image,
            turns=task.turns,
            empty="drop" if further else task.empty,
        )
    table, report = rows.prepare(
        tables["train"],
        tables.get("test"),
        transfer=tables.get("transfer"),
        kind=task.kind,
        fields=tasks.content(task.kind, features or image),
        swap=task.swap,
        group=config.folds.group,
        folds=config.folds.count,
        stratify=config.folds.stratify,
        seed=config.seed,
        leaks=task.leaks,
    )
    if ranks.is_main():
        table = table.replace_schema_metadata({"labels": json.dumps(labels)})
        mapped.write(table, unit.path / "rows.parquet")
    unit.metrics.update(labels=labels, report={**report, "read": checks})
    unit.rows.update({part: pc.sum(pc.equal(table["part"], part)).as_py() for part in tables})


if __name__ == "__main__":
    main(prepare, __doc__)
