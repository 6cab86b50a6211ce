"""Two answers to one prompt in an unknown file: which columns, and which value says that which one won."""

from collections.abc import Sequence
from itertools import permutations

from llmkd.cli.columns import Column, tokens

WORDS = (("left", "right"), ("first", "second"), ("one", "two"), ("former", "latter"))
TIE = ("tie", "ties", "tied", "draw", "same", "equal", "both", "neither", "none")
HOT, COLD = ("1", "1.0", "true"), ("0", "0.0", "false")
# Values that are numbers alone; the first is what this package writes itself.
NUMBERS = ({"0": 0, "1": 1, "2": 2}, {"0": 0, "1": 1}, {"1": 0, "2": 1}, {"1": 0, "2": 1, "3": 2})


def answers(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """The two long columns whose names differ in one word that tells sides: a and b, 1 and 2, left and right.

    Of several such pairs the one with the longest texts.
    """
    long = [column for column in columns if column.is_long]
    found = [pair for pair in permutations(long, 2) if sides(pair[0].name, pair[1].name)]
    return max(found, key=lambda pair: pair[0].characters + pair[1].characters, default=None)


def sides(first: str, second: str) -> tuple[str, str] | None:
    """The words by which two names tell sides; None where they do not."""
    ours, theirs = tokens(first), tokens(second)
    if len(ours) != len(theirs):
        return None
    apart = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    if len(apart) != 1:
        return None
    a, b = apart[0]
    following = len(a) == len(b) == 1 and ord(b) == ord(a) + 1
    return (a, b) if following or (a, b) in WORDS else None


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
    said, marks = set(tokens(value)), sides(first, second)
    if value.casefold() in (first.casefold(), second.casefold()):
        return int(value.casefold() == second.casefold())
    if said & set(TIE):
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
