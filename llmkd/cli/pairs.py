"""Two answers to one prompt in an unknown file: which columns, and which value says that which one won."""

from collections.abc import Sequence
from itertools import permutations

from llmkd.cli.columns import Column, tokens

WORDS = (("left", "right"), ("first", "second"), ("one", "two"), ("former", "latter"))
TIE = "tie ties tied draw same equal both neither none gleich unentschieden beide keine égal igual empate"
HOT, COLD = ("1", "1.0", "true"), ("0", "0.0", "false")
# Values that are numbers alone; the first is what this package writes itself.
NUMBERS = ({"0": 0, "1": 1, "2": 2}, {"0": 0, "1": 1}, {"1": 0, "2": 1}, {"1": 0, "2": 1, "3": 2})


def answers(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """The two long columns whose names differ in one word that tells sides: a and b, 1 and 2, left and right;
    else in any word, of any language, where a column of a few values holds both words.

    Of several such pairs the one with the longest texts.
    """
    couples = list(permutations([column for column in columns if column.is_long], 2))
    found = [pair for pair in couples if sides(pair[0].name, pair[1].name)]
    found = found or [pair for pair in couples if _compared(columns, pair[0].name, pair[1].name)]
    return max(found, key=lambda pair: pair[0].characters + pair[1].characters, default=None)


def sides(first: str, second: str) -> tuple[str, str] | None:
    """The words by which two names tell sides; None where they do not."""
    if (words := apart(first, second)) is None:
        return None
    a, b = words
    following = len(a) == len(b) == 1 and ord(b) == ord(a) + 1
    return words if following or words in WORDS else None


def apart(first: str, second: str) -> tuple[str, str] | None:
    """The one word in which two names differ, in each; None where they differ in more."""
    ours, theirs = tokens(first), tokens(second)
    if len(ours) != len(theirs):
        return None
    found = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    return found[0] if len(found) == 1 else None


def _compared(columns: Sequence[Column], first: str, second: str) -> bool:
    """Whether values of some column name both columns, by the words in which their names differ."""
    words = apart(first, second)
    return words is not None and any(
        all(any(word in tokens(value) for value in column.values) for word in words)
        for column in columns
        if column.is_category
    )


def winner(values: Sequence[str], first: str, second: str) -> dict[str, int] | None:
    """Each value of a winner column -> 0 (the first answer), 1 (the second), 2 (a tie); None where one
    value cannot be told, or where no answer ever wins."""
    for known in NUMBERS:
        if set(values) == set(known):
            return dict(known)
    found = {value: side(value, first, second) for value in values}
    told = {value: number for value, number in found.items() if number is not None}
    return told if len(told) == len(values) and {0, 1} <= set(told.values()) else None


def side(value: str, first: str, second: str) -> int | None:
    """0, 1 or 2 for one value, by an answer's own name, by the word that tells its side, or by a tie's."""
    said, marks = set(tokens(value)), apart(first, second)
    if value.casefold() in (first.casefold(), second.casefold()):
        return int(value.casefold() == second.casefold())
    if said & set(TIE.split()):
        return 2
    for a, b in (*([marks] if marks else []), ("a", "b"), ("1", "2"), *WORDS):
        if (a in said) != (b in said):
            return int(b in said)
    return None


def one_hot(columns: Sequence[Column], first: str, second: str) -> list[str] | None:
    """Names of columns of 0 and 1, as many ones as rows, that say who won, in the order a, b, tie."""
    ones: dict[int, tuple[str, int]] = {}
    for column in columns:
        counts = dict(zip(column.values, column.counts, strict=True))
        number = side(column.name, first, second)
        if number is not None and counts and set(counts) <= {*HOT, *COLD}:
            ones.setdefault(number, (column.name, sum(counts.get(value, 0) for value in HOT)))
    whole = {0, 1} <= set(ones) and sum(count for _, count in ones.values()) == columns[0].rows
    return [ones[number][0] for number in sorted(ones)] if whole else None
