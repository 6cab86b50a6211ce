"""From a prepared table to the inputs of a net, with a spec that saw training rows only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import norm

from llmkd import features
from llmkd.errors import DataError, ModelError

FEATURES: dict[str, Any] = {
    "numeric": ["age", "gain"],
    "categorical": ["job"],
    "steps": {"bill": ["bill1", "bill2"], "paid": ["paid1", "paid2"]},
}


def clients(count: int = 500, seed: int = 0) -> pa.Table:
    random = np.random.default_rng(seed)
    numbers = {name: random.lognormal(0, 2, count) for name in ("age", "bill1", "bill2", "paid1", "paid2")}
    gain = np.where(random.random(count) < 0.7, 0.0, random.lognormal(5, 1, count))
    missing = random.random(count) < 0.1
    jobs = random.choice(["clerk", "baker", ""], count)
    return pa.table({**numbers, "gain": pa.array(gain, mask=missing), "job": jobs})


def examples(table: pa.Table, spec: features.Spec, **more: Any) -> Any:
    labels = np.zeros(table.num_rows, dtype=np.int64)
    return features.examples(table, spec, [f"row{i}" for i in range(table.num_rows)], labels, **more)


def inputs(table: pa.Table, spec: features.Spec) -> dict[str, torch.Tensor]:
    return dict(examples(table, spec).inputs(np.arange(table.num_rows)))


def test_inputs_have_the_sizes_that_the_spec_tells() -> None:
    table = clients()
    spec = features.fit(table, FEATURES)
    assert features.sizes(spec) == {"numbers": 3, "categories": [3], "steps": 2, "series": 2}
    found = inputs(table, spec)
    assert {name: (tuple(each.shape), each.dtype) for name, each in found.items()} == {
        "numbers": ((500, 3), torch.float32),
        "categories": ((500, 1), torch.int64),
        "steps": ((500, 2, 2), torch.float32),
    }
    some = examples(table, spec)
    chosen = some.inputs(np.array([7, 3]))
    assert all(torch.equal(chosen[name], found[name][[7, 3]]) for name in found)
    assert some.lengths.tolist() == [1] * 500 == some.weights.tolist()
    assert some.augment is None
    only = features.fit(table, {"categorical": ["job"]})
    assert list(inputs(table, only)) == ["categories"]


def test_numbers_become_normal_scores_of_their_rank() -> None:
    values = np.random.default_rng(1).permutation(np.exp(np.arange(100) / 5))
    table = pa.table({"x": values})
    found = inputs(table, features.fit(table, {"numeric": ["x"]}))["numbers"][:, 0].numpy()
    expected = norm.ppf((np.argsort(np.argsort(values)) + 0.5) / 100)  # every value is a knot
    np.testing.assert_allclose(found, expected, atol=1e-6)
    many = clients(5000)
    scores = inputs(many, features.fit(many, FEATURES))["numbers"][:, 0]
    assert abs(float(scores.mean())) < 0.01
    assert abs(float(scores.std()) - 1) < 0.02


def test_equal_values_share_a_score_and_outliers_meet_the_last_knot() -> None:
    spec = features.fit(pa.table({"x": [0.0, 0.0, 0.0, 1.0]}), {"numeric": ["x"]})
    expected = norm.ppf([1.5 / 4, 3.5 / 4])
    found = inputs(pa.table({"x": [-9.0, 0.0, 0.5, 1.0, 1e9]}), spec)["numbers"][:, 0].numpy()
    low, high = expected
    np.testing.assert_allclose(found, [low, low, (low + high) / 2, high, high], rtol=1e-6)


def test_a_missing_number_is_zero_and_flagged_where_training_rows_lacked_some() -> None:
    spec = features.fit(pa.table({"x": [1.0, None, 3.0], "y": [1.0, 2.0, 3.0]}), {"numeric": ["x", "y"]})
    found = inputs(pa.table({"x": [None, 2.0], "y": [2.0, None]}), spec)["numbers"]
    assert found.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    empty = pa.table({"x": pa.nulls(3, pa.float64())})
    assert inputs(empty, features.fit(empty, {"numeric": ["x"]}))["numbers"].tolist() == [[0.0, 1.0]] * 3


def test_a_series_has_one_scale_over_its_steps() -> None:
    table = pa.table({"a": [1.0, 2.0], "b": [3.0, None]})
    found = inputs(table, features.fit(table, {"steps": {"s": ["a", "b"]}}))["steps"]
    scores = norm.ppf(np.array([0.5, 1.5, 2.5]) / 3)
    np.testing.assert_allclose(found[..., 0], [[scores[0], scores[2]], [scores[1], 0]], atol=1e-6)
    assert found[..., 1].tolist() == [[0, 0], [0, 1]]


def test_unknown_and_missing_categories_are_number_zero() -> None:
    spec = features.fit(pa.table({"job": ["clerk", "", "baker", "clerk"]}), {"categorical": ["job"]})
    found = inputs(pa.table({"job": ["baker", "clerk", "", "pilot"]}), spec)["categories"]
    assert found[:, 0].tolist() == [1, 2, 0, 0]


def test_the_spec_comes_back_from_disk(tmp_path: Path) -> None:
    table = clients()
    for spec in (features.fit(table, FEATURES), features.fit(table, image={"shape": [28, 28]})):
        features.save(spec, tmp_path)
        assert features.load(tmp_path) == spec
    assert features.sizes(spec) == {"pixels": 784}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no features.json"),
        ("{", "is not JSON"),
        ("[1]", "is of kind None, not tabular or image"),
        (json.dumps({"kind": "sound"}), "is of kind 'sound'"),
        (json.dumps({"kind": "image", "column": "image"}), "lacks 'shape'"),
    ],
)
def test_a_damaged_spec_is_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "features.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        features.load(tmp_path)


def test_a_column_that_the_rows_lack_is_named() -> None:
    table = clients()
    with pytest.raises(DataError, match=r"the rows lack column 'bill2'"):
        examples(table.drop_columns(["bill2"]), features.fit(table, FEATURES))
    with pytest.raises(DataError, match=r"the rows lack column 'image'"):
        examples(table, features.fit(table, image={"shape": [28, 28]}))


def pictures(count: int) -> tuple[pa.Table, np.ndarray[Any, Any]]:
    pixels = np.random.default_rng(0).integers(1, 256, (count, 5, 4), dtype=np.uint8)
    return pa.table({"image": [image.tobytes() for image in pixels]}), pixels


def test_images_are_shares_of_white() -> None:
    table, pixels = pictures(6)
    spec = features.fit(table, image={"column": "image", "shape": [5, 4]})
    found = examples(table, spec).inputs(np.array([4, 1]))["pixels"]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, pixels[[4, 1]] / 255, rtol=1e-6)


def test_a_shift_moves_each_image_of_a_training_batch_as_a_whole() -> None:
    table, pixels = pictures(400)
    spec = features.fit(table, image={"shape": [5, 4]})
    some = examples(table, spec, shift=1)
    given = some.inputs(np.arange(400))["pixels"]
    np.testing.assert_allclose(given, pixels / 255, rtol=1e-6)
    assert some.augment is not None
    torch.manual_seed(3)
    moved = some.augment({"pixels": given})["pixels"]
    seen = set()
    for image, other in zip(given, moved, strict=True):
        padded = torch.zeros(7, 6)
        padded[1:6, 1:5] = image
        fits = [
            (y, x) for y in range(3) for x in range(3) if torch.equal(padded[y : y + 5, x : x + 4], other)
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) == 9  # every direction, the middle too
    torch.manual_seed(3)
    assert torch.equal(some.augment({"pixels": given})["pixels"], moved)
    assert some.copies is None


def test_copies_are_the_images_moved_by_each_shift_once() -> None:
    table, pixels = pictures(3)
    some = examples(table, features.fit(table, image={"shape": [5, 4]}), average_shifts=2)
    assert some.augment is None
    assert some.copies is not None
    found = [copy["pixels"] for copy in some.copies(some.inputs(np.arange(3)))]
    padded = np.zeros((3, 9, 8))
    padded[:, 2:7, 2:6] = pixels / 255
    expected = [padded[:, y : y + 5, x : x + 4] for y in range(5) for x in range(5)]
    np.testing.assert_allclose(torch.stack(found), np.stack(expected), rtol=1e-6)
    torch.testing.assert_close(found[12], some.inputs(np.arange(3))["pixels"])  # the middle: unmoved
