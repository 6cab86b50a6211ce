"""`llmkd init`: what it guesses of a file, what it says, and that its config is one."""

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkd.cli import main, pairs
from llmkd.cli.draft import quoted
from llmkd.config import load, parse
from llmkd.schema import Config

WORDS = [
    "the",
    "film",
    "was",
    "slow",
    "and",
    "its",
    "story",
    "of",
    "people",
    "who",
    "went",
    "to",
    "a",
    "house",
]


def text(at: int, words: int = 14) -> str:
    """Some words, others for each number."""
    return " ".join(random.Random(at).choices(WORDS, k=words)) + f" {at}"


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


def code(*words: object) -> int:
    try:
        main(["init", *map(str, words)])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drafted(data: Path, *flags: object) -> Config:
    """The config that init writes for a file; it must be one."""
    assert code(data, *flags) == 0
    return load(f"{data.stem}.yaml")


def survey(place: Path, count: int = 120, **changed: list[Any]) -> Path:
    columns = {
        "Customer Query": [text(at // 2) for at in range(count)],
        "Bot #1": [text(1000 + at) for at in range(count)],
        "Bot #2": [text(2000 + at) for at in range(count)],
        "who won?": [("first", "second", "same")[at % 3] for at in range(count)],
    }
    return write(place / "survey.csv", {**columns, **changed})


def reviews(place: Path, count: int = 100, suffix: str = ".csv", **changed: list[Any]) -> Path:
    columns = {
        "Nr.": list(range(count)),
        "Review body": [text(at) for at in range(count)],
        "País": [("es", "fr")[at % 2] for at in range(count)],
        "Stars": [1 + at % 5 for at in range(count)],
    }
    return write(place / f"reviews{suffix}", {**columns, **changed})


def test_preferences_under_odd_names(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = drafted(survey(place)).task
    assert task.kind == "preference"
    assert task.columns == {"prompt": "Customer Query", "response_a": "Bot #1", "response_b": "Bot #2"}
    assert (task.label, task.labels, task.label_values) == ("who won?", ["first", "second", "same"], None)
    assert task.swap
    out = capsys.readouterr().out
    assert "kind: preference, as `Bot #1` and `Bot #2` are two answers" in out
    assert "'first' (40) = a, 'second' (40) = b, 'same' (40) = tie" in out
    assert "next: llmkd run --config survey.yaml" in out


def answers(place: Path, winners: list[str]) -> Path:
    """Two answers whose names tell sides in a language that is not looked up."""
    count = 120
    columns: dict[str, list[Any]] = {
        "Frage": [text(at // 2) for at in range(count)],
        "Antwort (Bär)": [text(1000 + at) for at in range(count)],
        "Antwort (Fuß)": [text(2000 + at) for at in range(count)],
        "besser": [winners[at % len(winners)] for at in range(count)],
    }
    return write(place / "antworten.csv", columns)


def test_answers_are_known_by_the_winners_that_name_them(place: Path) -> None:
    task = drafted(answers(place, ["Bär", "Fuß", "gleich"])).task
    assert task.kind == "preference"
    assert task.columns["response_a"] == "Antwort (Bär)"
    assert task.labels == ["Bär", "Fuß", "gleich"]
    data = answers(place, ["Bär", "Fuß", "egal"])
    assert code(data, "--force") == 2, "which word means a tie is asked for"
    values = [word for at in ("Bär=a", "Fuß=b", "egal=tie") for word in ("--value", at)]
    assert drafted(data, "--force", *values).task.labels == ["Bär", "Fuß", "egal"]


def test_what_no_model_will_read_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = drafted(answers(place, ["gut", "schlecht"])).task
    assert (task.kind, task.columns) == ("classification", {"text": "Antwort (Fuß)"})
    out = capsys.readouterr().out
    assert "not read: `Frage`, `Antwort (Bär)`\n" in out
    assert "texts, too: `Frage`, `Antwort (Bär)`; two answers to compare are told by --response-a" in out
    frame = pd.read_csv(reviews(place))
    frame["Nr."] = [0, 0, *frame["Nr."][2:]]
    frame.to_csv(place / "twice.csv", index=False)
    assert drafted(place / "twice.csv").task.id is None
    assert "id: none, as `Nr.` is blank or the same in some rows; rows count\n" in capsys.readouterr().out


def test_odd_csvs_are_read_as_they_are_meant(place: Path) -> None:
    data = place / "Umfrage Größe.csv"
    with data.open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Größe (cm)", "Was halten Sie davon?", "Würden Sie?"])
        for at in range(90):
            said = f'Na ja; {text(at)},\n"{text(at + 500)}"'
            rows.writerow([f"1,{at}", said, ("ja", "nein", "weiß nicht")[at % 3]])
    task = load_of(data, "Umfrage-Größe.yaml").task
    assert task.columns == {"text": "Was halten Sie davon?"}
    assert task.labels == ["ja", "nein", "weiß nicht"]
    assert all('\n"' in found for found in pq.read_table(str(task.test))["Was halten Sie davon?"].to_pylist())


def load_of(data: Path, name: str) -> Config:
    assert code(data) == 0
    return load(name)


def test_a_part_is_held_out_by_prompt_and_the_data_stays(place: Path) -> None:
    data = survey(place)
    before = data.read_bytes()
    config = drafted(data)
    assert data.read_bytes() == before
    parts = [pq.read_table(str(path)).to_pylist() for path in (config.task.train, config.task.test)]
    prompts = [{row["Customer Query"] for row in rows} for rows in parts]
    assert not prompts[0] & prompts[1]
    assert [len(rows) for rows in parts] == [96, 24]
    with data.open(newline="", encoding="utf-8") as file:
        assert sorted(map(str, csv.DictReader(file))) == sorted(str(row) for rows in parts for row in rows)
    assert config.folds.group == "prompt"


def test_the_seed_draws_the_test_part(place: Path) -> None:
    data, drawn = survey(place), []
    for seed in (1, 1, 2):
        assert code(data, "--seed", seed, "--force") == 0
        drawn.append(pq.read_table("survey-test.parquet").to_pylist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_given_test_part_is_taken_as_it_is(place: Path) -> None:
    test = survey(place, 30).rename(place / "other.csv")
    data = survey(place)
    config = drafted(data, "--test", test)
    assert (config.task.train, config.task.test) == (str(data), str(test))
    assert {path.name for path in place.iterdir()} == {"survey.csv", "other.csv", "survey.yaml"}


def test_ids_that_both_files_share_are_none(place: Path) -> None:
    test = reviews(place, 50).rename(place / "other.csv")
    assert drafted(reviews(place), "--test", test).task.id is None
    apart = write(place / "third.csv", {"Nr.": [100, 101], "Review body": ["a b", "c d"], "Stars": [1, 2]})
    assert drafted(reviews(place), "--test", apart, "--force").task.id == "Nr."


def test_a_review_s_text_label_and_id(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = drafted(reviews(place)).task
    assert (task.kind, task.columns, task.label) == ("classification", {"text": "Review body"}, "Stars")
    assert task.labels == ["1", "2", "3", "4", "5"]
    assert task.id == "Nr."
    out = capsys.readouterr().out
    assert "text: column `Review body`, the longest strings (median " in out
    assert "label: column `Stars`, 5 distinct values: '1' (20)" in out
    assert "it could also be `País`" in out


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_numbers_as_labels_keep_their_meaning_in_every_format(place: Path, suffix: str) -> None:
    from llmkd.canonical import canonical
    from llmkd.sources import read

    task = drafted(reviews(place, suffix=suffix)).task
    table, _ = canonical(
        read(task.train),
        part="train",
        kind=task.kind,
        columns=task.columns,
        label=task.label,
        labels=task.labels or [],
        label_values=task.label_values,
    )
    stars = [int(value) - 1 for value in read(task.train)["Stars"].to_pylist()]
    assert table["label"].to_pylist() == stars


def test_flags_correct_a_guess(place: Path) -> None:
    data = reviews(place)
    task = drafted(data, "--label", "País").task
    assert (task.label, task.labels, task.label_values) == ("País", ["es", "fr"], None)
    assert drafted(data, "--kind", "causal_lm", "--force").task.columns == {"text": "Review body"}
    swapped = ["--response-a", "Bot #2", "--response-b", "Bot #1", "--force"]
    task = drafted(survey(place), *swapped, "--prompt", "Customer Query").task
    assert task.columns["response_a"] == "Bot #2"
    values = ["--value", "first=b", "--value", "second=a", "--value", "same=tie", "--force"]
    assert drafted(survey(place), *values).task.labels == ["second", "first", "same"]


def test_winners_of_numbers_and_two_words_for_a_tie(place: Path) -> None:
    task = drafted(survey(place, **{"who won?": [at % 3 for at in range(120)]})).task
    assert (task.labels, task.label_values) == (["a", "b", "tie"], {"0": 0, "1": 1, "2": 2})
    words = ["model_a", "model_b", "tie", "tie (bothbad)"] * 30
    task = drafted(survey(place, **{"who won?": words}), "--force").task
    assert task.labels == ["a", "b", "tie"]
    assert task.label_values == {"model_a": 0, "model_b": 1, "tie": 2, "tie (bothbad)": 2}
    assert drafted(survey(place, **{"who won?": words[:2] * 60}), "--force").task.labels == words[:2]


def test_one_hot_winners_of_chats_in_json(place: Path) -> None:
    columns: dict[str, list[Any]] = {"id": [str(900 + at) for at in range(60)]}
    columns["model_a"] = [("gpt", "claude")[at % 2] for at in range(60)]
    for number, name in enumerate(("prompt", "response_a", "response_b")):
        columns[name] = [json.dumps([text(100 * number + at), text(at)]) for at in range(60)]
    for number, name in enumerate(("winner_model_a", "winner_model_b", "winner_tie")):
        columns[name] = [int(at % 3 == number) for at in range(60)]
    task = drafted(write(place / "arena.csv", columns)).task
    assert task.label == ["winner_model_a", "winner_model_b", "winner_tie"]
    assert (task.turns, task.id, task.labels) == ("json", "id", ["a", "b", "tie"])


def test_numbers_and_categories_are_tabular(place: Path) -> None:
    columns = {
        "Kunden-Nr.": [f"K{at}" for at in range(100)],
        "Größe (cm)": [f"{at / 7:.2f}" if at % 9 else "" for at in range(100)],
        "a.b": [at % 37 for at in range(100)],
        "Farbe": [("rot", "grün", "blau")[at % 3] for at in range(100)],
        "bad[1]": [at % 11 for at in range(100)],
        "Target": [("yes", "no")[at % 2] for at in range(100)],
    }
    config = drafted(write(place / "tab.csv", columns))
    assert config.task.features is not None
    assert config.task.features.numeric == ["Größe (cm)", "a.b"]
    assert config.task.features.categorical == ["Farbe"]
    assert (config.task.label, config.task.id, config.quantize) == ("Target", "Kunden-Nr.", None)


def test_texts_alone_and_chats_are_for_language_models(place: Path) -> None:
    config = drafted(write(place / "texts.jsonl", {"A.Text": [text(at) for at in range(60)]}))
    assert (config.task.kind, config.task.columns) == ("causal_lm", {"text": "A.Text"})
    assert config.pretrain[0].columns == {"text": "A.Text"}
    chat = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "yes"}]
    chats = [[{**chat[0], "content": text(at)}, chat[1]] for at in range(60)]
    config = drafted(write(place / "chats.jsonl", {"talk": chats}))
    assert config.task.columns == {"text": "chat as text"}
    row = pq.read_table(config.task.train).to_pylist()[0]
    assert row["chat as text"] == f"user: {row['talk'][0]['content']}\nassistant: yes"
    real = (
        Path("chats.yaml").read_text().replace('text: "chat as text"', "").replace("# messages:", "messages:")
    )
    assert parse(real).task.columns == {"messages": "talk"}


@pytest.mark.parametrize("name", ["survey", "reviews", "texts"])
def test_the_real_models_to_uncomment_are_a_config(place: Path, name: str) -> None:
    data = {"survey": survey, "reviews": reviews}.get(name, lambda at: write(at / "texts.csv", {
        "text": [text(row) for row in range(60)]}))(place)  # fmt: skip
    assert code(data) == 0
    tiny, real = Path(f"{name}.yaml").read_text(encoding="utf-8").split("# Real models")
    kept = re.split(r"^(?:# Tiny models|teachers:)", tiny, flags=re.MULTILINE)[0]
    block = re.sub(r"^# ?", "", real[real.index("# teachers:") :], flags=re.MULTILINE)
    config = parse(kept.replace("precision: fp32", "") + block)
    assert all(model.model for model in config.models)


def test_lengths_set_the_budget(place: Path) -> None:
    short = drafted(reviews(place)).task.max_tokens
    long = drafted(reviews(place, **{"Review body": [text(at, 60) for at in range(100)]}), "--force").task
    assert 32 <= short < long.max_tokens <= 256
    endless = reviews(place, **{"Review body": [text(at, 2000) for at in range(100)]})
    assert drafted(endless, "--force").task.max_tokens == 256


def test_rows_without_a_label_are_left_out_and_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stars = ["" if at < 7 else 1 + at % 5 for at in range(100)]
    config = drafted(reviews(place, Stars=stars))
    assert "left out: 7 rows without a label or without a text" in capsys.readouterr().out
    assert pq.read_table(config.task.train).num_rows + pq.read_table(str(config.task.test)).num_rows == 93


def test_a_column_with_gaps_is_the_last_to_be_taken_for_the_label(place: Path) -> None:
    texts = [f"a ticket about {('payment', 'delivery')[at % 2]} number {at}" for at in range(100)]
    teams, notes = [("billing", "shipping")[at % 2] for at in range(100)], ["", "ok", "urgent", ""] * 25
    data = Path("Tickets (Q3).csv")
    pd.DataFrame({"Request": texts, "sent to": teams, "note": notes}).to_csv(data, index=False, sep=";")
    main(["init", str(data)])
    config = load("Tickets-Q3.yaml")
    assert (config.task.label, config.task.labels) == ("sent to", ["billing", "shipping"])


def test_large_files_are_read_in_part(place: Path) -> None:
    config = drafted(reviews(place, 6000))
    assert config.task.rows == 3000
    assert pq.read_table(str(config.task.test)).num_rows == 1200


def test_what_stands_there_is_not_written_over(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = reviews(place)
    Path("reviews.yaml").write_text("mine")
    assert code(data) == 2
    assert (
        "reviews.yaml: is there already; choose another name with -o, or add --force"
        in capsys.readouterr().err
    )
    assert Path("reviews.yaml").read_text() == "mine"
    assert {path.name for path in place.iterdir()} == {"reviews.csv", "reviews.yaml"}
    kept = Path(data).read_bytes()
    Path("x-train.parquet").hardlink_to(data)  # --force is for what init itself has written
    for config in (data, "x.yaml"):
        assert code(data, "-o", config, "--force") == 2
        assert "is the data itself" in capsys.readouterr().err
    assert code(data, "--test", data, "-o", data, "--force") == 2
    assert Path(data).read_bytes() == kept
    Path("x-train.parquet").unlink()
    assert code(data, "-o", "deep/other.yaml", "--run", "runs/x") == 0
    config = load("deep/other.yaml")
    assert (config.run, config.task.train) == ("runs/x", "deep/other-train.parquet")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--text", "body"], "--text body: no such column; there are `Nr.`, `Review body`"),
        (["--label", "Stars"], "--label Stars: 100 distinct values; a label has 2 to 100"),
        (["--label", "Review body"], "--label Review body: is the text; name the text, too: --text"),
        (["--kind", "preference"], "which two columns are the answers? name them: --response-a"),
        (["--value", "x"], "--value 'x': write --value VALUE=a|b|tie"),
        (["--value", "x=maybe"], "--value x=maybe: write a, b or tie"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for(
    place: Path, flags: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(reviews(place, **{"Stars": [text(at, 1) for at in range(100)]}), *flags) == 2
    err = capsys.readouterr().err
    assert error in err
    assert err.count("\n") == 1
    assert [path.name for path in place.iterdir()] == ["reviews.csv"]


def test_winners_in_words_of_their_own_are_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = [("oui", "non")[at % 2] for at in range(120)]
    assert code(survey(place, **{"who won?": odd})) == 2
    assert "who won? `who won?` holds oui, non; name the column and its values" in capsys.readouterr().err


def test_chosen_and_rejected_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {name: [text(at) for at in range(60)] for name in ("prompt", "chosen", "rejected")}
    assert code(write(place / "dpo.csv", columns)) == 2
    assert "columns chosen and rejected" in capsys.readouterr().err


def test_too_few_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(survey(place, 20)) == 2
    assert "too few to hold out a test part" in capsys.readouterr().err


def test_json_says_all_of_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(survey(place), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["config"] == "survey.yaml"
    assert document["labels"] == ["first", "second", "same"]
    assert document["said"][0].startswith("kind: preference")


@pytest.mark.parametrize(
    "value",
    [
        "true",
        "1e5",
        "1_000",
        "null",
        "a: b",
        "#x",
        "who won?",
        '"',
        "\\",
        "\n\t",
        "Größe 👩‍💻",
        "\x85\u2028\x7f",
        "~",
        "",
    ],
)
def test_any_text_survives_the_yaml(value: str) -> None:
    base = "run: x\ntask: {kind: causal_lm, train: x}\nfolds: {count: 1}\nstudent: {name: s, model: m}\n"
    base += "teachers: [{name: t, model: m}]\ndistill: {method: sequence}\n"
    assert (
        parse(f"{base}pretrain: [{{objective: causal_lm, data: {quoted(value)}}}]").pretrain[0].data == value
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("response_a", "response_b", ("a", "b")),
        ("responseA", "responseB", ("a", "b")),
        ("Bot #1", "Bot #2", ("1", "2")),
        ("Answer.0", "Answer.1", ("0", "1")),
        ("left answer", "right answer", ("left", "right")),
        ("Ответ А", "Ответ Б", ("а", "б")),
        ("Bot #2", "Bot #1", None),
        ("prompt", "answer", None),
        ("bot 1 text", "bot 2 answer", None),
    ],
)
def test_names_that_tell_sides(first: str, second: str, expected: tuple[str, str] | None) -> None:
    assert pairs.sides(first, second) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["model_a", "model_b", "tie", "tie (bothbad)"], [0, 1, 2, 2]),
        (["Bot #2", "Bot #1"], [1, 0]),
        (["1", "2"], [0, 1]),
        (["0", "1", "2"], [0, 1, 2]),
        (["1", "2", "3"], [0, 1, 2]),
        (["right", "left", "draw"], [1, 0, 2]),
        (["A", "B"], [0, 1]),
        (["good", "bad"], None),
        (["same", "first"], None),
        (["first", "second", "?"], None),
    ],
)
def test_values_that_tell_winners(values: list[str], expected: list[int] | None) -> None:
    found = pairs.winner(values, "Bot #1", "Bot #2")
    assert (found and [found[value] for value in values]) == expected
