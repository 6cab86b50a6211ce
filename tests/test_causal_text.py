"""Text for continued pretraining: every source read, every token kept, blocks that hold no padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from llmkd.errors import DataError
from llmkd.tasks.causal_lm import block_examples, read_texts

TEXTS = ["one text", "another, longer text with words", "a third"] * 20


def row(examples: Any, index: int) -> list[int]:
    found: list[int] = examples.inputs(np.array([index]))["input_ids"][0].tolist()
    return found


@pytest.mark.parametrize("block", [2, 7, 16, 64])
def test_blocks_hold_every_token_once_in_order(block: int) -> None:
    tokenizer = tiny.tokenizer()
    examples = block_examples(TEXTS, tokenizer, block)
    expected = [token for text in TEXTS for token in [*tokenizer(text)["input_ids"], 2]]
    assert [token for i in range(len(examples.ids)) for token in row(examples, i)] == expected
    assert set(examples.lengths[:-1]) <= {block, block + 1}
    assert examples.lengths.min() >= 2
    assert len(set(examples.ids)) == len(examples.ids)


def test_a_last_token_alone_joins_the_block_before() -> None:
    tokenizer = tiny.tokenizer()
    total = sum(len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS)
    block = next(size for size in range(2, total) if total % size == 1)
    assert block_examples(TEXTS, tokenizer, block).lengths[-1] == block + 1


def test_a_row_weighs_its_targets_and_has_no_label() -> None:
    examples = block_examples(TEXTS, tiny.tokenizer(), 16)
    np.testing.assert_array_equal(examples.weights, examples.lengths - 1)
    assert (examples.labels == -1).all()


def test_special_tokens_in_a_text_are_text() -> None:
    tokenizer = tiny.tokenizer()
    examples = block_examples(["see <eos> there"], tokenizer, 64)
    assert row(examples, 0).count(2) == 1
    assert row(examples, 0)[-1] == 2


def test_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="no tokens; the file is empty"):
        block_examples([], tiny.tokenizer(), 8)


def test_a_text_file_gives_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\n", encoding="utf-8")
    assert read_texts(str(tmp_path / "a.txt")) == ["one", "two"]


def test_a_column_of_a_table_gives_its_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one", None, " ", "two"]}), path)
    assert read_texts(str(path), "body") == ["one", "two"]
    with pytest.raises(DataError, match=r"no column 'text' among \['body'\]; map it"):
        read_texts(str(path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_texts(str(tmp_path / "a.txt"))


def test_the_arena_gives_texts_by_its_seed() -> None:
    one, same, other = (read_texts(f"arena:rows=20,seed={seed}") for seed in (1, 1, 2))
    assert one == same != other
    assert len(one) >= 20
