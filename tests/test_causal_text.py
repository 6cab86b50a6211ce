"""Text for language models: every source read, every token kept, blocks without padding, chats' targets."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from llmkd.errors import ConfigError, DataError
from llmkd.tasks.blocks import block_examples, fold_of, packed_examples
from llmkd.tasks.causal_lm import read_texts, shared_vocabulary
from llmkd.tasks.chats import chat_examples
from llmkd.tasks.text_rows import text_examples

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


@pytest.mark.parametrize("block", [2, 7, 16, 64])
def test_a_pack_counts_each_document_anew_and_holds_every_token(block: int) -> None:
    tokenizer = tiny.tokenizer()
    folds = [i % 3 for i in range(len(TEXTS))]
    examples, counts = packed_examples(TEXTS, folds, tokenizer, block)
    documents = [[*tokenizer(text)["input_ids"], 2] for text in TEXTS]
    assert {fold_of(id) for id in examples.ids} == {0, 1, 2}
    assert counts["rows"] == len(examples.ids) == len(set(examples.ids))
    left_out = 0
    for fold in range(3):
        own = [documents[i] for i in range(len(TEXTS)) if folds[i] == fold]
        at = [i for i, id in enumerate(examples.ids) if fold_of(id) == fold]
        tokens = [token for ids in own for token in ids]
        found = [token for i in at for token in row(examples, i)]
        left_out += len(tokens) - len(found)
        assert counts["without_targets"] or found == tokens
    assert left_out <= block * counts["without_targets"]
    packed = np.array([0, len(examples.ids) - 1, 1])
    inputs, targets = examples.inputs(packed), examples.beside["targets"](packed)["mask"]
    positions, real = inputs["position_ids"], inputs["attention_mask"].bool()
    np.testing.assert_array_equal(targets, real & (positions > 0))
    np.testing.assert_array_equal(examples.weights[packed], targets.sum(-1))
    assert (positions[:, 0] == 0).all()
    steps = positions.diff(dim=1)
    assert ((steps == 1) | (positions[:, 1:] == 0)).all()
    ends = (inputs["input_ids"] == 2)[:, :-1] & real[:, :-1]
    assert (positions[:, 1:][ends] == 0).all(), "a document that ends is followed by another, or by padding"


def test_documents_cut_by_a_block_s_end_are_counted() -> None:
    tokenizer = tiny.tokenizer()
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS]
    ends = np.cumsum(lengths)
    _, counts = packed_examples(TEXTS, [0] * len(TEXTS), tokenizer, 16)
    assert counts["cut"] == sum(place not in ends for place in range(16, ends[-1], 16))
    with pytest.raises(DataError, match="1 texts have no token to predict"):
        packed_examples(["a text"], [0], tokenizer, 1)


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


# --- rows of their own, and chats

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHAT = [
    {"role": "user", "content": "some words"},
    {"role": "assistant", "content": "a few more"},
    {"role": "user", "content": "to learn"},
    {"role": "assistant", "content": "of them"},
]


def chatting() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def marked(examples: Any, index: int) -> list[bool]:
    found: list[bool] = examples.beside["targets"](np.array([index]))["mask"][0].tolist()
    return found


def test_a_document_is_a_row_and_all_but_its_first_token_a_target() -> None:
    tokenizer = tiny.tokenizer()
    examples, counts = text_examples(TEXTS[:3], tokenizer, 8)
    for i, text in enumerate(TEXTS[:3]):
        whole = [*tokenizer(text)["input_ids"], 2]
        assert row(examples, i) == whole[:8]
        assert marked(examples, i) == [False] + [True] * (len(whole[:8]) - 1)
    assert counts["cut"] == sum(len(tokenizer(text)["input_ids"]) + 1 > 8 for text in TEXTS[:3]) > 0
    np.testing.assert_array_equal(examples.weights, examples.lengths - 1)


def test_only_what_the_assistant_says_is_a_target() -> None:
    tokenizer = chatting()
    examples, counts = chat_examples([CHAT], tokenizer, 500)
    said = [token for token, target in zip(row(examples, 0), marked(examples, 0), strict=True) if target]
    assert tokenizer.decode(said) == "a few more <end>\nof them <end>\n"
    assert tokenizer.decode(row(examples, 0)) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert examples.weights.tolist() == [len(said)]
    assert counts == {"rows": 1, "cut": 0, "without_targets": 0}
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert row(examples, 0)[: len(ids)] == ids, "the prompt as it is tokenized when it is answered"


def test_an_unmasked_chat_is_all_targets() -> None:
    examples, _ = chat_examples([CHAT], chatting(), 500, masked=False)
    assert marked(examples, 0) == [False] + [True] * (int(examples.lengths[0]) - 1)


def test_a_row_without_a_target_is_left_out_and_counted() -> None:
    tokenizer = chatting()
    silent = [{"role": "user", "content": "words"}]
    late = [{"role": "user", "content": "words " * 40}, {"role": "assistant", "content": "a"}]
    examples, counts = chat_examples([silent, CHAT, late], tokenizer, 60, ids=["x", "y", "z"])
    assert list(examples.ids) == ["y"]
    assert counts["without_targets"] == 2
    with pytest.raises(DataError, match="none of 1 rows has a token to predict"):
        chat_examples([silent], tokenizer, 60)


def test_masks_are_padded_like_their_rows() -> None:
    examples, _ = chat_examples([CHAT, CHAT[:2]], chatting(), 500)
    both = np.array([1, 0])
    mask = examples.beside["targets"](both)["mask"]
    assert mask.shape == examples.inputs(both)["input_ids"].shape
    assert mask[0].tolist()[: examples.lengths[1]] == marked(examples, 1)
    assert not mask[0, examples.lengths[1] :].any()
    assert mask[1].tolist() == marked(examples, 0)


def test_a_template_that_rewrites_turns_is_refused_unless_all_is_target() -> None:
    tokenizer = chatting()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ loop.length }};{% endfor %}"
    with pytest.raises(DataError, match="chat chat-0000000: the chat template writes turn 1 otherwise"):
        chat_examples([CHAT], tokenizer, 500)
    assert chat_examples([CHAT], tokenizer, 500, masked=False)[1]["rows"] == 1


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="no chat template; set one"):
        chat_examples([CHAT], tiny.tokenizer(), 500)


def test_a_vocabulary_is_shared_word_by_word() -> None:
    one, same = tiny.tokenizer(), tiny.tokenizer()
    other = tiny.tokenizer(["quite other text with others"], 280)
    assert shared_vocabulary(one, {"t": same}) == len(one)
    with pytest.raises(ConfigError, match=r"teacher u: another vocabulary \(\d+ words, the student's \d+;"):
        shared_vocabulary(one, {"t": same, "u": other})
