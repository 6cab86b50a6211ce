"""Texts become rows of tokens in mapped files: what is held of them does not grow with their length."""

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny

from llmkd import lm_rows

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WAYS = {"rows": (False, False), "chats": (True, False), "packs": (False, True)}  # chats, pack


def table(count: int, words: int, chats: bool) -> pa.Table:
    def text(i: int) -> str:
        said = f"{i} " + "words and more " * words
        turns = [{"role": "user", "content": "some"}, {"role": "assistant", "content": said}]
        return json.dumps(turns) if chats else said

    columns = {"id": [f"r{i}" for i in range(count)], "text": [text(i) for i in range(count)]}
    return pa.table({**columns, "part": ["train"] * count, "fold": [i % 2 for i in range(count)]})


def held(make: Callable[[], Any]) -> tuple[Any, int]:
    """What it makes, and the bytes of Python and numpy that outlive it."""
    tracemalloc.start()
    try:
        made = make()
        return made, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("way", WAYS)
def test_rows_hold_no_tokens(way: str) -> None:
    tokenizer, (chats, pack) = tiny.tokenizer(), WAYS[way]
    tokenizer.chat_template = CHAT
    settings = {"chats": chats, "pack": pack, "mask_prompt": True, "max_tokens": 5000}

    def made(words: int) -> tuple[Any, int]:
        rows = table(300, words, chats)
        return held(lambda: lm_rows.examples(rows, tokenizer, "train", **settings)[0])

    made(2)  # what is made once is made
    few, small = made(50)
    many, large = made(500)
    grown = int(many.lengths.sum() - few.lengths.sum())
    assert grown > 300_000
    assert large - small < grown // 20, "4 bytes a token and 1 a mark, were they held"
    begins = [one.inputs(np.array([1]))["input_ids"][0, :5] for one in (few, many)]
    np.testing.assert_array_equal(*begins)
