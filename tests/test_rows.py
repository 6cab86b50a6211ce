"""Stage 00's engine: sources, checks, groups, leaks, swapped copies and the report."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from llmkd import folds, rows, streams
from llmkd.errors import DataError

NAMES = ["a", "b", "tie"]


def pairs(**changes: Any) -> pa.Table:
    columns = {
        "prompt": ["p0", "p0", "p1", "p2", "p3", "p4"],
        "response_a": [f"a{i}" for i in range(6)],
        "response_b": [f"b{i}" for i in range(6)],
        "label": [0, 1, 2, 0, 1, 2],
    }
    return pa.table({**columns, **changes})


def canonical(table: pa.Table, **changes: Any) -> tuple[pa.Table, dict[str, Any]]:
    return rows.canonical(table, **{"part": "train", "kind": "preference", "labels": NAMES, **changes})


def prepared(
    train: pa.Table, test: pa.Table | None = None, **changes: Any
) -> tuple[pa.Table, dict[str, Any]]:
    settings = {"kind": "preference", "swap": True, "group": "prompt", "folds": 1, "seed": 1, **changes}
    second = None if test is None else canonical(test, part="test")[0]
    return rows.prepare(canonical(train)[0], second, **settings)


# --- read


def test_files_of_every_kind_hold_the_same_rows(tmp_path: Path) -> None:
    table = pa.table({"text": ['one, "two"\nthree', "été"], "label": ["0", "1"]})
    (tmp_path / "a.csv").write_text('text,label\n"one, ""two""\nthree",0\nété,1\n', encoding="utf-8")
    lines = [json.dumps(row) for row in table.to_pylist()]
    for name in ("a.jsonl", "a.ndjson", "a.json"):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.ndjson", "a.json", "a.parquet"):
        assert rows.read(str(tmp_path / name)).to_pylist() == table.to_pylist(), name


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_csv_s_first_line_tells_its_delimiter(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'Nr.{mark}"a,;\t,;\tb"{mark}label\n1{mark}"x{mark}y"{mark}z\n', encoding="utf-8-sig")
    row = {"Nr.": "1", "a,;\t,;\tb": f"x{mark}y", "label": "z"}
    assert rows.read(str(path)).to_pylist() == [row]
    (batch,) = streams.chunks(str(path), list, 8)
    assert batch.to_pylist() == [row]


def test_csv_keeps_leading_zeros_and_a_glob_joins_files_in_order(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"part{part}.csv").write_text(f"id,text\n00{part},NA\n")
    assert rows.read(str(tmp_path / "part*.csv")).to_pylist() == [
        {"id": "001", "text": "NA"},
        {"id": "002", "text": "NA"},
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.parquet", "no such file"),
        ("data.xlsx", "suffix '.xlsx' is not read: use .csv"),
        ("hub:", "write hub:owner/name"),
        ("hub:a/b:c:d:e", "write hub:owner/name"),
        ("arena:rows=10,size=3", "write arena:rows="),
        ("arena:rows=ten", "write arena:rows="),
        ("arena:rows=10,judge=nobody", "judge=machine"),
    ],
)
def test_a_wrong_source_is_one_line_with_a_remedy(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        rows.read(source)
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('[{"text": "x"},\n')
    with pytest.raises(DataError, match=r"cannot be read as .jsonl") as caught:
        rows.read(str(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value)


def test_the_arena_is_read_by_its_settings() -> None:
    table = rows.read("arena:rows=20,seed=3,judge=machine")
    assert table.num_rows == 20
    assert not table.equals(rows.read("arena:rows=20,seed=3"))
    assert rows.read("arena:rows=20", seed=3).equals(rows.read("arena:rows=20,seed=3"))
    assert rows.arena_numbers("arena:rows=20,seed=3") == (20, 3)


def test_hub_sources_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        if name == "o/none":
            raise FileNotFoundError("Dataset 'o/none'\ndoes not exist")
        return _Loaded()

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("hub:o/n", "hub:o/n:small", "hub:o/n:small:validation", "hub:o/n::test"):
        assert rows.read(source).equals(pairs())
    assert asked == [("o/n", None, "train"), ("o/n", "small", "train"), ("o/n", "small", "validation"),
                     ("o/n", None, "test")]  # fmt: skip
    with pytest.raises(DataError, match=r"hub:o/none: cannot be loaded .*give a file"):
        rows.read("hub:o/none")


def test_a_hub_source_is_read_by_the_datasets_library_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory laid out as a hub repository is, since no hub can be reached here."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for part, count in (("train", 3), ("validation", 2)):
        parquet.write_table(pairs().slice(0, count), tmp_path / "set" / f"{part}-00000-of-00001.parquet")
    source = f"hub:{tmp_path}/set"
    assert rows.read(source).to_pylist() == pairs().slice(0, 3).to_pylist()
    assert rows.read(f"{source}::validation").to_pylist() == pairs().slice(0, 2).to_pylist()
    with pytest.raises(DataError, match=r'Unknown split "nope".*: check the name or give a file'):
        rows.read(f"{source}::nope")
    with pytest.raises(DataError, match="hub:nobody/nothing: cannot be loaded"):
        rows.read("hub:nobody/nothing")


class _Loaded:
    def with_format(self, kind: str) -> "_Loaded":
        assert kind == "arrow"
        return self

    def __getitem__(self, which: slice) -> pa.Table:
        return pairs()


# --- canonical


def test_columns_are_mapped_and_ids_made() -> None:
    source = pairs().rename_columns(["question", "response_a", "response_b", "winner"]).append_column(
        "lang", pa.array(["en", None, "de", "de", "de", "de"])
    )  # fmt: skip
    table, report = canonical(source, columns={"prompt": "question"}, label="winner", extra=["lang"])
    assert table.schema.names == ["id", "part", "label", "prompt", "response_a", "response_b", "lang"]
    assert table["id"].to_pylist()[:2] == ["train-0000000", "train-0000001"]
    assert table["label"].type == pa.int32()
    assert table["lang"].to_pylist()[:2] == ["en", ""]
    assert report == {"rows": 6, "dropped_empty": 0}


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ([0, 1, 2, 0, 1, -1], {}),
        (["a", "b", "tie", "a", "b", "-1"], {}),
        (["0", "1", "2", "0", "1", "-1"], {}),
        (["x", "y", "z", "x", "y", "?"], {"label_values": {"x": 0, "y": 1, "z": 2, "?": -1}}),
        ([7, 8, 9, 7, 8, 0], {"label_values": {"7": 0, "8": 1, "9": 2, "0": -1}}),
    ],
)
def test_labels_as_numbers_names_or_mapped_values(values: list[Any], settings: dict[str, Any]) -> None:
    table, _ = canonical(pairs(label=values), **settings)
    assert table["label"].to_pylist() == [0, 1, 2, 0, 1, -1]


def test_names_that_are_numbers_are_names() -> None:
    table, _ = canonical(pairs(label=list("123123")), labels=["1", "2", "3"])
    assert table["label"].to_pylist() == [0, 1, 2, 0, 1, 2]


def test_one_hot_labels_and_json_turns() -> None:
    hot = {
        f"winner_{name}": [int(label == i) for label in (0, 1, 2, 0, 1, 2)] for i, name in enumerate(NAMES)
    }
    table = pairs(prompt=['["one", null, "two"]'] * 5 + ['["half \\ud83d"]'], **hot)
    result, _ = canonical(table, label=list(hot), turns="json", **_json_answers())
    assert result["label"].to_pylist() == [0, 1, 2, 0, 1, 2]
    assert result["prompt"].to_pylist()[0] == "one\n\n\n\ntwo"
    assert result["prompt"].to_pylist()[5] == "half \ufffd"
    with pytest.raises(DataError, match=r"1 rows are not one-hot .* first row 3"):
        canonical(table.set_column(4, "winner_a", [[1, 0, 0, 0, 0, 0]]), label=list(hot))
    with pytest.raises(DataError, match=r"2 one-hot columns for 3 labels"):
        canonical(table, label=list(hot)[:2])


def _json_answers() -> dict[str, Any]:
    return {"columns": {"response_a": "prompt", "response_b": "prompt"}}


def test_turns_that_are_no_list_are_named() -> None:
    with pytest.raises(DataError, match=r"6 rows of 'prompt' are no JSON list of turns, first row 0"):
        canonical(pairs(), turns="json")
    listed = pairs(**{name: [["x", "y"]] * 6 for name in ("prompt", "response_a", "response_b")})
    assert canonical(listed, turns="json")[0]["prompt"][0].as_py() == "x\n\ny"
    with pytest.raises(DataError, match=r"field 'prompt' is list<.*not text"):
        canonical(listed)


def test_unlabelled_rows() -> None:
    assert set(canonical(pairs(), label=None)[0]["label"].to_pylist()) == {-1}


def test_missing_columns_name_those_there_are() -> None:
    with pytest.raises(DataError, match=r"no column 'question' \(correct task.columns.prompt\), "):
        canonical(pairs(), columns={"prompt": "question"}, label="winner")


def test_every_problem_is_told_at_once() -> None:
    table = pairs(prompt=["p", " ", None, "p", "p", "p"], label=["a", "c", "c", None, "a", "b"])
    table = table.append_column("key", pa.array(["x", "x", "y#swapped", "z", "w", None]))
    with pytest.raises(DataError) as caught:
        canonical(table, id_column="key", extra=["prompt"])
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "train: ",
        "3 labels in 'label' are unknown, first 'c' in row 1",
        "2 rows lack a text, first row 1 (prompt)",
        "1 ids in 'key' repeat, first 'x'",
        "1 rows have no id",
        "ends with #swapped",
        "extra column 'prompt'",
    ):
        assert part in message


def test_labels_that_are_floats_or_outside_are_refused() -> None:
    with pytest.raises(DataError, match=r"'label' holds floats"):
        canonical(pairs(label=[0.0, 1.0, float("nan"), 0.0, 1.0, 2.0]))
    with pytest.raises(DataError, match=r"1 labels .* first '3' in row 5"):
        canonical(pairs(label=[0, 1, 2, 0, 1, 3]))
    with pytest.raises(DataError, match=r"first missing in row 5"):
        canonical(pairs(label=[0, 1, 2, 0, 1, None]))
    with pytest.raises(DataError, match=r"'x' maps to 3, outside the 3 labels"):
        canonical(pairs(label=["x"] * 6), label_values={"x": 3})


def test_one_empty_answer_is_legal_two_are_not() -> None:
    table = pairs(response_a=["", "", "a", "a", "a", "a"], response_b=["b", None, "b", "b", "", "b"])
    with pytest.raises(DataError, match=r"1 rows lack a text, first row 1 \(response_a and response_b\)"):
        canonical(table)
    kept, report = canonical(table, empty="drop")
    assert report == {"rows": 5, "dropped_empty": 1}
    assert kept["id"].to_pylist()[:2] == ["train-0000000", "train-0000002"]
    with pytest.raises(DataError, match=r"no rows are left"):
        canonical(pairs(prompt=[""] * 6), empty="drop")


# --- prepare


def test_swapped_copies_mirror_everything_and_share_group_and_fold() -> None:
    source = rows.read("arena:rows=60,seed=1")
    table, report = prepared(source, rows.read("arena:rows=10,seed=2"), folds=3)
    assert table.schema.names == ["id", "stem", "swapped", "group", "part", "fold", "label", "prompt",
                                  "response_a", "response_b", "bayes"]  # fmt: skip
    assert [str(table[name].type) for name in ("fold", "label", "swapped")] == ["int16", "int32", "bool"]
    by_id = {row["id"]: row for row in table.to_pylist()}
    assert len(by_id) == table.num_rows
    assert report["share_swapped"] == 0.5
    given = [row for row in by_id.values() if not row["swapped"]]
    assert 2 * len(given) == len(by_id)
    for row in given:
        copy = by_id[row["id"] + "#swapped"]
        assert all(copy[name] == row[name] for name in ("stem", "group", "part", "fold", "prompt"))
        assert (copy["response_a"], copy["response_b"]) == (row["response_b"], row["response_a"])
        assert copy["label"] == (1, 0, 2)[row["label"]]
        assert copy["stem"] == row["id"]
        assert copy["bayes"] == [row["bayes"][i] for i in (1, 0, 2)]
        assert (row["fold"] == -1) == (row["part"] == "test")
    folds.check(table["fold"].to_numpy(), table["group"].to_pylist())


def test_unknown_labels_stay_unknown_in_the_copy() -> None:
    table, _ = prepared(pairs(label=[0, 1, 2, -1, -1, 2]))
    assert sorted(table["label"].to_pylist()) == [-1, -1, -1, -1, 0, 0, 1, 1, 2, 2, 2, 2]


def test_groups_ignore_case_and_whitespace() -> None:
    table, report = prepared(pairs(prompt=["Hello  you", "hello\nYOU ", "x", "y", "z", "w"]), swap=False)
    groups = table["group"].to_pylist()
    assert groups[0] == groups[1]
    assert len(set(groups)) == 5 == report["parts"]["train"]["groups"]
    alone, _ = prepared(pairs(prompt=["p", "p", "p", "q", "r", "s"]), group=None, swap=False)
    assert len(set(alone["group"].to_pylist())) == 6  # one prompt, but not one pair
    twice = pairs(
        prompt=["p"] * 6, response_a=["a", "b", "c", "d", "e", "f"], response_b=["b", "a", "d", "c", "f", "e"]
    )
    copies, _ = prepared(twice, group=None, swap=False)
    assert len(set(copies["group"].to_pylist())) == 3  # equal texts, in either order, share a fold
    with pytest.raises(DataError, match=r"group 'question' is no field: the rows have prompt, response_a"):
        prepared(pairs(), group="question")


@pytest.mark.parametrize(("group", "count"), [("prompt", 2), (None, 1)])
def test_leaks_are_dropped_reported_or_refused(group: str | None, count: int) -> None:
    # A test row with row 0's prompt, and its answers in the other order.
    test = pa.table({"prompt": ["P0"], "response_a": ["b0"], "response_b": ["a0"], "label": [0]})
    dropped, report = prepared(pairs(), test, group=group, swap=False)
    assert report["leaks"] == {"policy": "drop", "rows": count, "dropped": count}
    assert dropped.num_rows == 7 - count
    assert "test-0000000" in dropped["id"].to_pylist()
    kept, report = prepared(pairs(), test, group=group, swap=False, leaks="report")
    assert kept.num_rows == 7
    assert report["leaks"] == {"policy": "report", "rows": count, "dropped": 0}
    with pytest.raises(DataError, match=f"{count} train rows have .*'train-0000000'"):
        prepared(pairs(), test, group=group, leaks="error")
    with pytest.raises(DataError, match=r"every train row"):
        prepared(pairs(), pairs())


def test_equal_rows_are_one_group_and_a_leak_whatever_field_groups() -> None:
    """As a user's id does that another user's equal row has not."""
    texts = {"prompt": list("ppqrst"), "response_a": list("xyzxzx"), "response_b": list("yxzyzy")}
    users = pa.array(["u", "v", "v", "w", None, ""])
    more: Any = {"group": "user", "swap": False, "kind": "preference", "folds": 1, "seed": 1}
    train, _ = canonical(pairs(**texts, user=users), extra=["user"])
    found = rows.prepare(train, None, **more)[0]["group"].to_pylist()
    assert found[0] == found[1] == found[2], "rows 0 and 1 are equal in another order, 1 and 2 one user's"
    assert len(set(found)) == 4, "and nobody's rows are not one another's"
    test = pa.table({name: column[:1] for name, column in texts.items()} | {"user": ["x"], "label": [0]})
    second, _ = canonical(test, part="test", extra=["user"])
    assert rows.prepare(train, second, **more)[1]["leaks"] == {"policy": "drop", "rows": 2, "dropped": 2}


def test_rows_to_train_on_first_are_none_of_the_training_rows() -> None:
    train, _ = canonical(pairs())
    known, _ = canonical(pairs().slice(0, 2), part="train")
    more: Any = {"group": None, "swap": False, "kind": "preference", "folds": 1, "seed": 1}
    table, report = rows.prepare(train, None, known=known, **more)
    assert table["response_a"].to_pylist() == ["a2", "a3", "a4", "a5"]
    assert report["leaks"]["in_train"] == 2
    with pytest.raises(DataError, match=r"every row stands in task\.train too"):
        rows.prepare(train, None, known=train, **more)


def test_duplicates_and_conflicts_are_counted_in_either_order() -> None:
    table = pa.table(
        {
            "prompt": ["p"] * 3 + ["q"] * 3,
            "response_a": ["x", "y", "x", "x", "x", "u"],
            "response_b": ["y", "x", "z", "y", "y", "v"],
            "label": [0, 1, 0, 0, 1, 2],
        }
    )
    assert prepared(table)[1]["duplicates"] == {"train": {"rows": 2, "conflicting": 1}}


def test_ids_repeated_over_the_parts_are_refused() -> None:
    train, _ = canonical(pairs())
    test, _ = canonical(pairs(prompt=[f"t{i}" for i in range(6)]))
    with pytest.raises(DataError, match=r"6 ids stand in more than one part, first 'train-0000000'"):
        rows.prepare(train, test, kind="preference", swap=False, group=None, folds=1, seed=1)


def test_swap_without_an_order_is_refused() -> None:
    texts = pa.table({"text": ["x", "y"], "label": [0, 1]})
    table, _ = canonical(texts, kind="classification", labels=["n", "p"])
    with pytest.raises(DataError, match=r"classification row has no order"):
        rows.prepare(table, None, kind="classification", swap=True, group=None, folds=1, seed=1)
    result, _ = rows.prepare(table, None, kind="classification", swap=False, group=None, folds=1, seed=1)
    assert result["fold"].to_pylist() == [-1, -1]
    assert result["id"].to_pylist() == result["stem"].to_pylist()


def test_the_report_counts_and_is_json() -> None:
    _, report = prepared(rows.read("arena:rows=200,seed=1"), rows.read("arena:rows=40,seed=2"), folds=4)
    assert json.loads(json.dumps(report)) == report
    train = report["parts"]["train"]
    assert (
        sum(train["labels"].values())
        == train["rows"]
        == sum(fold["rows"] for fold in report["folds"].values())
    )
    assert set(report["folds"]) == {"0", "1", "2", "3"}
    assert set(report["folds"]["0"]["labels"]) == {
        "0",
        "1",
        "2",
    }
    assert train["words"]["prompt"]["p50"] <= train["words"]["prompt"]["max"] < 30
    assert report["rows"] == 2 * (train["rows"] + report["parts"]["test"]["rows"])


def test_held_out_rows_are_the_test_part_as_given() -> None:
    test = pa.table({"prompt": ["P0"], "response_a": ["x"], "response_b": ["y"], "label": [2]})
    table, _ = prepared(pairs(), test, leaks="report")
    found = rows.of_part(table, "test", "preference", ())
    assert found.to_pylist() == [
        {
            "id": "test-0000000",
            "part": "test",
            "label": 2,
            "prompt": "P0",
            "response_a": "x",
            "response_b": "y",
        }
    ]
    other, _ = prepared(pairs(prompt=["p0", "q", "r", "s", "t", "u"]), None)
    assert rows.of_part(other, "test", "preference", ()) is None


def test_long_texts_become_distinct_sentences_of_a_length() -> None:
    from llmkd.sources import sentences

    texts = [
        'A fine film. "It is good!" he said to me.<br />Bad.',
        "A fine film.\nIs it? It is not so bad",
        None,
    ]
    found = sentences(pa.table({"review": texts}), "review", 3, 5)
    assert found["review"].to_pylist() == [
        "A fine film.",
        '"It is good!',
        "he said to me.",
        "It is not so bad",
    ]
