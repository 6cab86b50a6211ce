"""A row's fields and a template made into token ids that always fit the budget.

Texts are tokenized field by field, so that cutting one never touches the template's own words, and
with special tokens split, so that a "[SEP]" or an end-of-turn mark inside a text stays plain text.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from string import Formatter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmkd import mapped
from llmkd.errors import ConfigError, DataError
from llmkd.progress import bar
from llmkd.tasks import KINDS

Row = Mapping[str, str]
Encode = Callable[[Sequence[Row]], list[list[int]]]

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Piece:
    """Part of a template: the name of a text field, or a format string that is never cut."""

    field: str | None
    fixed: str


def encoder(
    tokenizer: Any,
    kind: str,
    *,
    template: str | None = None,
    max_tokens: int,
    max_words: Mapping[str, int] | None = None,
    extra: Sequence[str] = (),
) -> Encode:
    """A function from a batch of rows to their token ids, each at most `max_tokens` long.

    `template` is a str.format string over the kind's fields, its computed fields and `extra` (further
    string columns); None takes the kind's default. `max_words` caps a field's words before tokenizing.
    Tokens beyond the budget are taken from the fields as `trim` says, in the kind's TRIM order and
    the extra fields last. The tokens that the tokenizer puts around a text (BOS, CLS, SEP, EOS) are kept.
    Raises ConfigError for a template that does not fit the kind, or that fills the budget on its own.
    """
    task = KINDS[kind]
    caps = dict(max_words or {})
    pieces = _cut(template or task.TEMPLATE, (*task.FIELDS, *extra), task.COMPUTED)
    _check_template(pieces, task.FIELDS, caps)
    fields = [piece.field for piece in pieces if piece.field is not None]
    order = (*task.TRIM, tuple(extra))
    before, after = _surroundings(tokenizer)
    computes = any(name in task.COMPUTED for piece in pieces for name in _names(piece.fixed))

    def encode(rows: Sequence[Row]) -> list[list[int]]:
        if not rows:
            return []
        texts = [_capped(row, fields, caps) for row in rows]
        tokens = _tokens(tokenizer, (text for row in texts for text in row.values()), split_special=True)
        # Computed values join the literals beside them before tokenizing, as words in running text.
        values = [task.computed(row) if computes else {} for row in rows]
        fixed = [[piece.fixed.format_map(row) for piece in pieces] for row in values]
        literals = _tokens(tokenizer, (text for row in fixed for text in row), split_special=False)
        encoded = []
        for row_texts, row_fixed in zip(texts, fixed, strict=True):
            by_field = {name: tokens[text] for name, text in row_texts.items()}
            parts = [literals[text] for text in row_fixed]
            encoded.append(_assemble(pieces, by_field, parts, before, after, max_tokens, order))
        return encoded

    encode([dict.fromkeys((*task.FIELDS, *extra), "")])
    return encode


def check(
    kind: str, template: str | None, max_words: Mapping[str, int] | None = None, extra: Sequence[str] = ()
) -> None:
    """Raise ConfigError where a template does not fit its kind; as `encoder` would, without a tokenizer."""
    task = KINDS[kind]
    pieces = _cut(template or task.TEMPLATE, (*task.FIELDS, *extra), task.COMPUTED)
    _check_template(pieces, task.FIELDS, max_words or {})


def trim(lengths: Mapping[str, int], budget: int, groups: Sequence[Sequence[str]]) -> dict[str, int]:
    """Lengths to keep so that their sum is at most `budget`; all of them where they fit.

    The groups are cut in turn. Within one, the longest are cut down to a common level, but not below
    a quarter of the budget; where all groups at that floor are still too long, every field is cut to one
    level. A remainder smaller than the number of cut fields is left unused, so the order of fields
    never matters.
    """
    kept = dict(lengths)
    for group in groups:
        over = sum(kept.values()) - budget
        if over <= 0:
            break
        inside = [kept[name] for name in group if name in kept]
        level = max(_level(inside, sum(inside) - over), -(-budget // 4))
        kept.update({name: min(kept[name], level) for name in group if name in kept})
    if sum(kept.values()) > budget:
        level = _level(list(kept.values()), budget)
        kept = {name: min(length, level) for name, length in kept.items()}
    return kept


def encode_rows(
    rows: pa.Table, encode: Encode, *, batch: int = 1024
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Token ids of all rows, flat int32 and mapped from disk, and offsets (N + 1,) int64: row i from
    offsets[i]."""
    texts = rows.select([field.name for field in rows.schema if _is_text(field.type)])
    lengths: list[int] = [0]

    def parts() -> Iterator[npt.NDArray[np.int32]]:
        for start in bar(range(0, texts.num_rows, batch), "tokens"):
            encoded = encode(texts.slice(start, batch).to_pylist())
            lengths.extend(len(ids) for ids in encoded)
            yield np.fromiter(chain.from_iterable(encoded), dtype=np.int32)

    return mapped.tokens(parts()), np.cumsum(lengths, dtype=np.int64)


def _cut(template: str, texts: Sequence[str], computed: Sequence[str]) -> list[Piece]:
    pieces: list[Piece] = []
    fixed = ""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template cannot be read ({error}): write a lone brace as {{{{ or }}}}") from error
    for literal, name, form, conversion in parts:
        fixed += literal.replace("{", "{{").replace("}", "}}")
        if name is None:
            continue
        if form or conversion or name not in (*texts, *computed):
            known = ", ".join((*texts, *computed))
            raise ConfigError(f"template names the unknown field {{{name}}}: the fields are {known}")
        if name in texts:
            pieces += [Piece(None, fixed), Piece(name, "")]
            fixed = ""
        else:
            fixed += f"{{{name}}}"
    pieces.append(Piece(None, fixed))
    return [piece for piece in pieces if piece.field or piece.fixed]


def _check_template(pieces: Sequence[Piece], required: Sequence[str], caps: Collection[str]) -> None:
    fields = [piece.field for piece in pieces if piece.field is not None]
    for name in required:
        if name not in fields:
            raise ConfigError(f"template lacks the field {{{name}}}: add it")
    for name in fields:
        if fields.count(name) > 1:
            raise ConfigError(f"template names the field {{{name}}} twice: keep one")
    for name in caps:
        if name not in fields:
            raise ConfigError(f"max_words names the field {name!r}: the template has {', '.join(fields)}")


def _names(fixed: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(fixed) if name]


def _surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    ids, special = probe["input_ids"], probe["special_tokens_mask"]
    inner = [place for place, is_special in enumerate(special) if not is_special]
    if not inner:
        raise ConfigError("the tokenizer reads the letter a as nothing: take a tokenizer trained on text")
    return list(ids[: inner[0]]), list(ids[inner[-1] + 1 :])


def _capped(row: Row, fields: Sequence[str], caps: Mapping[str, int]) -> dict[str, str]:
    missing = [name for name in fields if row.get(name) is None]
    if missing:
        raise DataError(f"a row has no text for the field {missing[0]!r}: keep that column in stage 00")
    return {name: cap_words(row[name], caps.get(name)) for name in fields}


def cap_words(text: str, count: int | None) -> str:
    """The text up to the end of its `count`-th word, whitespace as it was; None caps nothing."""
    # Cheap and safe: n words need at least 2n - 1 characters.
    if count is None or len(text) < 2 * count:
        return text
    last = next(islice(_WORD.finditer(text), count - 1, None), None)
    return text if last is None else text[: last.end()]


def _tokens(tokenizer: Any, texts: Iterable[str], *, split_special: bool) -> dict[str, list[int]]:
    """Token ids by text; each distinct text is tokenized once."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    encoded = tokenizer(
        distinct,
        add_special_tokens=False,
        split_special_tokens=split_special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return dict(zip(distinct, encoded["input_ids"], strict=True))


def _assemble(
    pieces: Sequence[Piece],
    tokens: Mapping[str, list[int]],
    parts: Sequence[list[int]],
    before: list[int],
    after: list[int],
    max_tokens: int,
    order: Sequence[Sequence[str]],
) -> list[int]:
    fixed = len(before) + len(after) + sum(map(len, parts))
    if fixed > max_tokens:
        raise ConfigError(f"max_tokens {max_tokens} is below the template's own {fixed} tokens: raise it")
    kept = trim({name: len(ids) for name, ids in tokens.items()}, max_tokens - fixed, order)
    ids = list(before)
    for piece, part in zip(pieces, parts, strict=True):
        ids += part if piece.field is None else tokens[piece.field][: kept[piece.field]]
    return ids + after


def _level(lengths: Sequence[int], room: int) -> int:
    """Greatest level with sum(min(length, level)) <= room; 0 where there is no room."""
    left = max(room, 0)
    ordered = sorted(lengths)
    for place, length in enumerate(ordered):
        share = left // (len(ordered) - place)
        if length > share:
            return share
        left -= length
    return ordered[-1] if ordered else 0


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
