"""Text for a causal language model: documents packed into blocks or in rows of their own, and chats.

A row's targets are the tokens that are to be predicted: all but the first, or of a chat the assistant's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkd.batches import Examples, Rows, token_examples
from llmkd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

PRIVATE = range(0xE000, 0xF900)  # code points that stand for nothing
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
    return [text for text in _column(source, column, "text") if text and text.strip()]


def read_chats(source: str, column: str = "messages") -> list[Chat]:
    """Chats of a table's column of [{role, content}, ...], as lists or as JSON. Raises DataError."""
    return as_chats(_column(source, column, "messages"), f"{source}: row {{row}} of {column!r}")


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


def _column(source: str, column: str, key: str) -> list[Any]:
    from llmkd.sources import read

    table = read(source)
    if column not in table.column_names:
        raise DataError(
            f"{source}: no column {column!r} among {table.column_names}; map it: columns: {{{key}: ...}}"
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


def block_examples(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block: int) -> Examples:
    """Blocks of `block` tokens over all documents, each opened by its special tokens and closed by eos.

    A block's tokens all see those before them, of other documents too: the usual way of pretraining.
    A row's weight is its number of targets, so that a step's mean is one over tokens.
    """
    flat = np.fromiter((token for ids in _documents(texts, tokenizer) for token in ids), dtype=np.int32)
    offsets = np.append(np.arange(0, len(flat), block, dtype=np.int64), len(flat))
    if len(flat) % block == 1:  # a last block of one token has no target
        offsets = np.delete(offsets, -2) if len(offsets) > 2 else offsets
    if len(flat) < 2:
        raise DataError("pretraining text: no tokens; the file is empty")
    lengths = np.diff(offsets)
    ids = [f"block-{i:07d}" for i in range(len(lengths))]
    labels = np.full(len(lengths), -1, dtype=np.int64)
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    return token_examples(ids, flat, offsets, labels, pad, weights=(lengths - 1).astype(np.float64))


def packed_examples(
    texts: Sequence[str], folds: Sequence[int], tokenizer: PreTrainedTokenizerBase, block: int
) -> tuple[Examples, dict[str, int]]:
    """Blocks of `block` tokens over one fold's documents, which do not see one another in them.

    Each document, or piece of one that a block's end cuts in two, counts its positions from 0: by them a
    model's attention keeps to it, so that its logits are those of the piece alone. A piece's first token is
    no target. Padding is a piece of its own. folds: each text's; `fold_of` tells a block's.
    Returns rows and counts {"rows", "cut", "without_targets"}: blocks, documents cut in two, blocks left out.
    """
    tokens, starts, names, cut, idle = [], [], [], 0, 0
    for fold in sorted(set(folds)):
        chosen = [text for text, own in zip(texts, folds, strict=True) if own == fold]
        documents = list(_documents(chosen, tokenizer))
        flat = np.fromiter((token for ids in documents for token in ids), dtype=np.int32)
        begins = np.zeros(len(flat) + 1, dtype=bool)  # a piece's first token; the last is nobody's
        begins[np.cumsum([0, *map(len, documents)])] = True
        cut += int((~begins[:-1:block]).sum())
        begins[::block] = True
        for at in range(0, len(flat), block):
            piece = slice(at, min(at + block, len(flat)))
            if begins[piece].all():
                idle += 1
                continue
            tokens.append(flat[piece])
            starts.append(begins[piece])
            names.append(f"block-{fold}-{at // block:07d}")
    if not tokens:
        raise DataError(f"{len(texts)} texts have no token to predict; raise max_tokens or mend the text")
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    weights = np.array([(~begins).sum() for begins in starts], dtype=np.float64)
    labels, pad = np.full(len(tokens), -1, dtype=np.int64), int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    examples = token_examples(names, np.concatenate(tokens), offsets, labels, pad, weights)
    flat_starts = np.concatenate(starts)
    counts = {"rows": len(tokens), "cut": cut, "without_targets": idle}
    beside = {"targets": _targets(~flat_starts, offsets)}
    return replace(examples, inputs=_with_positions(examples, flat_starts, offsets), beside=beside), counts


def fold_of(block: str) -> int:
    """The fold of a block of `packed_examples`, by its id."""
    return int(block.removeprefix("block-").rpartition("-")[0])


def _with_positions(examples: Examples, starts: NDArray[np.bool_], offsets: NDArray[np.int64]) -> Any:
    """The examples' inputs with position_ids (B, L), which begin anew at each of `starts` and at padding."""
    import torch

    def inputs(rows: Rows) -> dict[str, Tensor]:
        found = examples.inputs(rows)
        begins = np.zeros(found["input_ids"].shape, dtype=bool)  # (B, L)
        for i, row in enumerate(rows):
            length = offsets[row + 1] - offsets[row]
            begins[i, :length] = starts[offsets[row] : offsets[row + 1]]
            begins[i, length : length + 1] = True
        places = np.arange(begins.shape[1])
        positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        return {**found, "position_ids": torch.from_numpy(positions)}

    return inputs


def text_examples(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    ids: Sequence[str] | None = None,
) -> tuple[Examples, dict[str, int]]:
    """A document a row, cut to `max_tokens`; rows and counts {"rows", "cut", "without_targets"}."""
    rows = [(tokens, [True] * len(tokens)) for tokens in _documents(texts, tokenizer)]
    return _rows(rows, tokenizer, max_tokens, ids or [f"text-{i:07d}" for i in range(len(rows))])


def chat_examples(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    masked: bool = True,
    ids: Sequence[str] | None = None,
) -> tuple[Examples, dict[str, int]]:
    """A chat a row, in the tokenizer's chat template, cut to `max_tokens`.

    masked: the targets are what the assistant says, with the mark that ends its turn; else all tokens.
    Rows without a target are left out. Returns rows and counts {"rows", "cut", "without_targets"}.
    Raises ConfigError for a tokenizer without a template, DataError where the template rewrites earlier
    turns, so that where a turn begins is not known.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template; set one, or give plain text")
    names = ids or [f"chat-{i:07d}" for i in range(len(chats))]
    rows = [_chat(chat, name, tokenizer, masked) for chat, name in zip(chats, names, strict=True)]
    return _rows(rows, tokenizer, max_tokens, names)


def _chat(
    chat: Chat, name: str, tokenizer: PreTrainedTokenizerBase, masked: bool
) -> tuple[list[int], list[bool]]:
    """Token ids and which are targets. Pieces are tokenized apart: a prompt is when it is answered, too.

    A special token inside a turn, such as the mark that ends one, is text: nobody can write another's turn.
    """
    chat, said, mark = _set_apart(chat, tokenizer)
    whole = _templated(tokenizer, chat)
    tokens: list[int] = []
    targets: list[bool] = []
    for text, target in _pieces(chat, name, tokenizer, whole) if masked else [(whole, True)]:
        found = _encoded(text, said, mark, tokenizer)
        tokens += found
        targets += [target] * len(found)
    return tokens, targets


def _set_apart(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[Chat, list[str], str]:
    """The chat with a mark and a number for each special token that somebody wrote; these words; the mark."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    written = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    everything = "".join(turn["role"] + turn["content"] for turn in chat)
    mark = next(letter for letter in map(chr, PRIVATE) if letter not in everything)
    said = sorted(set(written.findall(everything)))
    numbered = {word: f"{mark}{number}{mark}" for number, word in enumerate(said)}

    def apart(text: str) -> str:
        return written.sub(lambda match: numbered[match[0]], text)

    return [{key: apart(text) for key, text in turn.items()} for turn in chat], said, mark


def _encoded(text: str, said: Sequence[str], mark: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids; what the template wrote may be special tokens, what `said` stands for is plain text."""
    found: list[int] = []
    for place, part in enumerate(re.split(f"{mark}([0-9]+){mark}", text)):
        words, plain = (said[int(part)], True) if place % 2 else (part, False)
        if words:
            encoded = tokenizer(words, add_special_tokens=False, split_special_tokens=plain)
            found += encoded["input_ids"]
    return found


def _pieces(
    chat: Chat, name: str, tokenizer: PreTrainedTokenizerBase, whole: str
) -> Iterator[tuple[str, bool]]:
    """The chat's text cut where the assistant's turns begin and end, and whether a piece is one of them."""
    end = 0
    for i, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        prompt = _templated(tokenizer, chat[:i], answer=True) if i else ""
        answered = _templated(tokenizer, chat[: i + 1])
        if not (whole.startswith(answered) and answered.startswith(prompt)):
            raise DataError(
                f"chat {name}: the chat template writes turn {i} otherwise when others follow; "
                "cut the chat there, or set masked: false"
            )
        yield whole[end : len(prompt)], False
        yield whole[len(prompt) : len(answered)], True
        end = len(answered)
    yield whole[end:], False


def _templated(tokenizer: PreTrainedTokenizerBase, chat: Chat, answer: bool = False) -> str:
    turns = [dict(turn) for turn in chat]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer))


def _rows(
    rows: Sequence[tuple[list[int], list[bool]]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    ids: Sequence[str],
) -> tuple[Examples, dict[str, int]]:
    kept = [i for i, (_, targets) in enumerate(rows) if any(targets[1:max_tokens])]
    cut = sum(len(rows[i][0]) > max_tokens for i in kept)
    if not kept:
        raise DataError(f"none of {len(rows)} rows has a token to predict; raise max_tokens or mend the text")
    tokens = [rows[i][0][:max_tokens] for i in kept]
    masks = [np.array(rows[i][1][:max_tokens]) for i in kept]
    for mask in masks:
        mask[0] = False  # nothing stands before it that could predict it
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    flat = np.fromiter((token for row in tokens for token in row), dtype=np.int32)
    weights = np.array([mask.sum() for mask in masks], dtype=np.float64)
    labels = np.full(len(kept), -1, dtype=np.int64)
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    examples = token_examples([ids[i] for i in kept], flat, offsets, labels, pad, weights)
    counts = {"rows": len(kept), "cut": cut, "without_targets": len(rows) - len(kept)}
    return replace(examples, beside={"targets": _targets(np.concatenate(masks), offsets)}), counts


def _targets(flat: NDArray[np.bool_], offsets: NDArray[np.int64]) -> Any:
    import torch

    def of(rows: Rows) -> dict[str, Tensor]:
        lengths = offsets[rows + 1] - offsets[rows]
        mask = np.zeros((len(rows), int(lengths.max())), dtype=bool)
        for i, row in enumerate(rows):
            mask[i, : lengths[i]] = flat[offsets[row] : offsets[row + 1]]
        return {"mask": torch.from_numpy(mask)}  # (B, L): which tokens are to be predicted

    return of


def _documents(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, batch: int = 512
) -> Iterator[list[int]]:
    """Each text's token ids, closed by eos."""
    eos = tokenizer.eos_token_id
    for begin in range(0, len(texts), batch):
        for ids in tokenizer(list(texts[begin : begin + batch]), split_special_tokens=True)["input_ids"]:
            yield [*ids, eos] if eos is not None and (not ids or ids[-1] != eos) else ids
