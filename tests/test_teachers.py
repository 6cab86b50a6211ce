"""Teachers that are no neural nets: boosted trees, and files that somebody else wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy.special import softmax

from llmkd.errors import CacheError, ConfigError, DataError, ModelError
from llmkd.teachers import file
from llmkd.teachers import lightgbm as trees
from llmkd.teachers.columns import feature_columns

LABELS = ["a", "b", "tie"]
TRAIN, DEV = np.arange(300), np.arange(300, 400)

# --- boosted trees


def rows(seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """400 rows whose class is told by a number and, more, by a category."""
    random = np.random.default_rng(seed)
    number, level = random.normal(size=400), random.choice(["no", "so", "yes"], 400)
    scores = np.stack([number, (level == "yes") * 2.0, (level == "no") * 2.0], 1)
    labels = (scores + random.normal(size=(400, 3))).argmax(1)
    noise = random.normal(size=400)
    return trees.frame({"number": number, "level": level, "noise": noise}), labels


def grow(
    features: pd.DataFrame, labels: np.ndarray, dev: np.ndarray | None = DEV, classes: int = 3, **more: Any
) -> Any:
    settings = {"rounds": 60, "early_stopping": 5, "seed": 1, "threads": 1, **more}
    params = settings.pop("params", {"num_leaves": 7, "learning_rate": 0.2, "bagging_fraction": 0.8})
    return trees.fit_fold(features, labels, TRAIN, dev, classes, params=params, **settings)


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(softmax(logits.astype(np.float64), -1)[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("classes", [2, 3])
def test_softmax_of_the_logits_is_the_model_s_probability(classes: int) -> None:
    features, labels = rows()
    model, history = grow(features, labels % classes, classes=classes)
    at = np.array([399, 0, 7])
    logits = trees.logits(model, features, at)
    p = np.asarray(model.predict(features.iloc[at]))
    expected = p if classes == 3 else np.stack([1 - p, p], 1)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(softmax(logits, -1), expected, rtol=1e-5)
    told = log_loss(trees.logits(model, features, DEV), labels[DEV] % classes)
    assert history["best"] == pytest.approx(told, abs=1e-6)


def test_trees_learn_and_end_at_their_best_round() -> None:
    features, labels = rows()
    model, history = grow(features, labels)
    assert history["best"] < 0.95 < np.log(3)
    assert history["best_iteration"] == history["rounds"] - 5 == model.num_trees() / 3
    _, patient = grow(features, labels, early_stopping=0)
    assert (patient["rounds"], patient["best_iteration"]) == (60, history["best_iteration"])
    assert json.loads(json.dumps(history)) == history


@pytest.mark.parametrize("dev", [None, DEV])
def test_without_labelled_development_rows_all_rounds_are_kept(dev: np.ndarray | None) -> None:
    features, labels = rows()
    labels[DEV] = -1
    model, history = grow(features, labels, dev, rounds=9)
    assert history == {"best_iteration": 9, "best": None, "rounds": 9}
    assert model.num_trees() == 27


def test_rows_without_a_label_are_left_out() -> None:
    features, labels = rows()
    other = np.where(np.arange(400) % 3 == 0, -1, labels)
    swapped = features.copy()
    swapped.loc[other == -1, "number"] = 1e6  # would move every split that saw it
    one, two = (trees.logits(grow(x, other)[0], features, DEV) for x in (features, swapped))
    np.testing.assert_array_equal(one, two)
    with pytest.raises(DataError, match=r"no labelled rows to train on; check folds\.count"):
        grow(features, np.full(400, -1))


def test_a_seed_gives_one_model_on_any_number_of_threads() -> None:
    features, labels = rows()
    params = {"bagging_fraction": 0.5, "bagging_freq": 1, "feature_fraction": 0.5}
    one, two, other = (
        trees.logits(grow(features, labels, params=params, seed=seed, threads=threads)[0], features, DEV)
        for seed, threads in ((1, 1), (1, 2), (2, 1))
    )
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - other).max() > 1e-3


def test_a_saved_model_is_text_and_gives_the_same_logits(tmp_path: Path) -> None:
    features, labels = rows()
    model, _ = grow(features, labels)
    trees.save(model, tmp_path / "model.txt")
    loaded = trees.load(tmp_path / "model.txt")
    assert (tmp_path / "model.txt").read_text().startswith("tree\n")
    assert trees.categories(loaded) == ["level"]
    at = np.arange(400)
    np.testing.assert_array_equal(trees.logits(loaded, features, at), trees.logits(model, features, at))


@pytest.mark.parametrize("keep", [0, 0.3, 0.9, 0.99])
def test_a_damaged_model_is_refused(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "model.txt"
    trees.save(grow(*rows(), rounds=3)[0], path)
    path.write_text(path.read_text()[: int(keep * path.stat().st_size)])
    with pytest.raises(ModelError, match=r"model\.txt: not a whole LightGBM text model; run stage 02 anew"):
        trees.load(path)
    with pytest.raises(ModelError, match="no such file"):
        trees.load(tmp_path / "none.txt")


def test_a_level_keeps_its_meaning_in_another_frame(tmp_path: Path) -> None:
    """Codes depend on which levels a frame happens to hold; the levels' names do not."""
    features, labels = rows()
    model, _ = grow(features, labels)
    at = np.flatnonzero(features["level"] != "no")[:20]
    values = {name: features[name].astype(object).iloc[at].tolist() for name in features}
    few = trees.frame(values, trees.categories(model))
    assert few["level"].cat.categories.tolist() == ["so", "yes"]
    np.testing.assert_array_equal(trees.logits(model, few, np.arange(20)), trees.logits(model, features, at))
    new, none = (
        trees.logits(model, trees.frame({**values, "level": [level] * 20}, ["level"]), np.arange(20))
        for level in ("never seen", "")
    )
    np.testing.assert_array_equal(new, none)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[["level", "number", "noise"]], "not those of the trees, .*give these in this order"),
        (lambda x: x.assign(level=1.0), r"categories \[\] are not those of the trees, \['level'\]"),
        (lambda x: x.assign(noise=x["level"]), r"categories \['level', 'noise'\] are not those"),
        (lambda x: x.assign(noise="text"), "feature 'noise' is .*, neither numeric nor category"),
    ],
)
def test_features_of_another_model_are_refused(change: Any, message: str) -> None:
    features, labels = rows()
    model, _ = grow(features, labels, rounds=2)
    with pytest.raises(DataError, match=message):
        trees.logits(model, change(features), DEV)


def test_a_name_with_a_space_is_taken_and_one_that_breaks_the_text_format_is_not() -> None:
    features, labels = rows()
    spaced = features.rename(columns={"level": "the level"})
    model, _ = grow(spaced, labels, rounds=2)
    assert trees.logits(model, spaced, DEV).shape == (100, 3)
    with pytest.raises(DataError, match="feature 'a:b': LightGBM takes no"):
        grow(features.rename(columns={"level": "a:b"}), labels)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("num_leafs", "'num_leafs' is unknown"),
        ("num_class", "'num_class' is set by this teacher: leave it out"),
        ("n_estimators", "'n_estimators' is set"),
        ("boosting_type", "'boosting_type' is set"),
        ("random_state", "'random_state' is set"),
    ],
)
def test_a_parameter_that_would_do_nothing_or_harm_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grow(*rows(), params={name: 3})


def test_a_frame_takes_numbers_for_numbers_and_the_rest_for_categories() -> None:
    found = trees.frame(
        {
            "count": ["12", " 3", "", "+4", "1e2"],
            "size": [1, None, 2.5, float("nan"), 3],
            "code": ["yes", "no", "", None, "yes"],
            "empty": [""] * 5,
        }
    )
    assert [kind.name for kind in found.dtypes] == ["float64", "float64", "category", "float64"]
    np.testing.assert_array_equal(found["count"], [12, 3, np.nan, 4, 100])
    np.testing.assert_array_equal(found["size"], [1, np.nan, 2.5, np.nan, 3])
    assert found["code"].cat.categories.tolist() == ["no", "yes"]
    assert found["code"].cat.codes.tolist() == [1, 0, -1, -1, 1]
    assert found["empty"].isna().all()


def test_named_categories_may_look_like_numbers_and_numbers_must_be_some() -> None:
    found = trees.frame({"zip": ["10", "9", "10"], "size": ["1", "2", "3"]}, ["zip"])
    assert found["zip"].cat.categories.tolist() == ["10", "9"]
    assert found["size"].tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="feature 'size': 'big' in row 1 is no number"):
        trees.frame({"zip": ["10", "9"], "size": ["1", "big"]}, ["zip"])


def pairs() -> Any:
    import pyarrow as pa

    texts = {"prompt": ["Why?", "How?"], "response_a": ["Because it is so.", "- one\n- two"]}
    return pa.table({**texts, "response_b": ["No.", "```x```"], "context": ["It is so", "Nothing"]})


def test_computed_fields_of_a_preference_make_a_frame() -> None:
    found = trees.frame(feature_columns(pairs(), "preference", ["context"]))
    kinds = {name for name in found if found[name].dtype.name == "category"}
    assert kinds == {"code_a", "code_b", "list_a", "list_b", "longer"}
    assert found["words_a"].tolist() == [4, 4]
    assert not {"summary", "context"} & set(found), "running words are no features unless asked for"


def test_fields_are_computed_with_the_further_columns_and_chosen_by_name() -> None:
    asked = ["grounded_a", "context"]
    found = feature_columns(pairs(), "preference", ["context"], asked)
    assert list(found) == asked
    assert found["grounded_a"] != feature_columns(pairs(), "preference", [], ["grounded_a"])["grounded_a"]
    with pytest.raises(
        ConfigError, match=r"fields: no depth among those of preference rows: context, words_a"
    ):
        feature_columns(pairs(), "preference", ["context"], ["depth"])


# --- files


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


COLUMNS = ["pa", "pb", "pt"]
ROWS = [
    {"key": "r1", "pa": 0.5, "pb": 0.25, "pt": 0.25, "said": "a"},
    {"key": "r2", "pa": 0.0, "pb": 1.0, "pt": 0.0, "said": "tie"},
    {"key": "7", "pa": 0.1, "pb": 0.2, "pt": 0.7, "said": "b"},
]
VALUES = np.array([[row[name] for name in COLUMNS] for row in ROWS])


def changed(**values: Any) -> list[dict[str, Any]]:
    return [ROWS[0], {**ROWS[1], **values}, ROWS[2]]


@pytest.fixture(params=["csv", "jsonl", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / f"judge.{request.param}"
    if request.param == "csv":
        pd.DataFrame(ROWS).to_csv(path, index=False)
    elif request.param == "parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        lines(path, ROWS)
    return str(path)


def test_logits_come_as_they_are_in_the_order_of_the_columns_named(source: str) -> None:
    ids, logits = file.read(source, id_column="key", labels=LABELS, logits=["pt", "pa", "pb"])
    assert ids == ["r1", "r2", "7"]
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, VALUES[:, [2, 0, 1]].astype(np.float32))


def test_probabilities_become_logits_that_give_them_back(source: str) -> None:
    _, logits = file.read(source, id_column="key", labels=LABELS, probabilities=COLUMNS)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(softmax(logits, -1), VALUES, atol=3e-6)
    assert logits[1, 0] == pytest.approx(np.log(1e-6))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_a_verdict_is_smoothed_over_the_other_classes(source: str, smoothing: float) -> None:
    _, logits = file.read(source, id_column="key", labels=LABELS, verdict="said", smoothing=smoothing)
    expected = np.full((3, 3), smoothing / 2)
    expected[[0, 1, 2], [0, 2, 1]] = 1 - smoothing
    np.testing.assert_allclose(softmax(logits, -1), expected, atol=3e-6)


@pytest.mark.parametrize(
    ("said", "labels", "values", "expected"),
    [
        ([0, 2, 1], LABELS, None, [0, 2, 1]),
        (["0", "tie", "b"], LABELS, None, [0, 2, 1]),
        (["1", "0", "1"], ["1", "0"], None, [0, 1, 0]),  # names that look like numbers are names
        (["A wins", "draw", "draw"], LABELS, {"A wins": 0, "draw": 2}, [0, 2, 2]),
        ([-1, 0, 1], LABELS, {-1: 0, 0: 2, 1: 1}, [0, 2, 1]),
    ],
)
def test_verdicts_are_names_or_numbers_or_what_is_mapped(
    said: list[Any], labels: list[str], values: Any, expected: list[int], tmp_path: Path
) -> None:
    given = lines(tmp_path / "x.jsonl", [{"key": i, "said": value} for i, value in enumerate(said)])
    ids, logits = file.read(given, id_column="key", labels=labels, verdict="said", verdict_values=values)
    assert ids == ["0", "1", "2"]
    assert logits.argmax(-1).tolist() == expected


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.list_(pa.float64(), 3), pa.large_list(pa.float64())]
)
def test_one_column_may_hold_lists(kind: pa.DataType, tmp_path: Path) -> None:
    table = pa.table({"key": ["x", "y", "z"], "all": pa.array(VALUES.tolist(), kind)})
    path = tmp_path / "x.parquet"
    parquet.write_table(table, path, row_group_size=2)
    _, logits = file.read(str(path), id_column="key", labels=LABELS, logits=["all"])
    np.testing.assert_array_equal(logits, VALUES.astype(np.float32))
    _, logits = file.read(str(path), id_column="key", labels=LABELS, probabilities=["all"])
    np.testing.assert_allclose(softmax(logits, -1), VALUES, atol=3e-6)


LOGITS: dict[str, Any] = {"logits": COLUMNS}
SHARES: dict[str, Any] = {"probabilities": COLUMNS}
SAID: dict[str, Any] = {"verdict": "said"}
ONE: dict[str, Any] = {"logits": ["all"]}


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        (ROWS, {"logits": ["pa", "pb", "pc"]}, "no column 'pc': there are key, pa, pb, pt, said"),
        (ROWS, {"verdict": "verdict"}, "no column 'verdict'"),
        (ROWS, {"logits": ["pa", "pb"]}, "2 columns for the 3 classes a, b, tie"),
        (ROWS, {"probabilities": ["pa"]}, "1 columns for the 3 classes"),
        (changed(key="r1"), LOGITS, "1 ids in 'key' repeat, first 'r1'"),
        (changed(key=None), LOGITS, "row 1 has no id in 'key'"),
        (changed(pb=None), LOGITS, "'pb' holds no finite number: 1 times, first in row 'r2': mend the file"),
        (changed(pb=float("nan")), LOGITS, "'pb' holds no finite number: 1 times, first in row 'r2'"),
        (changed(pb=float("inf")), SHARES, "'pb' holds no finite number"),
        (changed(pa=-0.1, pt=0.1), SHARES, "a probability is below 0: 1 times, first in row 'r2'"),
        (changed(pa=0.2), SHARES, "probabilities do not sum to 1: 1 times, first in row 'r2'"),
        (
            changed(said="c"),
            SAID,
            "verdict 'c' in 'said' is none of a, b, tie, 0, 1, 2: 1 times, first in row 'r2'",
        ),
        (changed(said=None), SAID, "verdict missing in 'said' is none of"),
        (ROWS, {**SAID, "verdict_values": {"a": 0, "b": 1}}, "verdict 'tie' in 'said' is none of a, b"),
        (
            [{"key": "x", "all": [1, 2, 3]}, {"key": "y", "all": [1, 2]}],
            ONE,
            "'all' does not hold 3 numbers: 1 times",
        ),
        ([{"key": "x", "all": [1, 2, 3]}, {"key": "y", "all": None}], ONE, "does not hold 3 numbers.*'y'"),
        ([{"key": "x", "all": [1, 2, 3]}, {"key": "y", "all": [1, None, 2]}], ONE, "no finite number.*'y'"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(
    rows: list[dict[str, Any]], how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = str(tmp_path / "judge.parquet")
    parquet.write_table(pa.Table.from_pylist(rows), given)
    with pytest.raises(DataError, match=message) as error:
        file.read(given, id_column="key", labels=LABELS, **how)
    assert str(error.value).startswith(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["", "n/a", "1e999", "nan", "0x1"])
def test_text_that_is_no_number_is_named(value: str, tmp_path: Path) -> None:
    path = tmp_path / "judge.csv"
    pd.DataFrame(changed(pb=value)).to_csv(path, index=False)
    with pytest.raises(DataError, match="'pb' holds no finite number: 1 times, first in row 'r2'"):
        file.read(str(path), id_column="key", labels=LABELS, logits=COLUMNS)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "exactly one of logits, probabilities and verdict, not 0"),
        ({**LOGITS, **SAID}, "exactly one of logits, probabilities and verdict, not 2"),
        ({**SAID, "smoothing": 0.7}, "smoothing = 0.7: must be 0 or more, below 0.666667"),
        ({**SAID, "smoothing": -0.1}, "smoothing = -0.1"),
        ({**SAID, "verdict_values": {"a": 3}}, "verdict 'a' maps to 3, outside the 3 classes"),
    ],
)
def test_a_contradictory_call_is_refused(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        file.read(lines(tmp_path / "x.jsonl", ROWS), id_column="key", labels=LABELS, **how)


def test_rows_are_joined_by_id_and_a_file_may_hold_more() -> None:
    logits = np.arange(9, dtype=np.float32).reshape(3, 3)
    found = file.align(["x", "y", "z"], logits, ["z", "x"], source="f.csv")
    np.testing.assert_array_equal(found, logits[[2, 0]])
    assert file.align(["x", "y", "z"], logits, [], source="f.csv").shape == (0, 3)


def test_a_missing_row_is_named_with_its_file_and_the_remedy() -> None:
    with pytest.raises(CacheError, match=r"f\.csv: no logits for 2 of 3 rows, first 'b'; add them") as error:
        file.align(["a"], np.zeros((1, 3), np.float32), ["a", "b", "c"], source="f.csv")
    assert "\n" not in str(error.value)


def test_a_swapped_copy_has_its_original_s_logits_mirrored_or_its_own() -> None:
    logits = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.float32)
    ids, wanted = ["x", "y", "y#swapped"], ["x#swapped", "y", "y#swapped"]
    found = file.align(ids, logits, wanted, source="f", mirror=(1, 0, 2))
    assert found.tolist() == [[2, 1, 3], [4, 5, 6], [7, 8, 9]]
    with pytest.raises(CacheError, match="first 'x#swapped'"):
        file.align(ids, logits, wanted, source="f")
