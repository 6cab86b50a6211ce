"""Preference between two answers to one prompt: the first wins, the second wins, or a tie."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value")

FIELDS: tuple[str, ...] = ("prompt", "response_a", "response_b")
# Of the fields in one inner tuple at least one has a text: one answer of two may be empty.
NEEDED: tuple[tuple[str, ...], ...] = (("prompt",), ("response_a", "response_b"))
LABELS: tuple[str, ...] | None = ("a", "b", "tie")
# The wording of the winning solution of the LMSYS Chatbot Arena competition (2024).
TEMPLATE = 'User question:\n"""{prompt}"""\nAnswer A:\n"""{response_a}"""\nAnswer B:\n"""{response_b}"""'
TRIM: tuple[tuple[str, ...], ...] = (("response_a", "response_b"), ("prompt",))
# What is graded of each answer; with it goes one number for how far a is ahead of b.
GRADED: tuple[str, ...] = ("new", "variety", "letters", "grounded", "breaks")
# What `summary` tells, each in one word.
SUMMARY: tuple[str, ...] = (
    "size_prompt",
    "alike",
    *(f"{name}_{side}" for name in ("size", "topic", "code", "list", *GRADED) for side in "ab"),
    "size_ratio",
    *(f"{name}_gap" for name in GRADED),
)
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
    "size_a",
    "size_b",
    "topic_a",
    "topic_b",
    "size_ratio",
    "alike",
    "words_prompt",
    "length_prompt",
    "size_prompt",
    *(f"{name}_{end}" for name in GRADED for end in ("a", "b", "gap")),
    "summary",
)
WORDY: tuple[str, ...] = ("summary",)  # for a template: as a category, nearly every row is one of its own

_WORD = re.compile(r"\w+")
_LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)


def computed(row: Mapping[str, str]) -> dict[str, str]:
    """Template fields that people weigh, as strings, of the uncut texts.

    Counts: words_*, chars_*, lines_*. Coarse, so that a tiny model can read them:
    length_* is a digit 0 to 9 (bits of the word count), longer is a, b or same, length_ratio is
    the log2 ratio of the word counts (a over b) in half octaves from -6 to +6, code_* and list_*
    are yes or no. Finer: size_* are word counts in quarter octaves, size_ratio their difference from -14 to
    +14, topic_* the share of the prompt's distinct words that an answer uses and alike the share of
    both answers' distinct words that they have in common, both in eighths.
    Of an answer's distinct words, new_* counts those that the prompt lacks, in quarter octaves, and
    grounded_* is the share that stands in the prompt or in the row's `context`, where it has that
    column (task.extra); variety_* is their share of all its words, both in sixteenths. letters_* is the mean
    length of its words, spaces included, in quarter characters; breaks_* its line breaks in half octaves.
    Each of these five has a *_gap, the first answer's minus the second's from -14 to +14.
    summary tells the finer fields as words of letters alone, which a tokenizer keeps whole: see `_word`.
    Under `swap` the _a and _b fields change places, longer, the ratios and gaps change sign, alike stays.
    """
    a, b = row["response_a"], row["response_b"]
    words = len(row["prompt"].split())
    asked, told_a, told_b = (_distinct(text) for text in (row["prompt"], a, b))
    known = asked | _distinct(row.get("context", ""))
    fields = {
        **_answer(a, "a"),
        **_answer(b, "b"),
        **_comparison(len(a.split()), len(b.split())),
        **_grades(_measured(a, told_a, asked, known), _measured(b, told_b, asked, known)),
        "topic_a": _eighths(asked & told_a, asked),
        "topic_b": _eighths(asked & told_b, asked),
        "alike": _eighths(told_a & told_b, told_a | told_b),
        "size_prompt": _size(words),
        "words_prompt": str(words),
        "length_prompt": _bucket(words),
    }
    return {**fields, "summary": " ".join(_word(name, fields[name]) for name in SUMMARY)}


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
        f"size_{side}": _size(words),
        f"code_{side}": "yes" if "```" in text else "no",
        f"list_{side}": "yes" if _LIST_ITEM.search(text) else "no",
    }


def _comparison(words_a: int, words_b: int) -> dict[str, str]:
    # A difference of logs, not the log of a ratio: its sign flips exactly under swap.
    octaves = math.log2(words_a + 1) - math.log2(words_b + 1)
    ratio, fine = max(-6, min(6, round(2 * octaves))), max(-14, min(14, round(4 * octaves)))
    longer = "same" if words_a == words_b else "a" if words_a > words_b else "b"
    return {"longer": longer, "length_ratio": _signed(ratio), "size_ratio": _signed(fine)}


def _measured(text: str, told: set[str], asked: set[str], known: set[str]) -> tuple[int, ...]:
    """An answer's numbers in the order of GRADED."""
    words = len(text.split())
    return (
        round(4 * math.log2(len(told - asked) + 1)),
        round(16 * len(told) / max(len(_WORD.findall(text)), 1)),
        min(round(4 * len(text) / max(words, 1)), 40),
        round(16 * len(told & known) / max(len(told), 1)),
        round(2 * math.log2(text.count("\n") + 1)),
    )


def _grades(a: Sequence[int], b: Sequence[int]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, ours, theirs in zip(GRADED, a, b, strict=True):
        gap = max(-14, min(14, ours - theirs))
        fields |= {f"{name}_a": str(ours), f"{name}_b": str(theirs), f"{name}_gap": _signed(gap)}
    return fields


def _word(name: str, value: str) -> str:
    """A field and its value as one word of letters: size_a 27 is sizeabb, size_ratio -3 sizeratiominusd.

    Tokenizers split letters from digits and signs; a word that stands in many rows becomes one token.
    """
    letters = value
    if value.lstrip("+-").isdecimal():
        high, low = divmod(abs(int(value)), 26)
        letters = "minus" * value.startswith("-") + (chr(96 + high) if high else "") + chr(97 + low)
    return name.replace("_", "") + letters


def _signed(number: int) -> str:
    return f"{number:+d}" if number else "0"


def _size(words: int) -> str:
    return str(round(4 * math.log2(words + 1)))


def _distinct(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def _eighths(part: set[str], whole: set[str]) -> str:
    return str(round(8 * len(part) / len(whole))) if whole else "0"


def _bucket(words: int) -> str:
    return str(min(words.bit_length(), 9))
