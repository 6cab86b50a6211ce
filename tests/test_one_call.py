"""distill_model: what it learns by, what it takes, what it leaves, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import llmkd
from llmkd import given, one_call, run
from llmkd.errors import ConfigError, DataError, LlmkdError, ModelError, RunError
from llmkd.evaluate import softmax
from llmkd.methods.cached import Cached
from llmkd.models.pooling import class_logits
from llmkd.objective import HARD
from llmkd.train import fit

WORDS = np.array(
    [["red", "green", "blue", "black"], ["cat", "dog", "owl", "cow"], ["sea", "tree", "rock", "star"]]
)
LABELS = ["colour", "animal", "thing"]
FAST: dict[str, Any] = {"max_tokens": 32, "batch_rows": 16, "learning_rate": 3e-3, "precision": "fp32"}


def table(count: int, seed: int) -> pa.Table:
    """Distinct texts of 8 words; two words in three are of the label's kind, the others of any."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    kinds = np.where(random.random((8, count)) < 2 / 3, labels, random.integers(0, 3, (8, count))).T
    words = WORDS[kinds, random.integers(0, 4, kinds.shape)]  # (count, 8)
    return pa.table({"text": [" ".join(row) for row in words], "label": labels})


TRAIN, TEST = table(160, 0), table(60, 1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer([" ".join(WORDS.ravel())] * 3, 320)


def new(tokenizer: Any, architecture: str = "llama", seed: int = 0, **settings: Any) -> Any:
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_labels": 3}
    if architecture == "bert":  # without dropout, so that the first loss can be told
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny.classifier(architecture, seed, **{**sizes, **settings})
    if model.config.num_labels == 3:
        model.config.id2label = dict(enumerate(LABELS))
        model.config.label2id = {name: i for i, name in enumerate(LABELS)}
    return model


def save(model: Any, tokenizer: Any, directory: Path) -> str:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def paths(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A teacher that knows the labels, one that does not, and a student with a random head."""
    directory = tmp_path_factory.mktemp("models")
    rows, _, _ = given.labelled_rows(
        {"train": TRAIN}, "classification", {"text": "text"}, "label", LABELS, 0.0, 0
    )
    examples = one_call.crossfit.text_examples(
        rows, tokenizer, "classification", template=None, max_tokens=32
    )
    teacher = new(tokenizer)
    training = tiny.training(directory, epochs=8, learning_rate=3e-3)
    fit(Cached(teacher, HARD), examples, np.arange(len(rows)), training, batch_rows=16, batch_tokens=4096)
    return {
        "teacher": save(teacher, tokenizer, directory / "teacher"),
        "other": save(new(tokenizer, "bert", 5), tokenizer, directory / "other"),
        "student": save(new(tokenizer, "bert", 1), tokenizer, directory / "student"),
    }


def loaded(path: str | Path) -> tuple[Any, Any]:
    return (
        AutoModelForSequenceClassification.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )


def logits_of(path: str | Path, texts: list[str]) -> torch.Tensor:
    model, tokenizer = loaded(path)
    with torch.no_grad():
        return torch.cat([class_logits(model, **tokenizer(text, return_tensors="pt")) for text in texts])


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "manifest.json"}


def test_a_student_learns_from_a_teacher_without_any_label_and_the_pipeline_gives_its_scores(
    paths: dict[str, str], tmp_path: Path
) -> None:
    unlabelled = TRAIN.set_column(1, "label", pa.array([-1] * len(TRAIN)))
    out = tmp_path / "out"
    student, metrics = llmkd.distill_model(
        paths["teacher"], paths["student"], unlabelled, TEST, out, epochs=8, alpha=1.0, **FAST
    )
    assert metrics["teachers"][0]["accuracy"] > 0.9
    assert metrics["student"]["accuracy"] > 0.8
    assert metrics["rows"] == {"train": 144, "dev": 16, "eval": 60, "left_out": 0}
    assert not student.training

    classify = pipeline("text-classification", model=str(out), top_k=None)
    texts = TEST["text"].to_pylist()[:8]
    piped = [{one["label"]: one["score"] for one in found} for found in classify(texts)]
    ours = softmax(logits_of(out, texts).numpy())
    expected = [dict(zip(LABELS, row, strict=True)) for row in ours.tolist()]
    for found, row in zip(piped, expected, strict=True):
        assert found == pytest.approx(row, abs=1e-5)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["metrics"]["student"] == metrics["student"]
    assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize("method", ["cached", "online"])
def test_the_loss_is_hinton_s_with_the_mean_over_teachers(
    method: str, paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step over all rows: the logged loss is the plain formula's on the weights before it."""
    histories: list[dict[str, Any]] = []
    monkeypatch.setattr("llmkd.train.fit", lambda *a, **k: (histories.append(fit(*a, **k)), histories[-1])[1])
    settings = {**FAST, "epochs": 1, "batch_rows": 200, "dev_share": 0.0, "method": method}
    llmkd.distill_model(
        [paths["teacher"], paths["other"]],
        paths["student"],
        TRAIN,
        output_dir=tmp_path / "out",
        temperature=3.0,
        alpha=0.6,
        **settings,
    )
    texts = TRAIN["text"].to_pylist()
    labels = torch.tensor(TRAIN["label"].to_pylist())
    teacher, other, student = (logits_of(paths[name], texts) for name in ("teacher", "other", "student"))
    q = (student / 3).log_softmax(-1)
    divergences = []
    for logits in (teacher, other):
        p = (logits / 3).softmax(-1)
        divergences.append((p * (p.log() - q)).sum(-1).mean())
    hard = torch.nn.functional.cross_entropy(student, labels)
    expected = 0.6 * 9 * (divergences[0] + divergences[1]) / 2 + 0.4 * hard
    (history,) = histories
    assert history["steps"] == 1
    assert history["loss"][0]["loss"] == pytest.approx(float(expected), rel=1e-3)
    assert history["loss"][0]["kl/teacher1"] == pytest.approx(9 * float(divergences[1]), rel=1e-3)


@pytest.mark.parametrize("method", ["cached", "online"])
def test_objects_give_what_their_paths_give(method: str, paths: dict[str, str], tmp_path: Path) -> None:
    settings = {**FAST, "epochs": 1, "method": method}
    llmkd.distill_model(paths["teacher"], paths["student"], TRAIN, None, tmp_path / "paths", **settings)
    (teacher, own), (student, tokenizer) = loaded(paths["teacher"]), loaded(paths["student"])
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    result = llmkd.distill_model(
        (teacher, own), student, TRAIN, None, tmp_path / "objects", tokenizer=tokenizer, **settings
    )
    assert result.student is student
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    weights = [files(tmp_path / name)["model.safetensors"] for name in ("paths", "objects")]
    assert weights[0] == weights[1]


def test_every_kind_of_data_set_gives_the_same_rows(tmp_path: Path) -> None:
    TRAIN.to_pandas().to_csv(tmp_path / "rows.csv", index=False)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=LABELS)}
    )
    named = pd.DataFrame(
        {"text": TRAIN["text"].to_pylist(), "label": [LABELS[i.as_py()] for i in TRAIN["label"]]}
    )
    kinds = [
        TRAIN,
        TRAIN.to_pandas(),
        named,
        tmp_path / "rows.csv",
        datasets.Dataset.from_dict(TRAIN.to_pydict(), features=features),
    ]
    made = [
        given.labelled_rows({"train": data}, "classification", {"text": "text"}, "label", LABELS, 0.25, 3)
        for data in kinds
    ]
    for rows, parts, _ in made:
        assert rows.equals(made[0][0])
        assert np.array_equal(parts["dev"], made[0][1]["dev"])
        shares = np.bincount(rows["label"].to_numpy()[parts["dev"]]) / np.bincount(rows["label"].to_numpy())
        assert shares == pytest.approx(0.25, abs=0.03)
        assert not set(parts["dev"]) & set(parts["train"])


def test_equal_texts_stay_on_one_side_and_rows_of_eval_are_left_out() -> None:
    doubled = pa.concat_tables([TRAIN, TRAIN, TEST.slice(0, 5)])
    rows, parts, left_out = given.labelled_rows(
        {"train": doubled, "test": TEST}, "classification", {"text": "text"}, "label", LABELS, 0.2, 0
    )
    assert left_out == 5
    texts = {part: set(rows["text"].take(pa.array(at)).to_pylist()) for part, at in parts.items()}
    assert not texts["train"] & texts["dev"]
    assert not texts["eval"] & (texts["train"] | texts["dev"])
    assert len(parts["dev"]) == 64


def test_the_baseline_is_the_student_trained_on_labels_alone(paths: dict[str, str], tmp_path: Path) -> None:
    """With α = 0 the student is its own baseline, and the baseline does not depend on α."""
    found = {}
    for alpha in (0.0, 0.9):
        given = (paths["teacher"], paths["student"], TRAIN, TEST, tmp_path / str(alpha))
        found[alpha] = llmkd.distill_model(*given, alpha=alpha, epochs=2, baseline=True, **FAST).metrics
    assert found[0.0]["baseline"] == found[0.0]["student"] == found[0.9]["baseline"]
    assert found[0.9]["student"] != found[0.9]["baseline"]
    assert {"log_loss", "accuracy", "ece", "rows"} <= set(found[0.9]["baseline"])


def test_lora_is_merged_into_the_saved_student(
    paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted: list[np.ndarray[Any, Any]] = []
    merged = one_call._merged

    def spy(network: Any) -> Any:
        with torch.no_grad():
            ids = tokenizer(texts, return_tensors="pt", padding=True)
            adapted.append(class_logits(network.eval(), **ids).numpy())
        return merged(network)

    texts, (_, tokenizer) = TEST["text"].to_pylist()[:4], loaded(paths["student"])
    monkeypatch.setattr(one_call, "_merged", spy)
    lora = {"r": 4, "alpha": 8}
    student, _ = llmkd.distill_model(
        paths["teacher"], paths["student"], TRAIN, None, tmp_path / "out", lora=lora, epochs=2, **FAST
    )
    again = logits_of(tmp_path / "out", texts).numpy()
    assert again == pytest.approx(adapted[0], abs=1e-4)
    assert np.abs(again - logits_of(paths["student"], texts).numpy()).max() > 0.1
    assert not hasattr(student, "peft_config")
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_preference_rows_by_name(paths: dict[str, str], tmp_path: Path) -> None:
    texts = TRAIN["text"].to_pylist()
    frame = pd.DataFrame(
        {"prompt": texts, "response_a": texts[::-1], "response_b": texts, "label": TRAIN["label"].to_pylist()}
    )
    _, metrics = llmkd.distill_model(
        paths["teacher"], paths["student"], frame[40:], frame[:40], tmp_path / "out",
        kind="preference", epochs=1, **{**FAST, "max_tokens": 64},
    )  # fmt: skip
    assert metrics["student"]["rows"] == 40


def test_an_earlier_student_is_replaced_and_nothing_else(paths: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = (paths["teacher"], paths["student"], TRAIN, None, out)
    llmkd.distill_model(*given, epochs=1, **FAST)
    (out / "left").touch()
    llmkd.distill_model(*given, epochs=1, **FAST)
    assert not (out / "left").exists()
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["out"]

    stage = tmp_path / "04_merge"
    with run.writing(stage, "04_merge", {}, {}, 0) as unit:
        (unit.path / "model").touch()
    with pytest.raises(RunError, match="belongs to a run"):
        llmkd.distill_model(*given[:4], stage, **FAST)
    assert (stage / "model").exists()
    (out / "manifest.json").unlink()
    before = files(out)
    with pytest.raises(RunError, match="move it away"):
        llmkd.distill_model(*given, **FAST)
    with pytest.raises(RunError, match="the student's own"):
        llmkd.distill_model(paths["teacher"], str(out), TRAIN, None, out, **FAST)
    assert files(out) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "feature"}, ConfigError, "stages/03_distill.py"),
        ({"method": "magic"}, ConfigError, "use cached or online"),
        ({"kind": "image"}, ConfigError, "use classification or preference"),
        ({"temperature": 0}, ConfigError, "temperature=0"),
        ({"alpha": 1.5}, ConfigError, "alpha=1.5"),
        ({"dev_share": 0.9}, ConfigError, "dev_share=0.9"),
        ({"lora": {"rank": 4}}, ConfigError, "give r and alpha"),
        ({"baseline": True, "eval_dataset": None}, ConfigError, "give an eval_dataset"),
        ({"text_column": "body"}, DataError, "no column 'body'.*set text_column="),
        ({"label_column": "y"}, DataError, "no column 'y'.*set label_column="),
        ({"train_dataset": [{"text": "a"}]}, DataError, "train_dataset is a list"),
        ({"train_dataset": TRAIN.slice(0, 4)}, DataError, "dev_share=0.1.*set it to 0"),
        ({"labels": LABELS[::-1]}, ModelError, "same in the same order"),
        ({"labels": LABELS[:2]}, ModelError, "same in the same order"),
        ({"max_tokens": 65}, ModelError, "beyond its 64 positions"),
        ({"teacher": "nowhere/at/all"}, ModelError, "cannot load it"),
        ({"teacher": []}, ConfigError, "at least one model"),
        ({"teacher": 3}, ModelError, "a int is no model"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line_before_any_training(
    changes: dict[str, Any], error: type[LlmkdError], message: str, paths: dict[str, str], tmp_path: Path
) -> None:
    given = {"teacher": paths["teacher"], "student": paths["student"], "train_dataset": TRAIN}
    given |= {"eval_dataset": TEST, "output_dir": tmp_path / "out", **FAST}
    with pytest.raises(error, match=message) as caught:
        llmkd.distill_model(**{**given, **changes})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused(paths: dict[str, str], tokenizer: Any, tmp_path: Path) -> None:
    def refused(teacher: Any, student: Any, message: str, data: Any = TRAIN, **more: Any) -> None:
        with pytest.raises(ModelError, match=message):
            llmkd.distill_model(teacher, student, data, None, tmp_path / "out", **FAST, **more)

    student = paths["student"]
    backbone = save(tiny.causal_lm(vocab_size=len(tokenizer)), tokenizer, tmp_path / "lm")
    refused(backbone, student, "LlamaForCausalLM, no sequence classifier: fine-tune it")
    turned = new(tokenizer)
    turned.config.id2label = dict(enumerate(LABELS[::-1]))
    refused([paths["teacher"], (turned, tokenizer)], student, "thing, animal, colour")
    refused((new(tokenizer, num_labels=2), tokenizer), student, "all need the same")
    refused((new(tokenizer, num_labels=1), tokenizer), student, "does not choose one label of several")
    refused(new(tokenizer), student, "no tokenizer: give .model, tokenizer.")
    refused((paths["teacher"], student), student, "no tokenizer: give .model, tokenizer.")
    refused((tiny.classifier(), tokenizer), student, "embeds 64 tokens, its tokenizer has")
    padless = AutoTokenizer.from_pretrained(student)
    padless.pad_token = None
    refused(paths["teacher"], (new(tokenizer), padless), "no pad token")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=LABELS[::-1])}
    )
    swapped = datasets.Dataset.from_dict(TRAIN.to_pydict(), features=features)
    refused(paths["teacher"], student, "train_dataset has the labels thing", swapped)


def test_unnamed_labels_are_taken_by_their_place(tokenizer: Any) -> None:
    def named_by(names: list[str]) -> Any:
        model = new(tokenizer)
        model.config.id2label = dict(enumerate(names))
        return given.given("teacher", (model, tokenizer), None, 32)

    plain, named = named_by(["LABEL_0", "LABEL_1", "LABEL_2"]), named_by(["Colour", "Animal", "Thing"])
    assert given.label_names([plain, named], plain, None, LABELS) == ["Colour", "Animal", "Thing"]
    assert given.label_names([plain], plain, None, LABELS) == LABELS
    assert given.label_names([plain], named_by(["0", "1", "2"]), None, []) == plain.labels
    assert given.label_names([plain], plain, LABELS, ["x", "y", "z"]) == LABELS


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "pyarrow", "numpy", "llmkd.one_call")
    code = f"import llmkd, sys; assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        llmkd.distil  # noqa: B018
