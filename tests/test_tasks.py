"""Preference and classification: computed fields, mirrors and swaps."""

import pytest
from tokenizers import pre_tokenizers

from llmkd.tasks import KINDS, classification, preference

ROW = {
    "prompt": "how do I sort this?",
    "response_a": "Use sorted:\n```\nsorted(x)\n```",
    "response_b": "- call sort\n- or call sorted\n1. then print the list that you get",
}


def test_every_kind_has_the_whole_namespace() -> None:
    for kind in KINDS.values():
        assert all("{" + name + "}" in kind.TEMPLATE for name in kind.FIELDS)
        assert {name for group in kind.TRIM for name in group} == set(kind.FIELDS)
        assert {name for group in kind.NEEDED for name in group} == set(kind.FIELDS)
        assert tuple(sorted(kind.computed(ROW))) == tuple(sorted(kind.COMPUTED))


def test_computed_fields_read_the_texts() -> None:
    fields = preference.computed(ROW)
    assert (fields["words_a"], fields["words_b"], fields["words_prompt"]) == ("5", "15", "5")
    assert (fields["lines_a"], fields["chars_a"]) == ("4", str(len(ROW["response_a"])))
    assert (fields["code_a"], fields["code_b"], fields["list_a"], fields["list_b"]) == (
        "yes",
        "no",
        "no",
        "yes",
    )
    assert (fields["longer"], fields["length_a"], fields["length_b"]) == ("b", "3", "4")
    assert fields["length_ratio"] == "-3"  # 2 * log2(6 / 16) = -2.83


def test_graded_fields_follow_their_formulas() -> None:
    fields = preference.computed(ROW)
    # a is 4 words, 3 of them distinct: use, sorted, x; b is 13, 12 of them distinct: "call" stands twice
    assert (fields["new_a"], fields["new_b"]) == ("8", "14")  # 4 log2(1 + 3), 4 log2(1 + 11) = 14.34
    assert fields["new_gap"] == "-6"
    assert (fields["variety_a"], fields["variety_b"]) == ("12", "15")  # 16 * 3/4, 16 * 12/13 = 14.77
    assert fields["letters_a"] == str(round(4 * len(ROW["response_a"]) / 5))
    assert (fields["breaks_a"], fields["breaks_b"], fields["breaks_gap"]) == (
        "4",
        "3",
        "+1",
    )  # 2 log2(4), (3)
    assert (fields["grounded_a"], fields["grounded_b"]) == ("0", "1")  # "sort" of twelve: 16 * 1/12


def test_a_context_grounds_answers_and_changes_nothing_else() -> None:
    plain, told = preference.computed(ROW), preference.computed({**ROW, "context": "sorted(x) sorts x"})
    changed = {name for name in plain if plain[name] != told[name]}
    assert changed == {"grounded_a", "grounded_b", "grounded_gap", "summary"}
    assert (told["grounded_a"], told["grounded_gap"]) == ("11", "+8")  # 16 * 2/3, 16 * 2/12


def test_the_summary_is_one_word_of_letters_for_each_field_and_tells_values_apart() -> None:
    tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = preference.computed(ROW)["summary"].split()
    assert [word for word, _ in tokenizer.pre_tokenize_str(" ".join(words))] == [words[0]] + [
        f"Ġ{word}" for word in words[1:]
    ]
    assert len(words) == len(preference.SUMMARY)
    assert {"sizeak", "codeayes", "newgapminusg", "breaksgapb"} <= set(words)
    told = {preference.computed({**ROW, "response_a": "w " * n})["summary"] for n in (0, 1, 2, 90, 5000)}
    assert len(told) == 5


@pytest.mark.parametrize("words", [(0, 0), (0, 1), (3, 4), (7, 200), (5000, 1)])
def test_computed_fields_mirror_under_swap(words: tuple[int, int]) -> None:
    row = {"prompt": "p", "response_a": "w " * words[0], "response_b": "w " * words[1]}
    given, turned = preference.computed(row), preference.computed(preference.swap(row))
    assert {name: turned[name] for name in given if name[-2:] in ("_a", "_b")} == {
        name: value for name, value in preference.swap(given).items() if name[-2:] in ("_a", "_b")
    }
    assert turned["longer"] == {"a": "b", "b": "a", "same": "same"}[given["longer"]]
    assert int(turned["length_ratio"]) == -int(given["length_ratio"])
    assert given["length_a"] in "0123456789"
    gaps = [name for name in given if name.endswith(("_gap", "_ratio"))]
    assert {int(turned[name]) + int(given[name]) for name in gaps} == {0}
    assert turned["alike"] == given["alike"]


def test_swap_exchanges_pairs_only_and_is_its_own_inverse() -> None:
    row = {
        "prompt": "p",
        "response_a": "x",
        "response_b": "y",
        "model_a": "m",
        "model_b": "n",
        "phase_a": "z",
    }
    turned = preference.swap(row)
    assert turned == {**row, "response_a": "y", "response_b": "x", "model_a": "n", "model_b": "m"}
    assert preference.swap(turned) == row


def test_mirror_exchanges_the_first_two_classes() -> None:
    assert preference.mirror(3) == (1, 0, 2)
    assert preference.mirror(2) == (1, 0)
    assert classification.mirror(2) is None
