"""Text for a causal language model: where it is read from, and the vocabulary that models share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, str]]  # [{"role": "user", "content": "..."}, ...]

FIELDS: tuple[str, ...] = ("text",)  # of a prepared table, where a chat is its JSON
NEEDED: tuple[tuple[str, ...], ...] = (("text",),)
LABELS: tuple[str, ...] | None = None
TEMPLATE = "{text}"
TRIM: tuple[tuple[str, ...], ...] = (("text",),)
COMPUTED: tuple[str, ...] = ()


def computed(row: Mapping[str, str]) -> dict[str, str]:
    """No computed template fields: a text is read as it is."""
    return {}


def mirror(count: int) -> tuple[int, ...] | None:
    """None: a text has no order to swap."""
    return None


def read_texts(source: str, column: str = "text") -> list[str]:
    """Documents of a file's text column, of a .txt file (one a line), or of `arena:rows=N,seed=S`."""
    from llmkd.sources import arena_numbers

    if source.startswith("arena:"):
        from llmkd.tasks.arena import texts

        return texts(*arena_numbers(source))
    if source.endswith(".txt"):
        if not Path(source).is_file():
            raise DataError(f"{source}: no such file: correct the path")
        try:
            text = Path(source).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
        return [line for line in text.splitlines() if line.strip()]
    return [text for text in _column(source, column) if text and text.strip()]


def as_chats(values: Sequence[Any], where: str = "row {row}") -> list[Chat]:
    """Lists of {role, content}, or JSON of them, as chats. Raises DataError; `where` names the `{row}`."""
    chats: list[Chat] = []
    for row, value in enumerate(values):
        try:
            chat = json.loads(value) if isinstance(value, str) else value
            chats.append([{"role": str(turn["role"]), "content": str(turn["content"])} for turn in chat])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise DataError(f"{where.format(row=row)} is no list of role and content") from None
    return chats


def _column(source: str, column: str) -> list[Any]:
    from llmkd.sources import read

    table = read(source)
    if column not in table.column_names:
        raise DataError(
            f"{source}: no column {column!r} among {table.column_names}; map it: columns: {{text: ...}}"
        )
    values: list[Any] = table[column].to_pylist()
    return values


def shared_vocabulary(
    student: PreTrainedTokenizerBase, teachers: Mapping[str, PreTrainedTokenizerBase]
) -> int:
    """The number of words that student and teachers share, id by id; a head's further rows are padding.

    Raises ConfigError for a teacher whose words, or their ids, are others.
    """
    words = student.get_vocab()
    for name, tokenizer in teachers.items():
        theirs = tokenizer.get_vocab()
        if theirs != words:
            odd = next(word for word in {**words, **theirs} if words.get(word) != theirs.get(word))
            raise ConfigError(
                f"teacher {name}: another vocabulary ({len(theirs)} words, the student's {len(words)}; "
                f"{odd!r} is {theirs.get(odd)} there and {words.get(odd)} here); take one that shares it"
            )
    return max(words.values()) + 1
