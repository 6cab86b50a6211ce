"""Folds and views: which rows a model is trained on, judged on, and taught about."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from llmkd import crossfit, logits
from llmkd.crossfit import Fit, fit_fold, fit_in_turn, learning_rows, teacher_logits, view_rows
from llmkd.errors import CacheError
from llmkd.methods.cached import Cached
from llmkd.objective import HARD

COUNT = 3


def rows(count: int = COUNT, stems: int = 9, test: int = 3) -> pa.Table:
    """Stems in both orders, folds in turn, then test rows."""
    names = [f"r{i}" for i in range(stems + test)]
    part = ["train"] * stems + ["test"] * test
    fold = [i % count if count > 1 else -1 for i in range(stems)] + [-1] * test
    data: dict[str, list[Any]] = {"id": [], "stem": [], "swapped": [], "part": [], "fold": [], "label": []}
    for swapped in (False, True):
        data["id"] += [name + "#swapped" * swapped for name in names]
        data["stem"] += names
        data["swapped"] += [swapped] * len(names)
        data["part"] += part
        data["fold"] += fold
        data["label"] += [i % 3 for i in range(len(names))]
    table = pa.table(data)
    return table.set_column(4, "fold", table["fold"].cast(pa.int16()))


def cached(table: pa.Table, root: Path, count: int, name: str, offset: float = 0) -> Callable[[int], Path]:
    """A teacher's folds on disk; a logit tells the fold that gave it, the view and the row."""
    ids = np.asarray(table["id"].to_pylist(), dtype=object)
    for fold in range(count):
        views = {}
        for number, (view, at) in enumerate(view_rows(table, fold, count).items()):
            if len(at):
                found = np.stack([np.full(len(at), fold + offset), np.full(len(at), number), at], -1)
                views[view] = (list(ids[at]), found.astype(np.float32))
        directory = root / name / f"fold{fold}"
        directory.mkdir(parents=True)
        logits.write(directory / "logits.parquet", views, teacher=name, labels=tiny.LABELS)
    return lambda fold: root / name / f"fold{fold}"


def test_views_part_the_rows_and_keep_both_orders_together() -> None:
    table = rows()
    stems = np.asarray(table["stem"].to_pylist())
    for fold in range(COUNT):
        views = view_rows(table, fold, COUNT)
        assert sorted(np.concatenate(list(views.values()))) == list(range(len(table)))
        assert [len(views[name]) for name in ("oof", "in_sample", "test", "transfer")] == [6, 12, 6, 0]
        assert not set(stems[views["oof"]]) & set(stems[views["in_sample"]])
        assert set(table["fold"].to_numpy()[views["oof"]]) == {fold}


def test_with_one_fold_every_training_row_is_in_sample() -> None:
    views = view_rows(rows(1), 0, 1)
    assert [len(views[name]) for name in ("oof", "in_sample", "test")] == [0, 18, 6]


@pytest.mark.parametrize("count", [2, 3])
def test_in_sample_a_fold_reads_its_own_teacher_on_what_it_trains_on(count: int, tmp_path: Path) -> None:
    table = rows(count, stems=12)
    where = {name: cached(table, tmp_path, count, name, i * 10) for i, name in enumerate(("x", "y"))}
    for fold in range(count):
        found = teacher_logits(table, where, fold, count=count, view="in_sample", labels=tiny.LABELS)
        at = view_rows(table, fold, count)["in_sample"]
        assert found.shape == (len(table), 2, 3)
        np.testing.assert_array_equal(found[at, 0], np.stack([0 * at + fold, 0 * at + 1, at], -1))
        np.testing.assert_array_equal(found[at, 1, 0], 0 * at + fold + 10)
        assert not np.delete(found, at, axis=0).any()


@pytest.mark.parametrize("count", [2, 3])
def test_out_of_fold_no_row_is_taught_by_a_teacher_that_saw_it(count: int, tmp_path: Path) -> None:
    table = rows(count, stems=12)
    where = {"x": cached(table, tmp_path, count, "x")}
    own = table["fold"].to_numpy()
    for fold in range(count):
        found = teacher_logits(table, where, fold, count=count, view="oof", labels=tiny.LABELS)[:, 0]
        at = view_rows(table, fold, count)["in_sample"]
        # the teacher of fold k is trained on all rows but those of fold k: row's fold == teacher's fold
        np.testing.assert_array_equal(found[at], np.stack([own[at], 0 * at, at], -1))
        assert not np.delete(found, at, axis=0).any()


def test_with_one_fold_the_only_teacher_is_read(tmp_path: Path) -> None:
    table = rows(1)
    where = {"x": cached(table, tmp_path, 1, "x")}
    found = teacher_logits(table, where, 0, count=1, view="in_sample", labels=tiny.LABELS)
    np.testing.assert_array_equal(found[view_rows(table, 0, 1)["in_sample"], 0, 1], 1)


def shuffled_folds(table: pa.Table) -> pa.Table:
    return table.set_column(4, "fold", pa.array(np.roll(table["fold"].to_numpy(), 1), pa.int16()))


@pytest.mark.parametrize(
    ("other", "view", "message"),
    [
        (rows(stems=12), "in_sample", "no in_sample logits for"),
        (rows(stems=6), "in_sample", "rows that are not this run's"),
        (shuffled_folds(rows()), "in_sample", "no in_sample logits for"),
        (shuffled_folds(rows()), "oof", "no oof logits for"),
    ],
)
def test_a_cache_of_other_rows_is_refused(other: pa.Table, view: str, message: str, tmp_path: Path) -> None:
    where = {"x": cached(rows(), tmp_path, COUNT, "x")}
    with pytest.raises(CacheError, match=message) as error:
        teacher_logits(other, where, 0, count=COUNT, view=view, labels=tiny.LABELS)
    assert "run stage 02 anew" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cache_of_other_labels_is_refused(tmp_path: Path) -> None:
    where = {"x": cached(rows(), tmp_path, COUNT, "x")}
    with pytest.raises(CacheError, match="labels"):
        teacher_logits(rows(), where, 0, count=COUNT, view="oof", labels=["b", "a", "tie"])


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `fit` was asked for; the training itself runs."""
    from llmkd import train

    seen: list[dict[str, Any]] = []
    fit = train.fit

    def spy(method: Any, examples: Any, rows: Any, training: Any, **more: Any) -> Any:
        seen.append({"train": set(rows), "dev": None if more["dev"] is None else set(more["dev"])})
        return fit(method, examples, rows, training, **more)

    monkeypatch.setattr(train, "fit", spy)
    return seen


def fit_of(
    model: Any,
    table: pa.Table,
    fold: int,
    directory: Path,
    *,
    examples: Any = None,
    objective: Any = HARD,
    count: int = COUNT,
    parts: tuple[str, ...] = ("train",),
    **training: Any,
) -> Fit:
    soft = bool(objective.teachers)
    rows = learning_rows(table, fold, count, parts, soft=soft)
    asked = tiny.training(directory, **{"learning_rate": 1e-2, **training})
    batching = {"batch_rows": 4, "batch_tokens": 64, "evaluations": 1}
    examples = tiny.examples(len(table)) if examples is None else examples
    return Fit(Cached(model, objective), objective, examples, rows, asked, batching)


def folded(
    table: pa.Table, fold: int, directory: Path, count: int = COUNT, views: Any = None, **more: Any
) -> tuple[Any, ...]:
    from llmkd.models.lora import add_lora, trainable_state

    model = more.pop("model", None) or add_lora(tiny.classifier(), r=2, alpha=4)
    directory.mkdir()
    fits = [fit_of(model, table, fold, directory, count=count, **more)]
    found = fit_fold(
        model,
        more.pop("start", None) or trainable_state(model),
        fits,
        table,
        fold,
        directory,
        count=count,
        views=views or ["oof", "in_sample", "test"],
        name="x",
        labels=tiny.LABELS,
        precision="fp32",
    )
    return model, found


def test_a_fold_trains_on_the_others_and_is_judged_on_its_own(
    tmp_path: Path, spied: list[dict[str, Any]]
) -> None:
    table = rows()
    _, (metrics, counts) = folded(table, 1, tmp_path / "fold1")
    views = view_rows(table, 1, COUNT)
    assert spied[0]["train"] == set(views["in_sample"])
    assert spied[0]["dev"] == {row for row in views["oof"] if row < 12}, "in their given order only"
    assert counts == {"train": 12, "oof": 6, "in_sample": 12, "test": 6}
    assert metrics["best"] == min(entry["dev_log_loss"] for entry in metrics["dev"])
    assert 0 <= metrics["inference_padding_share"] < 1


def test_a_fold_leaves_its_adapter_and_the_logits_it_gives(tmp_path: Path) -> None:
    from peft import PeftModel

    from llmkd.train import predict

    table, examples = rows(), tiny.examples(24)
    _, _ = folded(table, 1, tmp_path / "fold1", examples=examples)
    loaded = PeftModel.from_pretrained(tiny.classifier(), tmp_path / "fold1" / "adapter")
    for view, at in view_rows(table, 1, COUNT).items():
        if view == "transfer":  # there are none
            continue
        ids = [examples.ids[row] for row in at]
        found = logits.read(tmp_path / "fold1" / "logits.parquet", view, ids, labels=tiny.LABELS)
        np.testing.assert_allclose(found, predict(loaded, examples, at, 64), atol=1e-5)


def test_a_fold_starts_where_every_fold_starts(tmp_path: Path) -> None:
    """The model before carries nothing over into the next fold."""
    from llmkd.models.lora import add_lora, trainable_state

    table, losses = rows(), []
    model = add_lora(tiny.classifier(), r=2, alpha=4)
    start = trainable_state(model)
    for fold, name in ((0, "a"), (1, "b"), (0, "c")):
        (tmp_path / name).mkdir()
        metrics, _ = fit_fold(
            model,
            start,
            [fit_of(model, table, fold, tmp_path)],
            table,
            fold,
            tmp_path / name,
            count=COUNT,
            views=["test"],
            name="x",
            labels=tiny.LABELS,
            precision="fp32",
        )
        losses.append([entry["loss"] for entry in metrics["loss"]])
    assert losses[0] == losses[2] != losses[1]
    tables = [pq.read_table(tmp_path / name / "logits.parquet") for name in "ac"]
    assert tables[0].equals(tables[1])


def test_one_fold_is_trained_on_everything_and_judged_on_nothing(
    tmp_path: Path, spied: list[dict[str, Any]]
) -> None:
    _, (metrics, counts) = folded(rows(1), 0, tmp_path / "fold0", count=1)
    assert (len(spied[0]["train"]), spied[0]["dev"]) == (18, None)
    assert (metrics["best"], counts) == (None, {"train": 18, "in_sample": 18, "test": 6})


@pytest.mark.parametrize("teachers", [True, False])
def test_rows_without_a_label_teach_only_where_there_are_teachers(
    teachers: bool, tmp_path: Path, spied: list[dict[str, Any]]
) -> None:
    from llmkd.objective import Objective

    table = rows()
    labels = np.where(np.arange(24) % 2, table["label"].to_numpy(), -1)
    table = table.set_column(5, "label", pa.array(labels))
    examples, objective = replace(tiny.examples(24), labels=labels.astype(np.int64)), HARD
    if teachers:
        examples = examples.with_teachers(np.zeros((24, 1, 3), dtype=np.float32))
        objective = Objective({"ce": 1, "kl": 1}, ["x"], [1], [1])
    folded(table, 0, tmp_path / "fold0", examples=examples, objective=objective, views=["oof"])
    assert len(spied[0]["train"]) == (12 if teachers else 6)
    assert (examples.labels[list(spied[0]["dev"])] == -1).any(), "the fold has rows that cannot judge it"


def with_transfer(table: pa.Table) -> pa.Table:
    """The test rows stand in for a third part without labels."""
    part = np.where(table["part"].to_numpy() == "test", "transfer", table["part"].to_numpy())
    return table.set_column(table.column_names.index("part"), "part", pa.array(part))


def test_unlabelled_rows_teach_by_soft_labels_alone(tmp_path: Path) -> None:
    table = with_transfer(rows())
    assert len(learning_rows(table, 0, COUNT, ["train", "transfer"], soft=True)) == 12 + 6
    assert len(learning_rows(table, 0, COUNT, ["train", "transfer"], soft=False)) == 12
    labels = crossfit.training_labels(table)
    assert set(labels[table["part"].to_numpy() == "transfer"]) == {-1}
    assert (labels[table["part"].to_numpy() == "train"] == table["label"].to_numpy()[labels >= 0]).all()


@pytest.mark.parametrize(("view", "folds"), [("in_sample", [1]), ("oof", [0, 2])])
def test_of_rows_that_no_teacher_saw_the_mean_of_the_view_s_teachers_is_read(
    view: str, folds: list[int], tmp_path: Path
) -> None:
    from scipy.special import softmax

    table = with_transfer(rows())
    where = {"x": cached(table, tmp_path, COUNT, "x")}
    parts = ["train", "transfer"]
    found = teacher_logits(table, where, 1, count=COUNT, view=view, labels=tiny.LABELS, parts=parts)
    at = view_rows(table, 1, COUNT)["transfer"]
    expected = [softmax(np.stack([0 * at + fold, 0 * at + 3, at], -1), axis=-1) for fold in folds]
    np.testing.assert_allclose(softmax(found[at, 0], axis=-1), np.mean(expected, axis=0), atol=1e-6)


def test_fits_in_turn_go_on_from_one_another_and_the_best_of_all_is_kept(tmp_path: Path) -> None:
    from llmkd.models.lora import trainable_state

    table, model = rows(), tiny.classifier()
    first, ruinous = (
        fit_of(model, table, 0, tmp_path),
        fit_of(model, table, 0, tmp_path, learning_rate=5.0),
    )
    dev = np.flatnonzero(table["fold"].to_numpy() == 0)
    alone = fit_in_turn([first], dev)
    state = trainable_state(first.method)
    again = fit_in_turn([replace(first, rows=first.rows[:1], training=first.training), ruinous], dev)
    assert [len(again["phases"]), again["steps"]] == [2, 1 + alone["steps"]]
    assert again["best"] == min(history["best"] for history in again["phases"])
    assert again["phases"][1]["best"] > again["best"], "the second fit ruins the model"
    kept = trainable_state(ruinous.method)
    assert kept.keys() == state.keys()
    from llmkd.train import dev_log_loss

    assert dev_log_loss(model, first.examples, dev, 64, "fp32") == pytest.approx(again["best"], abs=1e-6)


def test_text_becomes_examples_in_the_tokenizer_s_own_tokens() -> None:
    table = pa.table(
        {
            "id": ["x", "y", "z"],
            "part": ["train", "train", "test"],
            "label": pa.array([0, -1, 1], pa.int32()),
            "text": ["some words to learn", "and " * 60, "a test row's label is not to be seen"],
        }
    )
    tokenizer = tiny.tokenizer()
    found = crossfit.text_examples(table, tokenizer, "classification", template="{text}", max_tokens=12)
    assert list(found.ids) == ["x", "y", "z"]
    assert found.labels.tolist() == [0, -1, -1]
    assert found.lengths.max() <= 12
    ids = found.inputs(np.array([0]))["input_ids"][0].tolist()
    assert ids == tokenizer("some words to learn")["input_ids"]
