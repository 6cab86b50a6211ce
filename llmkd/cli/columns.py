"""What the columns of an unknown file hold: enough of each to guess what it is for."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["text", "number", "turns", "chat", "other"]
SAMPLE = 5000  # rows whose lengths are measured
_CAMEL = re.compile(r"(?<=[a-zа-я0-9])(?=[A-ZА-Я])")
_WORD = re.compile(r"\d+|[^\W\d_]+")


@dataclass(frozen=True)
class Column:
    """One column: its kind, how many values it lacks, how many distinct ones it has, and how long they are.

    `turns` are lists of texts, `chat` lists of role and content, as lists or as JSON. `values` are the
    distinct ones, most frequent first, where there are at most 100. `whole`: numbers that are no fractions.
    """

    name: str
    kind: Kind
    rows: int
    missing: int
    distinct: int
    characters: float  # median, as are the words
    words: float
    values: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    whole: bool = False

    @property
    def is_long(self) -> bool:
        """Texts that people wrote, and not the few names of a category."""
        wordy = self.words >= 3 or self.characters >= 20
        return self.kind in ("text", "turns") and wordy and self.distinct > min(20, 0.3 * self.rows)

    @property
    def is_category(self) -> bool:
        """Few values, each of which comes back."""
        few = 2 <= self.distinct <= min(50, max(2, self.rows // 5))
        return few and self.kind in ("text", "number") and self.characters <= 40

    @property
    def is_key(self) -> bool:
        """A value of its own in each row."""
        return self.kind in ("text", "number") and not self.missing and self.distinct == self.rows


def columns_of(table: "pa.Table") -> list[Column]:
    return [column_of(name, table[name]) for name in dict.fromkeys(table.column_names)]


def column_of(name: str, data: "pa.ChunkedArray") -> Column:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_nested(data.type) or pa.types.is_binary(data.type) or pa.types.is_temporal(data.type):
        kind = _of_lists(data.slice(0, 100).to_pylist())
        texts = ["\n\n".join(map(str, value)) for value in data.slice(0, SAMPLE).to_pylist() if value]
        return Column(name, kind, len(data), data.null_count, len(set(texts)), *_lengths(texts))
    strings = data.cast(pa.string())
    given = strings.filter(pc.not_equal(pc.utf8_trim_whitespace(strings), ""))
    texts = given.slice(0, SAMPLE).to_pylist()
    distinct = pc.count_distinct(given).as_py()
    tally = Counter(given.to_pylist()).most_common() if distinct <= 100 else []
    kind = _of_strings(given, texts)
    return Column(
        name,
        kind,
        len(data),
        len(data) - len(given),
        distinct,
        *_lengths(texts),
        values=tuple(value for value, _ in tally),
        counts=tuple(count for _, count in tally),
        whole=kind == "number" and not any(re.search(r"[.eE]", text) for text in texts),
    )


def _lengths(texts: Sequence[str]) -> tuple[float, float]:
    """Median characters and words."""
    if not texts:
        return 0, 0
    return median(map(len, texts)), median(len(text.split()) for text in texts)


def _of_strings(given: "pa.ChunkedArray", texts: Sequence[str]) -> Kind:
    import pyarrow.compute as pc

    from llmkd.tasks.tabular import NUMBER

    if not texts:
        return "other"
    if pc.all(pc.match_substring_regex(given, NUMBER)).as_py() or set(texts) <= {"true", "false"}:
        return "number"
    if not texts[0].lstrip().startswith("["):
        return "text"
    try:
        found = _of_lists([json.loads(text) for text in texts[:100]])
    except ValueError:
        return "text"
    return "text" if found == "other" else found


def _of_lists(values: Sequence[Any]) -> Kind:
    """Lists of texts are turns; lists of role and content are chats."""
    inner = [item for value in values if isinstance(value, list) for item in value]
    if not inner or not all(isinstance(value, list | None) for value in values):
        return "other"
    if all(isinstance(item, dict) and {"role", "content"} <= set(item) for item in inner):
        return "chat"
    return "turns" if all(isinstance(item, str | None) for item in inner) else "other"


def tokens(name: str) -> tuple[str, ...]:
    """A name's words and numbers, casefolded: `responseA`, `Response #A` and `response_a` are alike."""
    return tuple(word.casefold() for word in _WORD.findall(_CAMEL.sub(" ", name)))


def hinted(columns: Iterable[Column], words: str) -> list[Column]:
    """The columns one of whose name's words is, or begins with, one of `words`; in the order of `words`."""
    found = []
    for hint in words.split():
        found += [column for column in columns if any(word.startswith(hint) for word in tokens(column.name))]
    return list(dict.fromkeys(found))
