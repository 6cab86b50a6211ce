"""A file without a test part made into two: rows to learn from, and rows that judge."""

import random
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmkd.cli.guess import Guess
from llmkd.errors import DataError
from llmkd.sources import read
from llmkd.tasks.causal_lm import as_chats

SHARE, MOST = 0.2, 2000  # of the rows that are held out


def divide(
    table: pa.Table, guess: Guess, data: str, test: str | None, parts: Mapping[str, Path], seed: int
) -> tuple[dict[str, pa.Table], dict[str, str], list[str]]:
    """The rows of train and test, the files they stand in, and what is to be said of it."""
    if test is not None:
        if "messages" in guess.fields:
            raise DataError(f"{data}: chats are written anew, as texts for tiny models; leave --test out")
        said = [f"test part: {test}, which never enters a fold"]
        tables = {"train": table, "test": read(test)}
        if guess.id and not ids_differ(tables, guess.id):
            said.append(f"id: not `{guess.id}`, as both files have the same values; rows count")
            guess.id = None
        return tables, {"train": data, "test": test}, said
    known = labelled(table, guess)
    whole = table.filter(known)
    held = held_out(whole, guess, seed)
    tables = {"train": whole.filter([not is_test for is_test in held]), "test": whole.filter(held)}
    alike = {"preference": "rows of one prompt", "tabular": "equal rows"}.get(guess.kind, "rows of one text")
    said = [
        f"test part: {sum(held)} of {len(held)} rows, drawn with seed {seed} ({alike} stay together) into "
        f"{parts['test']}, the others into {parts['train']}; {data} stays as it is"
    ]
    if len(whole) < len(table):
        said.append(f"left out: {len(table) - len(whole)} rows without a label or without a text")
    return tables, {part: str(path) for part, path in parts.items()}, said


def ids_differ(tables: Mapping[str, pa.Table], column: str) -> bool:
    found = [table[column].to_pylist() for table in tables.values() if column in table.column_names]
    return len(found) == len(tables) and set(found[0]).isdisjoint(found[1])


def as_texts(tables: Mapping[str, pa.Table], guess: Guess) -> dict[str, pa.Table]:
    """The parts of chats with a further column of plain texts, which the guess then names."""
    guess.chats, guess.fields = guess.fields["messages"], {"text": "chat as text"}
    guess.why.append(
        f"text: `{guess.chats}` as lines of `role: content`, as tokenizers made from nothing have no chat "
        "template; real models read the chats themselves"
    )
    found = {}
    for part, table in tables.items():
        chats = as_chats(table[guess.chats].to_pylist(), f"row {{row}} of {guess.chats!r}")
        texts = ["\n".join(f"{turn['role']}: {turn['content']}" for turn in chat) for chat in chats]
        found[part] = table.append_column("chat as text", pa.array(texts, pa.string()))
    return found


def labelled(table: pa.Table, guess: Guess) -> list[bool]:
    """Which rows have a label, and each text that they need: one of two answers may be empty."""
    names = [guess.label] if isinstance(guess.label, str) else list(guess.label or [])
    names += [column for field, column in guess.fields.items() if not field.startswith("response")]
    columns = [table[name].to_pylist() for name in names]
    return [
        all(value is not None and value != [] and str(value).strip() for value in row)
        for row in zip(*columns, strict=True)
    ]


def held_out(table: pa.Table, guess: Guess, seed: int) -> list[bool]:
    """Which rows are the test part: of each label's groups a share, so that no group stands in both parts."""
    fields = [guess.fields["prompt"]] if guess.kind == "preference" else list(guess.fields.values())
    columns = [table[name].to_pylist() for name in fields or [*guess.numeric, *guess.categorical]]
    groups = [
        "\0".join(" ".join(str(value).casefold().split()) for value in row)
        for row in zip(*columns, strict=True)
    ]
    single = isinstance(guess.label, str)
    labels = table[guess.label].to_pylist() if single else [""] * len(groups)
    by_label: dict[str, list[str]] = {}
    for group, label in {group: str(label) for group, label in zip(groups, labels, strict=True)}.items():
        by_label.setdefault(label, []).append(group)
    share, chosen = min(SHARE, MOST / max(len(groups), 1)), set[str]()
    for label in sorted(by_label):
        random.Random(f"{seed} {label}").shuffle(by_label[label])
        chosen |= set(by_label[label][: round(share * len(by_label[label]))])
    held = [group in chosen for group in groups]
    if not 10 <= sum(held) <= len(held) - 20:
        raise DataError(
            f"{len(held)} rows in {len(set(groups))} groups are too few to hold out a test part: "
            "bring more rows, or a file of your own with --test"
        )
    return held


def write(tables: Mapping[str, pa.Table], parts: Mapping[str, Path]) -> None:
    for part, table in tables.items():
        parts[part].parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, parts[part])
