"""What a tokenizer is to texts, for rows of numbers, categories, time steps or pixels: the inputs of a net.

The spec is fitted on training rows only and lies beside the model as features.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from llmkd.batches import Examples, Rows
from llmkd.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

FILE = "features.json"
KNOTS = 256  # values of a column that its scale keeps, by rank and as many among the distinct ones
KEYS = {"tabular": ("numeric", "categorical", "steps"), "image": ("column", "shape")}
Spec = dict[str, Any]
Floats = NDArray[np.float64]


def fit(
    table: pa.Table,
    features: Mapping[str, Any] | None = None,
    image: Mapping[str, Any] | None = None,
) -> Spec:
    """The spec of a task's `features` or `image`, from training rows alone; it is plain JSON.

    A number gets a scale (see `_scale`) and, where a training row lacks it, an indicator; the series of
    `steps` one scale over all their steps; a category its sorted values, the first of which is number 1.
    """
    if image is not None:
        return {"kind": "image", "column": image.get("column", "image"), "shape": list(image["shape"])}
    features = features or {}
    return {
        "kind": "tabular",
        "numeric": {name: _scale(_values(table, [name])) for name in features.get("numeric", ())},
        "categorical": {name: _vocabulary(table[name]) for name in features.get("categorical", ())},
        "steps": {
            series: {"columns": list(names), **_scale(_values(table, names))}
            for series, names in features.get("steps", {}).items()
        },
    }


def save(spec: Spec, directory: Path) -> None:
    """Write the spec as features.json into a model's directory."""
    (directory / FILE).write_text(json.dumps(spec, indent=1), encoding="utf-8")


def load(directory: Path) -> Spec:
    """The spec of a model directory. Raises ModelError where it is missing or damaged."""
    path = directory / FILE
    if not path.is_file():
        raise ModelError(f"{directory} has no {FILE}; copy the whole directory, or train the model again")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); train the model again") from error
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind not in KEYS:
        raise ModelError(f"{path} is of kind {kind!r}, not {' or '.join(KEYS)}; train the model again")
    lacks = [key for key in KEYS[kind] if key not in spec]
    if lacks:
        raise ModelError(f"{path} lacks {lacks[0]!r}; train the model again")
    return dict(spec)


def sizes(spec: Spec) -> dict[str, Any]:
    """What a net must know of its inputs, by the names that the configs of `llmkd.models.nets` use."""
    if spec["kind"] == "image":
        return {"pixels": int(np.prod(spec["shape"]))}
    steps = spec["steps"].values()
    return {
        "numbers": sum(1 + scale["missing"] for scale in spec["numeric"].values()),
        "categories": [1 + len(values) for values in spec["categorical"].values()],
        "steps": max((len(scale["columns"]) for scale in steps), default=0),
        "series": sum(1 + scale["missing"] for scale in steps),
    }


def examples(
    table: pa.Table,
    spec: Spec,
    ids: Sequence[str],
    labels: NDArray[np.int64],
    *,
    shift: int = 0,
    average_shifts: int = 0,
) -> Examples:
    """Rows as the inputs of a net; a row counts as one token.

    Inputs of a batch: numbers (B, F) float32, categories (B, K) int64 and steps (B, S, D) float32, those
    that the spec has; or pixels (B, H, W) float32 in [0, 1]. With `shift`, images of a training batch
    are moved at random by up to so many pixels along both axes (torch's global generator). With
    `average_shifts`, logits at inference are averaged over all shifts by up to so many pixels.
    Raises DataError where the table lacks a column of the spec.
    """
    _check_columns(table, spec)
    inputs = _pixels(table, spec) if spec["kind"] == "image" else _columns(table, spec)
    augment = (lambda batch: {**batch, "pixels": shifted(batch["pixels"], shift)}) if shift else None
    copies = (lambda batch: every_shift(batch, average_shifts)) if average_shifts else None
    lengths, weights = np.ones(len(ids), dtype=np.int64), np.ones(len(ids))
    return Examples(ids, lengths, labels, weights, inputs, augment=augment, copies=copies)


def shifted(pixels: Tensor, most: int) -> Tensor:
    """Each image moved by -most to most pixels along both axes, zeros moved in. (B, H, W) -> (B, H, W)"""
    import torch

    count, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, (most,) * 4)
    down, right = torch.randint(0, 2 * most + 1, (2, count, 1), device=pixels.device)  # (B, 1) each
    rows = down + torch.arange(height, device=pixels.device)  # (B, H)
    columns = right + torch.arange(width, device=pixels.device)  # (B, W)
    places = torch.arange(count, device=pixels.device)[:, None, None]
    return padded[places, rows[:, :, None], columns[:, None, :]]


def every_shift(batch: dict[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """The batch, its images (B, H, W) all moved by each of the (2 most + 1)² shifts that `shifted` draws."""
    import torch

    height, width = batch["pixels"].shape[1:]
    padded = torch.nn.functional.pad(batch["pixels"], (most,) * 4)
    for down, right in product(range(2 * most + 1), repeat=2):
        yield {**batch, "pixels": padded[:, down : down + height, right : right + width]}


def _pixels(table: pa.Table, spec: Spec) -> Callable[[Rows], dict[str, Tensor]]:
    import torch

    column = table[spec["column"]].combine_chunks()
    images = np.frombuffer(b"".join(column.to_pylist()), dtype=np.uint8)
    images = images.reshape(table.num_rows, *spec["shape"])  # (N, H, W)
    return lambda rows: {"pixels": torch.from_numpy(images[rows].astype(np.float32) / 255)}


def _columns(table: pa.Table, spec: Spec) -> Callable[[Rows], dict[str, Tensor]]:
    import torch

    arrays: dict[str, NDArray[Any]] = {}
    if spec["numeric"]:
        parts = [_scaled(_values(table, [name]), scale) for name, scale in spec["numeric"].items()]
        arrays["numbers"] = np.concatenate(parts, axis=2)[:, 0]  # (N, F)
    if spec["categorical"]:
        numbers = [_numbered(table[name], values) for name, values in spec["categorical"].items()]
        arrays["categories"] = np.stack(numbers, axis=1)  # (N, K)
    if spec["steps"]:
        series = [_scaled(_values(table, scale["columns"]), scale) for scale in spec["steps"].values()]
        arrays["steps"] = np.concatenate(series, axis=2)  # (N, S, D)
    return lambda rows: {name: torch.from_numpy(array[rows]) for name, array in arrays.items()}


def _check_columns(table: pa.Table, spec: Spec) -> None:
    if spec["kind"] == "image":
        names = [spec["column"]]
    else:
        steps = [name for scale in spec["steps"].values() for name in scale["columns"]]
        names = [*spec["numeric"], *spec["categorical"], *steps]
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise DataError(f"the rows lack column {missing[0]!r} that the model was trained on; add it")


def _values(table: pa.Table, names: Sequence[str]) -> Floats:
    """Numbers (N, S), NaN where one is missing."""
    columns = [pc.fill_null(table[name].cast(pa.float64()), np.nan).to_numpy() for name in names]
    return np.stack(columns, axis=1)


def _scale(values: Floats) -> dict[str, Any]:
    """From raw values (N, S) to the knots of a map onto a standard normal, and whether some are missing.

    A knot is a training value (some of them, evenly by rank and among the distinct ones, where they are many)
    and the normal quantile of its mid-rank; between knots the map is linear, beyond them constant. Nets
    need it on the heavy tails of tabular data (Gorishniy et al. 2021, arXiv 2106.11959, section 4.2).
    """
    from scipy.stats import norm

    known = np.sort(values[~np.isnan(values)])
    knots = np.unique(np.concatenate([_evenly(known), _evenly(np.unique(known))]))
    ranks = (np.searchsorted(known, knots) + np.searchsorted(known, knots, "right")) / 2
    scores = norm.ppf(ranks / max(len(known), 1))
    return {"knots": knots.tolist(), "scores": scores.tolist(), "missing": bool(len(known) < values.size)}


def _evenly(values: Floats) -> Floats:
    """At most KNOTS of sorted values, the first and the last among them."""
    return values[np.linspace(0, len(values) - 1, min(KNOTS, len(values))).round().astype(int)]


def _scaled(values: Floats, scale: Mapping[str, Any]) -> NDArray[np.float32]:
    """Raw (N, S) to normal scores (N, S, 1), 0 where missing; a second channel says where, if training rows
    lacked some: (N, S, 2)."""
    missing = np.isnan(values)
    knots, scores = scale["knots"] or [0.0], scale["scores"] or [0.0]
    found = np.where(missing, 0.0, np.interp(values, knots, scores))
    channels = [found, missing] if scale["missing"] else [found]
    return np.stack(channels, axis=-1).astype(np.float32)


def _vocabulary(column: pa.ChunkedArray) -> list[str]:
    return sorted(value for value in pc.unique(column).to_pylist() if value)


def _numbered(column: pa.ChunkedArray, values: Sequence[str]) -> NDArray[np.int64]:
    """Numbers of categories from 1; 0 for one that is missing or was in no training row."""
    places = pc.fill_null(pc.index_in(column, value_set=pa.array(values, pa.string())), -1)
    return np.asarray(places.to_numpy(), dtype=np.int64) + 1
