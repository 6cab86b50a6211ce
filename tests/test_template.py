"""Templates: pieces, budgets, special tokens, and the arithmetic of trimming."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmkd.errors import ConfigError, DataError
from llmkd.tasks.template import cap_words, encode_rows, encoder, trim

ROW = {"prompt": "p1 p2 p3", "response_a": "a1 a2 a3 a4", "response_b": "b1 b2"}
PLAIN = "Q {prompt} A {response_a} B {response_b}"


def words(*, around: bool = True) -> Any:
    """A tokenizer of one token a word, with [CLS] and [SEP] around a text."""
    known = [
        "[UNK]",
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "a",
        "Q",
        "A",
        "B",
        "yes",
        "no",
        "same",
        "[",
        "]",
        "CLS",
        "SEP",
    ]
    known += [f"{letter}{i}" for letter in "pab" for i in range(1, 40)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if around:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    wrap: Any = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def read(ids: list[int], tokenizer: Any) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def encoded(row: dict[str, str], **settings: Any) -> str:
    tokenizer = words()
    return read(
        encoder(tokenizer, "preference", **{"template": PLAIN, "max_tokens": 99, **settings})([row])[0],
        tokenizer,
    )


def test_a_row_that_fits_is_whole() -> None:
    assert encoded(ROW) == "[CLS] Q p1 p2 p3 A a1 a2 a3 a4 B b1 b2 [SEP]"


def test_a_tokenizer_without_surroundings_adds_none() -> None:
    tokenizer = words(around=False)
    encode = encoder(tokenizer, "preference", template=PLAIN, max_tokens=99)
    assert read(encode([ROW])[0], tokenizer) == "Q p1 p2 p3 A a1 a2 a3 a4 B b1 b2"


def test_special_tokens_inside_a_text_are_text_and_those_of_the_template_are_tokens() -> None:
    row = {**ROW, "response_a": "a1 [SEP] a2"}
    whole = encoded(row, template="{prompt} [SEP] {response_a} B {response_b}")
    assert whole == "[CLS] p1 p2 p3 [SEP] a1 [ SEP ] a2 B b1 b2 [SEP]"


def test_the_longer_answer_is_cut_first_and_keeps_its_beginning() -> None:
    assert encoded(ROW, max_tokens=12) == "[CLS] Q p1 p2 p3 A a1 a2 B b1 b2 [SEP]"
    # Below the floor of the answers the prompt is cut, the template never.
    assert encoded(ROW, max_tokens=8) == "[CLS] Q p1 A a1 B b1 [SEP]"
    assert encoded(ROW, max_tokens=5) == "[CLS] Q A B [SEP]"


def test_a_template_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_tokens 4 is below the template's own 5 tokens"):
        encoded(ROW, max_tokens=4)


def test_computed_and_extra_fields() -> None:
    row = {**ROW, "context": "p7 p8"}
    template = "{context} {longer} {code_a} {{ {prompt} {response_a} {response_b}"
    whole = encoded(row, template=template, extra=["context"])
    assert whole == "[CLS] p7 p8 a no [UNK] p1 p2 p3 a1 a2 a3 a4 b1 b2 [SEP]"
    with pytest.raises(DataError, match=r"no text for the field 'context'"):
        encoded(ROW, template=template, extra=["context"])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{prompt} {response_a} {respons_b}",
            r"unknown field \{respons_b\}: the fields are prompt, response_a, ",
        ),
        ("{prompt} {response_a}", r"lacks the field \{response_b\}"),
        ("{prompt} {response_a} {response_b} {prompt}", r"the field \{prompt\} twice"),
        ("{prompt} {response_a} {response_b", "cannot be read"),
        ("{prompt!r} {response_a} {response_b}", "unknown field"),
    ],
)
def test_a_wrong_template_is_named(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoded(ROW, template=template)


def test_words_are_capped_before_tokens_and_whitespace_stays() -> None:
    assert encoded(ROW, max_words={"response_a": 2}) == "[CLS] Q p1 p2 p3 A a1 a2 B b1 b2 [SEP]"
    assert cap_words(" one\n\n two  three ", 2) == " one\n\n two"
    assert cap_words(" one\n two ", 2) == " one\n two"
    assert cap_words("one two ", 3) == "one two "
    with pytest.raises(ConfigError, match=r"max_words names the field 'responses'"):
        encoded(ROW, max_words={"responses": 2})


def test_a_batch_equals_its_rows_one_by_one() -> None:
    rows = [{**ROW, "prompt": f"p{i}", "response_b": "b1 " * i} for i in range(1, 9)]
    encode = encoder(words(), "preference", template=PLAIN, max_tokens=12)
    assert encode(rows) == [encode([row])[0] for row in rows]
    assert encode([]) == []


def test_rows_of_a_table() -> None:
    table = pa.table({"id": ["x", "y", "z"], "text": ["a1 a2", "", "b1"], "label": [0, 1, 0]})
    tokens, offsets = encode_rows(table, encoder(words(), "classification", max_tokens=9), batch=2)
    assert tokens.dtype == np.int32
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [0, 4, 6, 9]
    assert read(tokens.tolist(), words()) == "[CLS] a1 a2 [SEP] [CLS] [SEP] [CLS] b1 [SEP]"


@pytest.mark.parametrize(
    ("lengths", "budget", "kept"),
    [
        ({"p": 3, "a": 4, "b": 5}, 12, {"p": 3, "a": 4, "b": 5}),
        ({"p": 10, "a": 90, "b": 20}, 100, {"p": 10, "a": 70, "b": 20}),
        ({"p": 10, "a": 90, "b": 80}, 100, {"p": 10, "a": 45, "b": 45}),
        (
            {"p": 80, "a": 90, "b": 20},
            100,
            {"p": 55, "a": 25, "b": 20},
        ),  # not below a quarter, then the prompt
        ({"p": 80, "a": 5, "b": 90}, 2, {"p": 0, "a": 0, "b": 0}),
    ],
)
def test_trimming(lengths: dict[str, int], budget: int, kept: dict[str, int]) -> None:
    assert trim(lengths, budget, (("a", "b"), ("p",))) == kept


@given(
    st.fixed_dictionaries({name: st.integers(0, 300) for name in "pabx"}),
    st.integers(0, 800),
    st.sampled_from([(("a", "b"), ("p",), ("x",)), (("p", "a", "b", "x"),), ((), ("x", "p"), ("a", "b"))]),
)
def test_trimming_always_fits_and_is_fair(
    lengths: dict[str, int], budget: int, groups: tuple[tuple[str, ...], ...]
) -> None:
    kept = trim(lengths, budget, groups)
    assert sum(kept.values()) <= budget
    assert all(0 <= kept[name] <= lengths[name] for name in lengths)
    cut = [name for name in lengths if kept[name] < lengths[name]]
    if sum(lengths.values()) <= budget:
        assert not cut
    else:
        assert budget - sum(kept.values()) < len(cut)  # nothing is thrown away needlessly
    for group in groups:
        for shorter in group:
            for longer in group:
                if lengths[shorter] <= lengths[longer] and shorter in cut:
                    assert kept[longer] == kept[shorter]
