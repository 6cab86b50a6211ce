"""Files in, predictions or scores out: what an artifact says of its rows, and what is refused."""

import csv
import functools
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from llmkd import description, streams
from llmkd.errors import ConfigError, DataError, LlmkdError, ModelError
from llmkd.evaluate import both_orders, scores, softmax
from llmkd.predicting import evaluate_file, predict_file
from llmkd.sources import read

WORDS = ("some", "words", "to", "learn", "and", "a", "few", "more", "of", "them")
TEXT = {"kind": "classification", "columns": {"text": "review"}, "template": "{text}", "max_tokens": 32}
PAIR = {
    "kind": "preference",
    "columns": {name: name for name in ("prompt", "response_a", "response_b")},
    "template": "{prompt}|{response_a}|{response_b}|{longer}",
    "max_tokens": 48,
    "tta": "swap",
}


def save(path: Path, said: dict[str, Any] | None, temperature: float | None = None) -> Path:
    """A tiny classifier of random weights, with or without a description."""
    names = dict(enumerate(tiny.LABELS))
    model = tiny.classifier("bert", vocab_size=300, id2label=names)
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    if said:
        description.write(path, said, tiny.LABELS, temperature)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("texts"), TEXT, 2.0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pairs"), PAIR, 2.0)


def sentence(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, random.integers(1, 9)))


def reviews(count: int, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    labels = random.choice(tiny.LABELS, count)
    return pd.DataFrame({"review": [sentence(random) for _ in range(count)], "label": labels, "stars": 1})


def written(frame: pd.DataFrame, path: Path) -> str:
    if path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return str(path)


def probabilities(path: Path) -> np.ndarray:
    table = pq.read_table(path)
    return np.stack([table[f"p_{name}"].to_numpy() for name in tiny.LABELS], axis=1)


def in_chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "chunks", functools.partial(streams.chunks, rows=rows))


def test_predictions_are_those_of_stage_06(finished: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.parquet"
    pq.write_table(read("arena:rows=40,seed=2"), source)
    artifact, judged = finished / "05_quantize/model", finished / "06_evaluate"
    predict_file(artifact, str(source), tmp_path / "p.parquet", calibrated=False)
    np.testing.assert_allclose(
        probabilities(tmp_path / "p.parquet"), probabilities(judged / "predictions.parquet"), atol=1e-6
    )
    facts = predict_file(artifact, str(source), tmp_path / "q.parquet", tta="none")
    logits = np.stack(pq.read_table(judged / "logits.parquet")["quantized"].to_pylist()).astype(np.float32)
    expected = softmax(logits / facts["temperature"])
    np.testing.assert_allclose(probabilities(tmp_path / "q.parquet"), expected, atol=1e-6)
    metrics = json.loads((judged / "metrics.json").read_text())
    found = evaluate_file(artifact, str(source), calibrated=False)
    assert {name: found[name] for name in metrics["quantized_tta"]} == pytest.approx(metrics["quantized_tta"])
    assert evaluate_file(artifact, str(source))["log_loss"] == pytest.approx(
        metrics["quantized_tta_calibrated"]["log_loss"]
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_format_is_read_and_written_the_same(
    suffix: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = reviews(11)
    predict_file(texts, written(frame, tmp_path / "whole.parquet"), tmp_path / "whole-p.parquet")
    expected = pq.read_table(tmp_path / "whole-p.parquet").to_pandas()
    in_chunks_of(4, monkeypatch)
    facts = predict_file(texts, written(frame, tmp_path / f"rows{suffix}"), tmp_path / f"p{suffix}")
    readers: dict[str, Callable[..., pd.DataFrame]] = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    found = readers.get(suffix, functools.partial(pd.read_json, lines=True))(tmp_path / f"p{suffix}")
    assert facts | {"seconds": 0, "rows_per_second": 0} == {
        "rows": 11,
        "empty": 0,
        "seconds": 0,
        "rows_per_second": 0,
        "tta": "none",
        "temperature": 2.0,
        "output": str(tmp_path / f"p{suffix}"),
    }
    assert list(found.columns) == ["id", "prediction", "p_a", "p_b", "p_tie"]
    assert found["id"].tolist() == list(range(11))
    assert found["prediction"].tolist() == expected["prediction"].tolist()
    columns = ["p_a", "p_b", "p_tie"]
    np.testing.assert_allclose(found[columns], expected[columns], atol=1e-6)
    top = [tiny.LABELS[i] for i in found[columns].to_numpy().argmax(-1)]
    assert found["prediction"].tolist() == top
    assert not list(tmp_path.glob("*.tmp"))


def test_one_chunk_is_held_at_a_time(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    chunks = streams.chunks

    def counted(source: str, choose: streams.Choose) -> Iterator[pa.Table]:
        for chunk in chunks(source, choose, 5):
            events.append("read")
            yield chunk

    from llmkd import predicting

    spread = predicting._spread
    monkeypatch.setattr(streams, "chunks", counted)
    monkeypatch.setattr(predicting, "_spread", lambda *args: events.append("predicted") or spread(*args))
    predict_file(texts, written(reviews(17), tmp_path / "rows.csv"), tmp_path / "p.csv")
    assert events == ["read", "predicted"] * 4


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_rows(suffix: str, tmp_path: Path) -> None:
    def peak(rows: int) -> tuple[int, int]:
        frame = pd.concat([reviews(500)] * (rows // 500), ignore_index=True)
        source = written(frame, tmp_path / f"rows{rows}{suffix}")
        tracemalloc.start()
        seen, arrow = 0, 0
        with streams.writing(tmp_path / "copy.jsonl") as write:
            for chunk in streams.chunks(source, lambda names: ["review"], 250):
                write(chunk)
                seen, arrow = seen + len(chunk), max(arrow, chunk.nbytes)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seen == rows
        return most, arrow

    peak(500)  # what is imported at first
    few, many = peak(1_000), peak(10_000)
    assert many[0] < 1.3 * few[0]
    assert many[1] < 1.3 * few[1]


def test_swap_averages_both_orders_un_swapped(pairs: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    names = ("prompt", "response_a", "response_b")
    frame = pd.DataFrame({name: [sentence(random) for _ in range(9)] for name in names})
    turned = frame.rename(columns={"response_a": "response_b", "response_b": "response_a"})
    found = {}
    for name, rows in (("given", frame), ("turned", turned)):
        for tta in ("none", "swap"):
            source = written(rows, tmp_path / f"{name}.csv")
            predict_file(pairs, source, tmp_path / "p.parquet", tta=tta, calibrated=False)
            found[name, tta] = probabilities(tmp_path / "p.parquet")
    logits = [np.log(found[name, "none"]).astype(np.float32) for name in ("given", "turned")]
    np.testing.assert_allclose(found["given", "swap"], both_orders(*logits, (1, 0, 2)), atol=1e-6)
    np.testing.assert_allclose(found["turned", "swap"], found["given", "swap"][:, [1, 0, 2]], atol=1e-6)
    assert np.abs(found["given", "swap"] - found["given", "none"]).max() > 1e-4
    facts = predict_file(pairs, source, tmp_path / "p.parquet", calibrated=False)
    assert facts["tta"] == "swap"
    np.testing.assert_array_equal(probabilities(tmp_path / "p.parquet"), found["turned", "swap"])


def test_ids_may_repeat_and_stay_what_they_are(texts: Path, tmp_path: Path) -> None:
    frame = reviews(4).assign(id=["007", "007", "b", None], key=[3, 2, 1, 0])
    source = written(frame, tmp_path / "rows.parquet")
    predict_file(texts, source, tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet")["id"].to_pylist() == ["007", "007", "b", None]
    predict_file(texts, source, tmp_path / "p.parquet", columns={"id": "key"})
    assert pq.read_table(tmp_path / "p.parquet")["id"].to_pylist() == ["3", "2", "1", "0"]


def test_several_files_are_one_and_agree_on_their_ids(texts: Path, tmp_path: Path) -> None:
    for name, more in (("a0", {}), ("a1", {}), ("b0", {"id": "x"}), ("b1", {})):
        written(reviews(3).assign(**more), tmp_path / f"{name}.csv")
    predict_file(texts, str(tmp_path / "a*.csv"), tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet")["id"].to_pylist() == list(range(6))
    with pytest.raises(DataError) as error:
        predict_file(texts, str(tmp_path / "b*.csv"), tmp_path / "q.parquet")
    refused(error, "column 'id' is not in every file")


def test_an_id_that_begins_late_is_refused_and_nothing_is_left(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"review": f"review {at}", **({"id": at, "more": 1} if at >= 4 else {})} for at in range(6)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    in_chunks_of(2, monkeypatch)
    with pytest.raises(DataError) as error:
        predict_file(texts, str(source), tmp_path / "p.csv")
    refused(error, "column 'id'", "begins late in one: give each row an id, or none")
    assert list(tmp_path.glob("p.*")) == []
    source.write_text("".join(json.dumps({**row, "id": at}) + "\n" for at, row in enumerate(rows)))
    assert predict_file(texts, str(source), tmp_path / "p.csv")["rows"] == 6, "other names may come late"


def test_a_row_without_content_has_no_prediction(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = reviews(7)
    frame.loc[[0, 1, 5], "review"] = [" ", None, ""]
    in_chunks_of(2, monkeypatch)  # the first chunk has nothing at all
    facts = predict_file(texts, written(frame, tmp_path / "rows.parquet"), tmp_path / "p.parquet")
    table = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert (facts["rows"], facts["empty"]) == (7, 3)
    assert [row["id"] for row in table if row["prediction"] is None] == [0, 1, 5]
    assert [row["id"] for row in table if row["p_tie"] is None] == [0, 1, 5]
    found = evaluate_file(texts, str(tmp_path / "rows.parquet"))
    assert (found["read"], found["rows"], found["empty"]) == (7, 4, 3)


def test_scores_are_those_of_the_predictions(texts: Path, tmp_path: Path) -> None:
    frame = reviews(30)
    truth = np.array([tiny.LABELS.index(name) for name in frame.label])
    source = written(frame, tmp_path / "rows.csv")
    predict_file(texts, source, tmp_path / "p.parquet")
    expected = scores(probabilities(tmp_path / "p.parquet"), truth)
    found = evaluate_file(texts, source)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    numbers = written(frame.assign(verdict=truth).drop(columns="label"), tmp_path / "numbers.parquet")
    assert evaluate_file(texts, numbers, label="verdict")["log_loss"] == pytest.approx(expected["log_loss"])
    with pytest.raises(DataError, match=r"no column 'label' among .*verdict: name .*label="):
        evaluate_file(texts, numbers)


def test_calibration_divides_the_logits(texts: Path, tmp_path: Path) -> None:
    source = written(reviews(8), tmp_path / "rows.csv")
    for name, calibrated in (("on", True), ("off", False)):
        predict_file(texts, source, tmp_path / f"{name}.parquet", calibrated=calibrated)
    logits = np.log(probabilities(tmp_path / "off.parquet"))
    np.testing.assert_allclose(probabilities(tmp_path / "on.parquet"), softmax(logits / 2.0), atol=1e-6)


def test_a_classifier_of_anyone_reads_the_column_text(tmp_path: Path) -> None:
    artifact = save(tmp_path / "model", None)
    said = description.read(artifact)
    assert (said["columns"], said["labels"], said["max_tokens"]) == ({"text": "text"}, tiny.LABELS, 64)
    frame = reviews(5).rename(columns={"review": "text"})
    facts = predict_file(artifact, written(frame, tmp_path / "rows.csv"), tmp_path / "p.parquet")
    assert (facts["temperature"], facts["tta"]) == (None, "none")
    assert probabilities(tmp_path / "p.parquet").sum(1) == pytest.approx(1)


def test_a_description_holds_names_and_numbers(texts: Path) -> None:
    said = json.loads((texts / description.FILE).read_text())
    assert set(said) == {*description.NOTHING, "kind", "labels"}
    assert str(texts) not in (texts / description.FILE).read_text()


def test_turns_extra_columns_and_other_names(tmp_path: Path) -> None:
    said = {
        **PAIR,
        "turns": "json",
        "extra": ["source"],
        "template": PAIR["template"] + "{source}",
        "tta": "none",
    }
    said["columns"] = {**PAIR["columns"], "response_a": "left", "source": "source"}
    artifact = save(tmp_path / "model", said)
    rows = [
        {"prompt": '["some", "words"]', "left": '["a"]', "response_b": '["few"]', "source": "more", "x": 1}
    ]
    plain = [{"prompt": '["some\\n\\nwords"]', "left": '["a"]', "b": '["few"]', "source": "more"}]
    for name, found in (("turns", rows), ("plain", plain)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
    predict_file(artifact, str(tmp_path / "turns.jsonl"), tmp_path / "p.parquet")
    predict_file(artifact, str(tmp_path / "plain.jsonl"), tmp_path / "q.parquet", columns={"response_b": "b"})
    np.testing.assert_array_equal(
        probabilities(tmp_path / "p.parquet"), probabilities(tmp_path / "q.parquet")
    )


@pytest.mark.parametrize("kind", ["tabular", "image"])
def test_nets_read_their_features(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from llmkd import features
    from llmkd.models.nets import init_net

    random = np.random.default_rng(0)
    if kind == "tabular":
        frame = pd.DataFrame({"x": random.normal(size=12), "c": random.choice(["u", "v"], 12)})
        spec = features.fit(pa.Table.from_pandas(frame), {"numeric": ["x"], "categorical": ["c"]})
        name, settings, file = "llmkd-tabular", {"hidden_sizes": [8]}, "rows.csv"
    else:
        frame = pd.DataFrame({"image": [random.bytes(6) for _ in range(12)]})
        spec = features.fit(pa.Table.from_pandas(frame), image={"shape": [2, 3]})
        name, settings, file = "llmkd-mlp", {"hidden_sizes": [8]}, "rows.parquet"
    artifact = tmp_path / "net"
    init_net(name, settings, spec, artifact, ["no", "yes"], 0)
    source = written(frame.assign(label=["no", "yes"] * 6), tmp_path / file)
    predict_file(artifact, source, tmp_path / "p.parquet")
    found = pq.read_table(tmp_path / "p.parquet").to_pandas()
    model = AutoModelForSequenceClassification.from_pretrained(artifact).eval()
    rows = features.examples(pa.Table.from_pandas(frame), spec, [""] * 12, np.zeros(12, dtype=np.int64))
    expected = model(**rows.inputs(np.arange(12))).logits.detach().numpy()
    np.testing.assert_allclose(found[["p_no", "p_yes"]], softmax(expected), atol=1e-6)
    assert {"auc", "amex", "log_loss"} <= set(evaluate_file(artifact, source))
    less = written(frame.iloc[:, 1:].assign(label="no"), tmp_path / "less.csv")
    with pytest.raises(DataError, match=r"no column '(x|image)' among .*: the model was trained on it"):
        predict_file(artifact, less, tmp_path / "q.parquet")


def refused(error: pytest.ExceptionInfo[LlmkdError], *words: str) -> None:
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_missing_column_names_the_remedy_before_the_model_is_loaded(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkd.models.artifact.load_artifact", None)
    source = written(reviews(3).rename(columns={"review": "comment"}), tmp_path / "rows.csv")
    with pytest.raises(DataError) as error:
        predict_file(texts, source, tmp_path / "p.csv")
    refused(error, "no column 'review' among comment, label, stars: name it with columns={'text': ...}")
    with pytest.raises(ConfigError) as unknown:
        predict_file(texts, source, tmp_path / "p.csv", columns={"txt": "comment"})
    refused(unknown, "no field 'txt'", "text, id")
    assert list(tmp_path.glob("p.*")) == []


def test_a_row_that_cannot_be_read_is_named_and_nothing_is_left(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(2, monkeypatch)
    lines = [json.dumps({"review": "some words"})] * 5
    for broken, word in (('{"review": "cut', "not JSON"), ("[1]", "no JSON object")):
        source = tmp_path / "rows.jsonl"
        source.write_text("\n".join([*lines, broken, *lines]))
        with pytest.raises(DataError) as error:
            predict_file(texts, str(source), tmp_path / "p.csv")
        refused(error, str(source), "line 6", word)
    source = tmp_path / "rows.csv"
    source.write_text("review,label\nsome words,a\nmore,b,and more\n")
    with pytest.raises(DataError) as error:
        predict_file(texts, str(source), tmp_path / "p.csv")
    refused(error, str(source), "cannot be read as .csv")
    assert list(tmp_path.glob("p.*")) == []


def test_what_cannot_be_predicted_is_refused_in_one_line(texts: Path, pairs: Path, tmp_path: Path) -> None:
    source = written(reviews(3), tmp_path / "rows.csv")
    empty = tmp_path / "empty.csv"
    empty.write_text("review\n")
    (tmp_path / "folder.csv").mkdir()
    for call, words in (
        (lambda: predict_file(texts, str(tmp_path / "no.csv"), tmp_path / "p.csv"), "no such file"),
        (
            lambda: predict_file(texts, str(tmp_path / "rows.xls"), tmp_path / "p.csv"),
            "suffix '.xls' is not read",
        ),
        (lambda: predict_file(texts, source, tmp_path / "p.xls"), "suffix '.xls' is not written"),
        (lambda: predict_file(texts, source, tmp_path / "no" / "p.csv"), "there is no folder"),
        (lambda: predict_file(texts, source, Path(source)), "is the source itself"),
        (lambda: predict_file(texts, source, tmp_path / "folder.csv"), "folder.csv: is a folder"),
        (lambda: predict_file(texts, source, tmp_path / "p.csv", max_tokens=0), "max_tokens = 0"),
        (lambda: evaluate_file(texts, source, batch_tokens=0), "batch_tokens = 0"),
        (lambda: predict_file(texts, str(empty), tmp_path / "p.csv"), "no rows"),
        (lambda: predict_file(texts, source, tmp_path / "p.csv", tta="swap"), "has no two orders"),
        (lambda: predict_file(texts, source, tmp_path / "p.csv", tta="both"), "use swap or none"),
        (lambda: predict_file(texts, source, tmp_path / "p.csv", max_tokens=4096), "lower max_tokens"),
        (lambda: evaluate_file(texts, source, label="review"), "labels in 'review' are unknown"),
        (lambda: predict_file(tmp_path, source, tmp_path / "p.csv"), "has no config.json"),
    ):
        with pytest.raises(LlmkdError) as error:
            call()
        refused(error, words)
    assert list(tmp_path.glob("p.*")) == []
    with open(source, newline="") as file:
        assert len(list(csv.reader(file))) == 4


def test_a_language_model_is_no_classifier(tmp_path: Path) -> None:
    tiny.causal_lm("llama").save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelError) as error:
        predict_file(tmp_path / "lm", written(reviews(3), tmp_path / "rows.csv"), tmp_path / "p.csv")
    refused(error, "is a language model", 'pipeline("text-generation")')


def test_labels_that_are_not_the_head_s_are_refused(tmp_path: Path) -> None:
    artifact = save(tmp_path / "model", None)
    description.write(artifact, TEXT, ["x", "y", "z"], None)
    with pytest.raises(ModelError) as error:
        description.read(artifact)
    refused(error, "['x', 'y', 'z']", "['a', 'b', 'tie']")
