"""Images through the stages: shifted for all, or for the teacher alone."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from test_ways import all_stages, logged

from llmkd import logits, units
from llmkd.config import load
from llmkd.loading import examples_of, load_base
from llmkd.models.lora import load_trained
from llmkd.settings import text_settings
from llmkd.train import dev_log_loss, predict

NONE = "teachers.big.average_shifts=0"
IMAGES = """
run: {root}/run
precision: fp32
quantize: null
folds: {{count: 1}}
task:
  kind: image
  train: {root}/train.parquet
  test: {root}/test.parquet
  labels: [dark, light]
  image: {{shape: [6, 5]}}
teachers: [{{name: big, NET, learning_rate: 1.0e-2, epochs: 20, batch_rows: 16}}]
student: {{name: small, NET}}
distill:
  terms: {{ce: 0.3, kl: 0.7, cosine: 0}}
  temperature: 20
  normalize: false
  epochs: 20
  learning_rate: 1.0e-2
  batch_rows: 16
""".replace("NET", "init: {{architecture: llmkd-mlp, config: {{hidden_sizes: [8]}}}}")


@pytest.fixture
def image_run(tmp_path: Path) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    for name, rows in (("train", 60), ("test", 20)):
        labels = random.integers(0, 2, rows)
        pixels = random.integers(0, 80, (rows, 6, 5)) + 150 * labels[:, None, None]
        frame = pd.DataFrame({"image": [row.astype(np.uint8).tobytes() for row in pixels], "label": labels})
        frame.to_parquet(tmp_path / f"{name}.parquet")
    path = tmp_path / "image.yaml"
    path.write_text(IMAGES.format(root=tmp_path))
    return path, tmp_path / "run"


def test_images_through_an_mlp(image_run: tuple[Path, Path]) -> None:
    path, directory = image_run
    all_stages(path, "task.image.shift=1")
    found = json.loads((directory / "06_evaluate" / "metrics.json").read_text())
    assert found["merged"]["auc"] == 1
    assert (directory / "04_merge/model/features.json").is_file()


def test_a_teacher_s_own_shift_moves_its_training_images_and_nothing_else(
    image_run: tuple[Path, Path],
) -> None:
    """Neither the student's images nor those of which the cache tells."""
    path, directory = image_run
    all_stages(path, "teachers.big.shift=2")
    config, labels = load(path, ["teachers.big.shift=2"]), ["dark", "light"]
    table = pq.read_table(directory / "00_prepare" / "rows.parquet")
    network, spec = load_base(
        config, config.models[0], str(directory / "01_pretrain/big/model"), labels, "fp32"
    )
    moved, still = (examples_of(config, model, table, spec) for model in config.models)
    assert still.augment is None
    assert moved.augment is not None
    some = moved.inputs(np.arange(60))  # pixels (60, 6, 5)
    assert not torch.equal(moved.augment(some)["pixels"], some["pixels"])
    left = directory / "02_teachers" / "big" / "fold0"
    load_trained(network, left / "adapter")
    seen = np.flatnonzero(table["part"].to_numpy() == "train")
    ids = table["id"].take(seen).to_pylist()
    cached = logits.read(left / "logits.parquet", "in_sample", ids, labels=labels)
    np.testing.assert_allclose(cached, predict(network, still, seen, batch_tokens=64), atol=1e-5)
    assert set(logged(directory, "small")) == {"ce", "kl/big"}


def test_a_teacher_s_cached_logits_are_means_over_shifts(image_run: tuple[Path, Path]) -> None:
    """Those of its test images too, and nobody else's."""
    path, directory = image_run
    asked = ["teachers.big.average_shifts=1"]
    all_stages(path, *asked)
    config, labels = load(path, asked), ["dark", "light"]
    table = pq.read_table(directory / "00_prepare" / "rows.parquet")
    source = str(directory / "01_pretrain/big/model")
    network, spec = load_base(config, config.models[0], source, labels, "fp32")
    left = directory / "02_teachers" / "big" / "fold0"
    load_trained(network, left / "adapter")
    averaged, plain = (examples_of(config, model, table, spec) for model in config.models)
    assert (averaged.augment, plain.augment, plain.copies) == (None, None, None)
    for part, view in (("train", "in_sample"), ("test", "test")):
        rows = np.flatnonzero(table["part"].to_numpy() == part)
        pixels = torch.nn.functional.pad(plain.inputs(rows)["pixels"], (1, 1, 1, 1))  # (N, 8, 7)
        with torch.no_grad():
            each = [
                network(pixels=pixels[:, y : y + 6, x : x + 5]).logits for y in range(3) for x in range(3)
            ]
        ids = table["id"].take(rows).to_pylist()
        cached = logits.read(left / "logits.parquet", view, ids, labels=labels)
        np.testing.assert_allclose(cached, sum(each) / 9, atol=1e-5)
        assert not np.allclose(cached, predict(network, plain, rows, batch_tokens=64), atol=1e-3)


def test_an_average_over_shifts_is_in_its_teacher_s_fingerprint_alone(image_run: tuple[Path, Path]) -> None:
    path, _ = image_run
    plain, averaged = (load(path, [f"teachers.big.average_shifts={most}"]) for most in (0, 1))
    big, small = averaged.models
    assert text_settings(averaged, big) == {"shift": 0, "average_shifts": 1}
    assert text_settings(averaged, small) == text_settings(plain, plain.models[0]) == {"shift": 0}


def test_an_average_over_shifts_makes_the_teacher_anew_and_no_model_to_start_from(
    image_run: tuple[Path, Path],
) -> None:
    """An average over none is not in a fingerprint at all."""
    path, _ = image_run
    assert tiny.stage("00_prepare", config=path) == 0
    assert tiny.stage("01_pretrain", config=path) == 0
    left, plain, averaged = (load(path, words) for words in ([], [NONE], ["teachers.big.average_shifts=1"]))
    marks = [units.pretrained(one, one.models[0]).mark for one in (left, plain, averaged)]
    assert len(set(marks)) == 1
    made = [units.teacher(one, one.teachers[0], 0) for one in (left, plain, averaged)]
    assert made[0].mark == made[1].mark != made[2].mark
    assert "average_shifts" not in json.dumps(made[1].settings)


def test_an_average_over_shifts_changes_no_weight(image_run: tuple[Path, Path]) -> None:
    """Which of a teacher's states is kept is told by development rows as they are."""
    path, _ = image_run
    config, labels = load(path, ["teachers.big.average_shifts=2"]), ["dark", "light"]
    for stage in ("00_prepare", "01_pretrain"):
        assert tiny.stage(stage, config=path) == 0
    table = pq.read_table(Path(config.run) / "00_prepare" / "rows.parquet")
    source = str(Path(config.run) / "01_pretrain/big/model")
    network, spec = load_base(config, config.models[0], source, labels, "fp32")
    averaged, plain = (examples_of(config, model, table, spec) for model in config.models)
    rows = np.arange(40)
    assert averaged.copies is not None
    assert not np.allclose(predict(network, averaged, rows, 64), predict(network, plain, rows, 64), atol=1e-3)
    scores = [dev_log_loss(network, examples, rows, 64, "fp32") for examples in (averaged, plain)]
    assert scores[0] == scores[1]
