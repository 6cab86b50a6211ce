"""Chats in a tokenizer's template, and what in them the assistant says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

from llmkd.batches import Examples
from llmkd.errors import ConfigError, DataError
from llmkd.tasks.causal_lm import Chat
from llmkd.tasks.text_rows import target_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRIVATE = range(0xE000, 0xF900)  # code points that stand for nothing


def chat_examples(
    chats: Iterable[Chat],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    masked: bool = True,
    ids: Iterable[str] | None = None,
) -> tuple[Examples, dict[str, int]]:
    """A chat a row, in the tokenizer's chat template, cut to `max_tokens`.

    masked: the targets are what the assistant says, with the mark that ends its turn; else all tokens.
    Rows without a target are left out. Returns rows and counts {"rows", "cut", "without_targets"}.
    Raises ConfigError for a tokenizer without a template, DataError where the template rewrites earlier
    turns, so that where a turn begins is not known.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template; set one, or give plain text")
    names = ids if ids is not None else (f"chat-{i:07d}" for i in count())
    rows = (
        (name, *_chat(chat, name, tokenizer, masked))
        for chat, name in zip(chats, names, strict=ids is not None)
    )
    return target_examples(rows, tokenizer, max_tokens)


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
