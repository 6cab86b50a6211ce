"""The embedded data: reproducible to the bit, with class probabilities that hold."""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from llmkd.tasks import arena


def bayes(table: pa.Table) -> npt.NDArray[np.float64]:
    return np.array(table["bayes"].to_pylist())


def test_the_seed_decides_every_bit() -> None:
    table = arena.generate(50, 1)
    assert table.equals(arena.generate(50, 1))
    assert not table.equals(arena.generate(50, 2))
    rows = "\n".join(str([*row.values()][:4]) for row in table.to_pylist())
    # Guards every figure measured on this data: a change of the texts or labels must be a choice.
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "fd47f129c1742b27"


def test_columns_and_sizes() -> None:
    table = arena.generate(300, 5)
    assert table.schema.names == ["prompt", "response_a", "response_b", "label", "bayes"]
    assert table["label"].type == pa.int32()
    assert table["bayes"].type == pa.list_(pa.float32())
    assert 8 <= np.median([len(text.split()) for text in table["prompt"].to_pylist()]) <= 14
    assert max(len(text.split()) for text in table["response_a"].to_pylist()) <= 20
    assert len(set(table["prompt"].to_pylist())) < 0.7 * 300  # prompts repeat, so groups matter
    assert arena.generate(0, 1).num_rows == 0


def test_labels_follow_the_known_probabilities() -> None:
    table = arena.generate(4000, 7)
    known, labels = bayes(table), table["label"].to_numpy()
    assert known.sum(axis=1) == pytest.approx(1, abs=1e-6)
    shares = np.bincount(labels, minlength=3) / 4000
    assert shares == pytest.approx(known.mean(axis=0), abs=0.025)
    entropy = -(known * np.log(known)).sum(axis=1).mean()
    assert -np.log(known[np.arange(4000), labels]).mean() == pytest.approx(entropy, abs=0.04)
    assert 0.75 < entropy < 0.85
    sure = known[:, 0] > 0.7
    assert (labels[sure] == 0).mean() == pytest.approx(known[sure, 0].mean(), abs=0.04)


def test_the_tie_model_is_fair_for_people_and_not_for_machines() -> None:
    gap = np.array([-1.5, 0.0, 1.5])
    human, machine = arena.probabilities(gap, "human"), arena.probabilities(gap, "machine")
    np.testing.assert_allclose(human[::-1, [1, 0, 2]], human)
    assert human[1, 0] == pytest.approx(human[1, 1])
    assert machine[1, 0] > machine[1, 1]
    assert machine[2, 0] > human[2, 0]


def test_the_machine_judges_the_same_texts_more_sharply() -> None:
    human, machine = arena.generate(500, 3), arena.generate(500, 3, judge="machine")
    assert human["response_a"].equals(machine["response_a"])
    assert bayes(machine).max(axis=1).mean() > bayes(human).max(axis=1).mean() + 0.05


def test_what_makes_an_answer_good() -> None:
    bread, guitar = 0, 1
    draw = np.full(5 + 2 * arena.MAX_CLAUSES, 0.5)
    kinds = slice(5, 5 + arena.MAX_CLAUSES)

    def worth(kind: float, topic: int, wanted: str = "", listed: bool = True) -> float:
        draw[kinds], draw[3] = kind, 0.1 if listed else 0.9
        return arena.answer(draw, topic, wanted)[1]

    assert worth(0.1, bread) > worth(0.99, bread) > worth(0.6, bread)  # true, of another topic, false
    assert worth(0.1, bread, "as a list") > worth(0.1, bread, "as prose")
    assert worth(0.1, bread, "as prose", listed=False) > worth(0.1, bread, "as prose", listed=True)
    draw[kinds] = 0.1
    assert any(fact in arena.answer(draw, guitar, "")[0] for fact in arena.TOPICS[guitar][1])


def test_texts_are_documents_of_true_facts() -> None:
    documents = arena.texts(40, 2)
    assert documents == arena.texts(40, 2)
    assert len(set(documents)) == 40
    assert not any(claim in text.split() for text in documents for claim in arena.FALSE_CLAIMS)
    assert all("\n" in text for text in documents)
