"""A commented config for a data file: what it is for, which columns, which labels; each guess said aloud.

Without --test a part of the rows is held out: two files beside the config, the original untouched. The
config runs as it is written, on a laptop, with tiny models; real ones stand in it to be uncommented.
"""

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkd.cli.options import Answer, pairs

if TYPE_CHECKING:
    import pyarrow as pa

    from llmkd.cli.guess import Guess

COLUMNS = ("text", "label", "prompt", "response-a", "response-b", "id")
SAMPLE = 2000  # rows whose lengths are measured
ROWS = 3000  # training rows that tiny models read in minutes
TOKENS = (32, 256)  # bounds of a tiny model's max_tokens
VOCABULARY = 800  # of the smallest tokenizer that the config trains
TEMPLATE_TOKENS = 16


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a CSV, JSONL or Parquet file")
    parser.add_argument("--test", metavar="FILE", help="rows that judge, if there are such already")
    parser.add_argument("--output", "-o", type=Path, metavar="CONFIG", help="by default NAME.yaml")
    parser.add_argument("--run", metavar="DIR", help="where the run goes; by default runs/NAME")
    parser.add_argument("--kind", choices=["preference", "classification", "tabular", "causal_lm"])
    for name in COLUMNS:
        parser.add_argument(f"--{name}", metavar="COLUMN", help=f"the column of the {name.replace('-', ' ')}")
    parser.add_argument(
        "--value", action="append", default=[], metavar="VALUE=a|b|tie", help="what a winner's value says"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the rows that are held out (1)")
    parser.add_argument("--force", action="store_true", help="write over what stands there")


def answer(arguments: argparse.Namespace) -> Answer:
    from llmkd import config
    from llmkd.cli.columns import columns_of
    from llmkd.cli.draft import draft
    from llmkd.cli.guess import guess
    from llmkd.cli.parts import as_texts, divide, write
    from llmkd.sources import read

    name = re.sub(r"[^\w-]+", "-", Path(arguments.data).stem).strip("-") or "run"
    output = arguments.output or Path(f"{name}.yaml")
    parts = {part: output.with_name(f"{output.stem}-{part}.parquet") for part in ("train", "test")}
    given = [arguments.data, *([arguments.test] if arguments.test else [])]
    _free([output, *([] if arguments.test else parts.values())], arguments.force, given)
    table = read(arguments.data, seed=arguments.seed)
    asked = {name.replace("-", "_"): vars(arguments)[name.replace("-", "_")] for name in ("kind", *COLUMNS)}
    found = guess(
        columns_of(table),
        {name: value for name, value in asked.items() if value is not None},
        pairs(arguments.value, "--value", "VALUE=a|b|tie"),
    )
    tables, sources, said = divide(table, found, arguments.data, arguments.test, parts, arguments.seed)
    if "messages" in found.fields:
        tables = as_texts(tables, found)
    facts = {**measured(tables["train"], found), **asked_rows(tables["train"], found)}
    facts |= {"source": arguments.data, "run": arguments.run or f"runs/{name}", "seed": arguments.seed}
    facts |= sources
    text = draft(found, facts)
    check(config.parse(text, source=str(output)), tables)
    if not arguments.test:
        write(tables, parts)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    budget = [f"max_tokens: {facts['max_tokens']}, {facts['fit']}"] if facts["fit"] else []
    lines = [*found.why, *said, *budget]
    kept = ("kind", "fields", "label", "labels", "label_values", "id", "numeric", "categorical")
    data = {"config": str(output), **sources, **{key: getattr(found, key) for key in kept}, "said": lines}
    first = f"{arguments.data}: {table.num_rows} rows, {table.num_columns} columns"
    return Answer(data, "\n".join([first, *lines, last_words(output)]))


def last_words(output: Path) -> str:
    flags = ", ".join(f"--{name}" for name in ("kind", *COLUMNS, "value"))
    return (
        f"{output}: written; to correct a guess: {flags}, with --force\n"
        f"next: llmkd run --config {shlex.quote(str(output))}  (-j 4: on four cores)"
    )


def _free(paths: Sequence[Path], force: bool, given: Sequence[str]) -> None:
    """Raises ConfigError where something stands that may not be written over: the data given, ever."""
    from llmkd.errors import ConfigError

    taken = [path for path in paths if path.exists()]
    own = [path for path in taken for source in given if Path(source).exists() and path.samefile(source)]
    if own:
        raise ConfigError(f"{own[0]}: is the data itself; choose another name with -o")
    if taken and not force:
        raise ConfigError(f"{taken[0]}: is there already; choose another name with -o, or add --force")


def measured(table: "pa.Table", guess: "Guess") -> dict[str, Any]:
    """max_tokens by the lengths of rows, with a tokenizer like those that the config trains."""
    if guess.kind == "tabular":
        return {"max_tokens": 0, "fit": "", "real_tokens": 0, "drop": False}
    from tokenizers import ByteLevelBPETokenizer

    columns = [table[name].to_pylist() for name in guess.fields.values()]
    texts = ["\n".join(map(str, row)) for row in zip(*(column[:SAMPLE] for column in columns), strict=True)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, VOCABULARY, show_progress=False)
    around = TEMPLATE_TOKENS if guess.kind == "preference" else 2
    lengths = sorted(len(found.ids) + around for found in tokenizer.encode_batch(texts))
    usual = lengths[int(0.95 * (len(lengths) - 1))]
    least, most = TOKENS
    budget = min(max(least, -(-usual // 8) * 8), most)
    fits = sum(length <= budget for length in lengths) / len(lengths)
    letters = sorted(map(len, texts))[int(0.95 * (len(texts) - 1))]
    return {
        "max_tokens": budget,
        "fit": f"{fits:.0%} of the rows fit; the longest has {lengths[-1]}",
        "real_tokens": max(64, -(-(letters // 4 + 64) // 64) * 64),
        "drop": any(not str(value or "").strip() for column in columns for value in column),
    }


def asked_rows(table: "pa.Table", guess: "Guess") -> dict[str, Any]:
    """How many training rows are used, and what follows from it."""
    count = table.num_rows
    rows = ROWS if count > 1.5 * ROWS and guess.kind != "tabular" else None
    if rows and isinstance(guess.label, str):  # a file sorted by label would leave some of them out
        labels = table[guess.label].to_pylist()
        rows = rows if set(labels[:rows]) == set(labels) else None
    used = rows or count
    return {
        "rows": rows,
        "all_rows": count,
        "folds": 3 if used >= 150 else 2,
        "batch_rows": 16 if used < 1000 else 64,
    }


def check(config: Any, tables: Mapping[str, "pa.Table"]) -> None:
    """Both parts as stage 00 will read them. Raises DataError."""
    from llmkd.canonical import canonical
    from llmkd.tasks import KINDS

    task = config.task
    for part, table in tables.items():
        canonical(
            table,
            part=part,  # type: ignore[arg-type]
            kind=task.kind,
            columns=task.columns,
            label=None if task.kind == "causal_lm" else task.label,
            labels=task.labels or list(KINDS[task.kind].LABELS or ()),
            label_values=task.label_values,
            id_column=task.id,
            features=task.features and task.features.model_dump(),
            turns=task.turns,
            empty=task.empty,
        )
