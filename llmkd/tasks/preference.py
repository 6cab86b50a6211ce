"""Preference between two answers to one prompt: the first wins, the second wins, or a tie."""

import math
import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

FIELDS: tuple[str, ...] = ("prompt", "response_a", "response_b")
# Of the fields in one inner tuple at least one has a text: one answer of two may be empty.
NEEDED: tuple[tuple[str, ...], ...] = (("prompt",), ("response_a", "response_b"))
LABELS: tuple[str, ...] | None = ("a", "b", "tie")
# The wording of the winning solution of the LMSYS Chatbot Arena competition (2024).
TEMPLATE = 'User question:\n"""{prompt}"""\nAnswer A:\n"""{response_a}"""\nAnswer B:\n"""{response_b}"""'
TRIM: tuple[tuple[str, ...], ...] = (("response_a", "response_b"), ("prompt",))
COMPUTED: tuple[str, ...] = (
    "words_a",
    "words_b",
    "chars_a",
    "chars_b",
    "lines_a",
    "lines_b",
    "length_a",
    "length_b",
    "code_a",
    "code_b",
    "list_a",
    "list_b",
    "longer",
    "length_ratio",
    "words_prompt",
    "length_prompt",
)

_LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)


def computed(row: Mapping[str, str]) -> dict[str, str]:
    """Template fields that people weigh, as strings, of the uncut texts.

    Counts: words_*, chars_*, lines_*. Coarse, so that a tiny model can read them:
    length_* is a digit 0 to 9 (bits of the word count), longer is a, b or same, length_ratio is
    the log2 ratio of the word counts (a over b) in half octaves from -6 to +6, code_* and list_*
    are yes or no. Under `swap` the _a and _b fields change places, longer and length_ratio change sign.
    """
    a, b = row["response_a"], row["response_b"]
    words = len(row["prompt"].split())
    return {
        **_answer(a, "a"),
        **_answer(b, "b"),
        **_comparison(len(a.split()), len(b.split())),
        "words_prompt": str(words),
        "length_prompt": _bucket(words),
    }


def mirror(count: int) -> tuple[int, ...] | None:
    """Permutation of `count` classes under swap: the first two change places, the others stay."""
    return (1, 0, *range(2, count))


def swap(row: Mapping[str, Value]) -> dict[str, Value]:
    """The row in the other order: each field x_a and its partner x_b change places.

    Works on any mapping by field name (a row's texts, or a table's columns); labels are not touched.
    """
    return {name: row.get(_partner(name), value) for name, value in row.items()}


def _partner(name: str) -> str:
    if name.endswith("_a"):
        return name[:-1] + "b"
    return name[:-1] + "a" if name.endswith("_b") else name


def _answer(text: str, side: str) -> dict[str, str]:
    words = len(text.split())
    return {
        f"words_{side}": str(words),
        f"chars_{side}": str(len(text)),
        f"lines_{side}": str(len(text.splitlines())),
        f"length_{side}": _bucket(words),
        f"code_{side}": "yes" if "```" in text else "no",
        f"list_{side}": "yes" if _LIST_ITEM.search(text) else "no",
    }


def _comparison(words_a: int, words_b: int) -> dict[str, str]:
    # A difference of logs, not the log of a ratio: its sign flips exactly under swap.
    half_octaves = round(2 * (math.log2(words_a + 1) - math.log2(words_b + 1)))
    ratio = max(-6, min(6, half_octaves))
    longer = "same" if words_a == words_b else "a" if words_a > words_b else "b"
    return {"longer": longer, "length_ratio": f"{ratio:+d}" if ratio else "0"}


def _bucket(words: int) -> str:
    return str(min(words.bit_length(), 9))
