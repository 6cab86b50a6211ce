"""Rows that are not text, and rows without a label: checks, leaks and duplicates by content."""

from typing import Any

import pyarrow as pa
import pytest

from llmkd import crossfit, folds, rows, tasks
from llmkd.errors import DataError

FEATURES: dict[str, Any] = {
    "numeric": ["age", "gain"],
    "categorical": ["job"],
    "steps": {"bill": ["bill1", "bill2"], "paid": ["paid1", "paid2"]},
}
IMAGE = {"column": "pixels", "shape": [2, 3]}


def clients(**changes: Any) -> pa.Table:
    columns = {
        "age": [31, 45, 27, 60],
        "gain": ["1.5", " ? ", "", "-2e3"],
        "job": ["clerk", "?", None, " clerk "],
        **{name: [1.0, 2.0, float("nan"), 4.0] for name in ("bill1", "bill2", "paid1", "paid2")},
        "label": [0, 1, 0, 1],
    }
    return pa.table({**columns, **changes})


def canonical(table: pa.Table, **changes: Any) -> tuple[pa.Table, dict[str, Any]]:
    settings = {"part": "train", "kind": "tabular", "labels": ["no", "yes"], "features": FEATURES}
    return rows.canonical(table, **{**settings, **changes})


def images(*bytes_of: bytes | None, **more: Any) -> pa.Table:
    return pa.table({"pixels": list(bytes_of), "label": [i % 2 for i in range(len(bytes_of))], **more})


def pictures(table: pa.Table, **changes: Any) -> tuple[pa.Table, dict[str, Any]]:
    return canonical(table, **{"kind": "image", "features": None, "image": IMAGE, **changes})


def prepare(train: pa.Table, test: pa.Table | None, kind: str, **changes: Any) -> Any:
    settings = tasks.content(kind, FEATURES if kind == "tabular" else IMAGE)
    return rows.prepare(
        train,
        test,
        **{
            "kind": kind,
            "swap": False,
            "group": None,
            "folds": 1,
            "seed": 1,
            "fields": settings,
            **changes,
        },
    )


# --- tabular


def test_numbers_become_floats_and_categories_strings_with_one_mark_for_missing() -> None:
    table, report = canonical(clients())
    assert table.schema.names == ["id", "part", "label", *tasks.content("tabular", FEATURES)]
    assert [str(table[name].type) for name in ("age", "gain", "bill1", "job")] == ["double"] * 3 + ["string"]
    assert table["age"].to_pylist() == [31.0, 45.0, 27.0, 60.0]
    assert table["gain"].to_pylist() == [1.5, None, None, -2000.0]
    assert table["bill2"].to_pylist() == [1.0, 2.0, None, 4.0]
    assert table["job"].to_pylist() == ["clerk", "", "", "clerk"]
    assert report == {"rows": 4, "dropped_empty": 0}


def test_extra_columns_stay_text_beside_features_of_another_name() -> None:
    table, _ = canonical(clients(), extra=["age_text"], columns={"age_text": "age"})
    assert table["age_text"].to_pylist() == ["31", "45", "27", "60"]
    with pytest.raises(DataError, match=r"extra column 'age' has a name that is taken"):
        canonical(clients(), extra=["age"])


def test_every_problem_of_features_is_told_at_once() -> None:
    table = clients(gain=["1", "many", "3", "4"], bill1=[1.0, 2.0, float("inf"), 4.0], fold=[1, 2, 3, 4])
    table = table.append_column("list", pa.array([[1]] * 4)).append_column(
        "day", pa.array([0] * 4, pa.date32())
    )
    features = {
        "numeric": ["gain", "job", "fold", "day"],
        "categorical": ["job", "list"],
        "steps": {"bill": ["bill1"], "paid": ["paid1", "paid2"]},
    }
    with pytest.raises(DataError) as caught:
        canonical(table, features=features)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "1 rows of 'gain' are no numbers, first 'many' in row 1",
        "1 rows of 'bill1' are infinite, first row 2",
        "column 'list' is list<item: int64>, no category",
        "column 'day' is date32[day], no number",
        "column 'job' is numeric and categorical",
        "steps differ in length ({'bill': 1, 'paid': 2})",
        "column 'fold' has a name that is taken",
    ):
        assert part in message


def test_missing_columns_name_the_key_to_correct() -> None:
    with pytest.raises(DataError) as caught:
        canonical(
            clients().drop_columns(["age", "job"]),
            label="y",
            id_column="key",
            extra=["note", "said"],
            columns={"said": "words"},
        )
    for part in (
        "'age' (correct task.features), 'job' (correct task.features)",
        "'note' (correct task.extra)",
        "'words' (correct task.columns.said)",
        "'y' (correct task.label)",
        "'key' (correct task.id)",
        "there are gain, bill1",
    ):
        assert part in str(caught.value)
    with pytest.raises(DataError, match=r"'pixels' \(correct task.image.column\)"):
        pictures(clients())


def test_a_row_without_any_value_is_refused_or_dropped() -> None:
    features = {"numeric": ["gain"], "categorical": ["job"]}
    with pytest.raises(DataError, match=r"2 rows have no value in any feature, first row 1"):
        canonical(clients(), features=features)
    table, report = canonical(clients(), features=features, empty="drop")
    assert report == {"rows": 2, "dropped_empty": 2}
    assert table["id"].to_pylist() == ["train-0000000", "train-0000003"]


def test_equal_features_share_a_fold_and_leak() -> None:
    train, _ = canonical(pa.concat_tables([clients(), clients(label=[0, 1, 1, 1])]))
    test, _ = canonical(clients().slice(0, 1), part="test")
    table, report = prepare(train, test, "tabular")
    assert report["leaks"] == {"policy": "drop", "rows": 2, "dropped": 2}
    assert report["duplicates"]["train"] == {"rows": 3, "conflicting": 1}
    assert report["parts"]["train"]["words"] == {}
    groups = table["group"].to_pylist()[:6]
    assert groups[:3] == groups[3:]
    assert len(set(groups)) == 3
    # A missing number is not zero, and one column's value is not its neighbour's.
    near = clients(gain=[0.0] * 4, age=[1.0, None, 11.0, 1.0], bill1=[1.0, 1.0, 1.0, 11.0])
    _, report = prepare(canonical(near)[0], None, "tabular")
    assert report["parts"]["train"]["groups"] == 4


# --- images


def test_images_of_the_shape_are_kept_as_bytes() -> None:
    for kind in (pa.binary(), pa.large_binary(), pa.binary(6)):
        source = images(b"abcdef", b"ABCDEF")
        table, _ = pictures(source.set_column(0, "pixels", source["pixels"].cast(kind)))
        assert table["pixels"].type == pa.binary()
        assert table["pixels"].to_pylist() == [b"abcdef", b"ABCDEF"]
    with pytest.raises(
        DataError, match=r"1 images in 'pixels' are not \[2, 3\], first row 1 with 2 bytes for 6"
    ):
        pictures(images(b"abcdef", b"ab"))
    with pytest.raises(DataError, match=r"column 'pixels' is string, not bytes"):
        pictures(pa.table({"pixels": ["abcdef"], "label": [0]}))
    with pytest.raises(DataError, match=r"1 rows have no image, first row 0"):
        pictures(images(None, b"abcdef"))


def test_images_are_told_apart_by_their_bytes() -> None:
    # Upper case and white space are pixels, and a byte need not be a letter.
    train, _ = pictures(images(b"abcdef", b"ABCDEF", b"ab\xff\x00ef", b"ab\xff\x00ef", b"a cdef"))
    test, _ = pictures(images(b"abcdef"), part="test")
    table, report = prepare(train, test, "image")
    assert report["leaks"]["dropped"] == 1
    assert report["duplicates"]["train"] == {"rows": 1, "conflicting": 1}
    assert rows.of_part(table, "test", "image", fields=("pixels",))["pixels"].to_pylist() == [b"abcdef"]
    with pytest.raises(DataError, match=r"image row has no order"):
        prepare(train, test, "image", swap=True)


# --- transfer


def questions(prompts: list[str], part: str, **more: Any) -> pa.Table:
    count = range(len(prompts))
    columns = {
        "prompt": prompts,
        "response_a": [f"a{i}" for i in count],
        "response_b": [f"b{i}" for i in count],
        "label": [i % 3 for i in count],
    }
    return rows.canonical(
        pa.table({**columns, **more}), part=part, kind="preference", labels=["a", "b", "tie"]
    )[0]


def with_transfer(transfer: pa.Table, **changes: Any) -> Any:
    train, test = questions(["p0", "p1", "p2", "p3"], "train"), questions(["t0"], "test")
    settings = {
        "kind": "preference",
        "swap": False,
        "group": "prompt",
        "folds": 2,
        "stratify": False,
        "seed": 1,
        **changes,
    }
    return rows.prepare(train, test, transfer=transfer, **settings)


def test_transfer_rows_have_no_label_and_no_fold() -> None:
    transfer = questions(["x", "y", "p0"], "transfer", response_a=["a", "b", "c"])
    table, report = with_transfer(transfer, swap=True)
    found = [row for row in table.to_pylist() if row["part"] == "transfer"]
    assert [row["id"] for row in found if not row["swapped"]] == [f"transfer-000000{i}" for i in range(3)]
    assert len(found) == 6
    assert {row["label"] for row in found} == {-1} == {row["fold"] for row in found}
    assert report["parts"]["transfer"] == {**report["parts"]["transfer"], "rows": 3, "labels": {"-1": 3}}
    assert report["leaks"]["transfer"] == {"rows": 0, "dropped": 0, "in_train": 0}
    assert set(report["folds"]) == {"0", "1"}
    for fold in (0, 1):
        views = crossfit.view_rows(table, fold, 2)
        chosen = [*views["oof"], *views["in_sample"], *views["test"], *folds.dev_rows(table, fold)]
        assert "transfer" not in table["part"].take(chosen).to_pylist()


@pytest.mark.parametrize(("group", "leaked"), [("prompt", 2), (None, 1)])
def test_transfer_rows_of_the_test_part_and_of_train_are_left_out(group: str | None, leaked: int) -> None:
    # The test row itself, its prompt with other answers, a training row the other way round, and a new one.
    transfer = questions(
        ["t0", "T0", "p1", "new"],
        "transfer",
        response_a=["a0", "q", "b1", "q"],
        response_b=["b0", "q", "a1", "q"],
    )
    _, report = with_transfer(transfer, group=group)
    assert report["leaks"] == {
        "policy": "drop",
        "rows": 0,
        "dropped": 0,
        "transfer": {"rows": leaked, "dropped": leaked, "in_train": 1},
    }
    assert report["parts"]["transfer"]["rows"] == 3 - leaked
    _, report = with_transfer(transfer, group=group, leaks="report")
    assert report["leaks"]["transfer"] == {"rows": leaked, "dropped": 0, "in_train": 1}
    with pytest.raises(DataError, match=f"{leaked} transfer rows have .*first 'transfer-0000000'"):
        with_transfer(transfer, group=group, leaks="error")


def test_transfer_rows_that_are_all_known_are_refused() -> None:
    with pytest.raises(DataError, match=r"every transfer row stands in task.train"):
        with_transfer(questions(["p0", "p1"], "transfer"))
    with pytest.raises(DataError, match=r"every transfer row has the prompt of a test row"):
        with_transfer(questions(["t0"], "transfer"))
