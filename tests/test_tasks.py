"""Preference and classification: computed fields, mirrors and swaps."""

import pytest

from llmkd.tasks import KINDS, classification, preference

ROW = {
    "prompt": "how do I sort this?",
    "response_a": "Use sorted:\n```\nsorted(x)\n```",
    "response_b": "- call sort\n- or call sorted\n1. then print the list that you get",
}


def test_every_kind_has_the_whole_namespace() -> None:
    for kind in KINDS.values():
        assert kind.FIELDS
        assert "{" + kind.FIELDS[0] + "}" in kind.TEMPLATE
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
