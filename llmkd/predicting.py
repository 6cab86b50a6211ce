"""A finished classifier over a file of raw rows: predictions, or scores where the rows have labels.

The directory says how its rows are read (`llmkd.description`). Files are read and written a chunk at a
time, so memory does not grow with them; of rows that are scored their probabilities are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from llmkd import canonical, description, features, streams, tasks
from llmkd.errors import DataError
from llmkd.evaluate import Probabilities, both_orders, scores, softmax
from llmkd.tasks import preference

Forecast = Callable[[pa.Table], Probabilities]


class Chunk(NamedTuple):
    """Some rows as the model reads them, less those that have nothing to be read."""

    ids: pa.Array  # (N,) of the source, or row numbers from 0
    labels: NDArray[np.int64]  # (N,), -1 = none
    blank: NDArray[np.bool_]  # (N,)
    rows: pa.Table  # those that are not blank


def predict_file(
    artifact: Path,
    source: str,
    output: Path,
    *,
    tta: str | None = None,
    calibrated: bool = True,
    batch_tokens: int = 16384,
    precision: str = "fp32",
    columns: Mapping[str, str] | None = None,
    max_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write id, prediction and p_<label> of every row of `source` to `output`, all at once when it is whole.

    Args:
        artifact: a classifier's directory, this package's or any of transformers.
        source: a path or a glob of .csv, .jsonl or .parquet files; no labels are needed.
        output: .parquet, .csv or .jsonl. A row without content has no prediction: its fields are null.
        tta: "swap" averages the probabilities of both orders of a pair, "none" reads the given one; by
            default what the artifact says.
        calibrated: divide logits by the artifact's temperature, where it has one.
        batch_tokens: tokens of one forward, padding included.
        precision: fp32 or bf16.
        columns: task field -> column, where they are not called what the artifact says; also `id`.
        max_tokens: a row's budget, by default the one the artifact was trained with.
        trust_remote_code: whether Python code that lies in the artifact may be run.

    An id is the column `id` (or what the artifact's task calls it) where there is one, else the row's number
    from 0; ids may repeat. Returns rows, empty (rows without content), seconds and rows_per_second (the
    model's loading left out), tta, temperature and output. Raises an LlmkdError of one line.
    """
    said = description.asked(artifact, tta, calibrated, columns, max_tokens, batch_tokens)
    if Path(source).is_file() and output.exists() and output.samefile(source):
        raise DataError(f"{output} is the source itself: name another file")
    rows, empty = 0, 0
    with streams.writing(output) as write:
        read = _read(artifact, source, said, None)
        forecast = _forecaster(artifact, said, batch_tokens, precision, trust_remote_code)
        began = time.perf_counter()
        for chunk in read:
            write(_table(chunk, _spread(chunk, forecast, len(said["labels"])), said["labels"]))
            rows, empty = rows + len(chunk.ids), empty + int(chunk.blank.sum())
    return {**_facts(said, rows, empty, began), "output": str(output)}


def evaluate_file(
    artifact: Path,
    source: str,
    *,
    label: str | None = None,
    tta: str | None = None,
    calibrated: bool = True,
    batch_tokens: int = 16384,
    precision: str = "fp32",
    columns: Mapping[str, str] | None = None,
    max_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`llmkd.evaluate.scores` on a labelled file, and the facts that `predict_file` returns.

    label: the column of labels (names or numbers, -1 = unknown), by default what the artifact's task calls
    it. "rows" counts the labelled ones that have content; "read" and "empty" count those read and those
    without any.
    """
    said = description.asked(artifact, tta, calibrated, columns, max_tokens, batch_tokens)
    p, labels, empty = list[Probabilities](), list[NDArray[np.int64]](), 0
    read = _read(artifact, source, said, label or said["label"] or "label")
    forecast = _forecaster(artifact, said, batch_tokens, precision, trust_remote_code)
    began = time.perf_counter()
    for chunk in read:
        p.append(_spread(chunk, forecast, len(said["labels"])))
        labels.append(np.where(chunk.blank, -1, chunk.labels))
        empty += int(chunk.blank.sum())
    found = scores(np.concatenate(p), np.concatenate(labels))
    if not found["rows"]:
        raise DataError(f"{source}: no row has both a label and content, so nothing can be scored")
    facts = _facts(said, sum(map(len, labels)), empty, began)
    return {**found, "read": facts.pop("rows"), **facts}


def _spec(artifact: Path) -> features.Spec | None:
    """The features of one of the package's nets; None for a model that reads text."""
    return features.load(artifact) if (artifact / features.FILE).is_file() else None


def _inputs(spec: features.Spec) -> dict[str, Any]:
    """A spec's columns as `task.features` or `task.image` names them."""
    if spec["kind"] == "image":
        return {"column": spec["column"], "shape": spec["shape"]}
    steps = {series: scale["columns"] for series, scale in spec["steps"].items()}
    return {"numeric": list(spec["numeric"]), "categorical": list(spec["categorical"]), "steps": steps}


def _read(
    artifact: Path, source: str, said: Mapping[str, Any], label: str | Sequence[str] | None
) -> Iterator[Chunk]:
    """The chunks of a source; the first is read at once, so that a wrong source costs no model's loading."""
    spec = _spec(artifact)
    inputs = _inputs(spec) if spec else None
    id_column, ids = said["columns"].get("id"), set[str | None]()
    needed = dict.fromkeys([id_column] if id_column else [], _remedy("id"))
    named = [label] if isinstance(label, str) else list(label or ())
    needed |= dict.fromkeys(named, "name the labels' column with label=, or --label NAME")
    if inputs:
        plain = tasks.content(said["kind"], inputs)
        needed |= dict.fromkeys(plain, "the model was trained on it, so add it")
    else:
        needed |= {name: _remedy(field) for field, name in _fields(said).items()}

    def choose(names: Sequence[str]) -> list[str]:
        missing = [name for name in needed if name not in names]
        if missing:
            there = ", ".join(names)
            raise DataError(f"{source}: no column {missing[0]!r} among {there}: {needed[missing[0]]}")
        own = [name for name in (said["id"], "id") if name in names and not id_column]
        ids.add(own[0] if own else None)
        if len(ids) > 1:
            raise DataError(
                f"{source}: column {max(filter(None, ids))!r} is not in every file, or begins late in one: "
                "give each row an id, or none"
            )
        return list(dict.fromkeys([*needed, *own[:1]]))

    def chunks() -> Iterator[Chunk]:
        start = 0
        for table in streams.chunks(source, choose):
            yield _chunk(table, source, start, said, inputs, label)
            start += len(table)

    rest = chunks()
    first = next(rest, None)
    if first is None:
        raise DataError(f"{source}: no rows: give a file that has some")
    return chain([first], rest)


def _remedy(field: str) -> str:
    return f"name it with columns={{{field!r}: ...}}, or --column {field}=NAME"


def _fields(said: Mapping[str, Any]) -> dict[str, str]:
    """The columns of the texts, by their fields."""
    return {field: column for field, column in said["columns"].items() if field != "id"}


def _chunk(
    table: pa.Table,
    source: str,
    start: int,
    said: Mapping[str, Any],
    inputs: Mapping[str, Any] | None,
    label: str | Sequence[str] | None,
) -> Chunk:
    task, problems, count = tasks.KINDS[said["kind"]], list[str](), len(table)
    if inputs:
        data = task.read(table, inputs, problems)
        blank = task.blank(data) if not problems else np.zeros(count, dtype=bool)
    else:
        data = {
            field: canonical.plain_texts(
                table[column], field, said["turns"] if field in task.FIELDS else "text", problems
            )
            for field, column in _fields(said).items()
        }
        blank = canonical.blank_rows(data, said["kind"], count)
    numbers = canonical.labels_of(table, label, said["labels"], said["label_values"], problems)
    ids = pa.array(np.arange(start, start + count))
    named = next(
        (name for name in (said["columns"].get("id"), said["id"], "id") if name in table.schema.names), None
    )
    if named and pa.types.is_nested(table[named].type):
        problems.append(f"ids in {named!r} are {table[named].type}, no strings or numbers")
    if problems:
        where = f" (rows are counted from {start})" if start else ""
        raise DataError(f"{source}{where}: {'; '.join(problems)}")
    if named:
        ids = table[named].cast(pa.string()).combine_chunks()
    numbered = pa.array([f"{start + i}" for i in range(count)])  # for an error that names a row without an id
    rows = {"id": pc.coalesce(ids.cast(pa.string()), numbered), "part": pa.array(["test"] * count)}
    whole = pa.table({**rows, "label": pa.array(np.full(count, -1)), **data})
    kept = whole.filter(pa.array(~blank))
    return Chunk(ids, np.asarray(numbers.to_numpy(), dtype=np.int64), blank, kept)


def _forecaster(
    artifact: Path, said: Mapping[str, Any], batch_tokens: int, precision: str, trust: bool
) -> Forecast:
    """The model, loaded: a function from rows to their probabilities (N, C)."""
    import torch

    from llmkd.crossfit import text_examples, training_labels
    from llmkd.models.artifact import load_artifact
    from llmkd.models.load import check_budget
    from llmkd.train import predict

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if precision == "fp32" else None
    model, reader = load_artifact(artifact, device=device, dtype=dtype, trust_remote_code=trust)
    swap, mirror = said["tta"] == "swap", tasks.KINDS[said["kind"]].mirror(len(said["labels"]))
    text = {key: said[key] for key in ("template", "max_tokens", "max_words", "extra")}
    if not isinstance(reader, dict):
        check_budget(model.config, str(artifact), said["max_tokens"])

    def forecast(rows: pa.Table) -> Probabilities:
        if swap:
            rows = pa.concat_tables([rows, _swapped(rows)])
        if isinstance(reader, dict):
            examples = features.examples(rows, reader, rows["id"].to_pylist(), training_labels(rows))
        else:
            examples = text_examples(rows, reader, said["kind"], **text)
        logits = predict(model, examples, np.arange(len(rows)), batch_tokens, precision)
        logits /= said["temperature"] or 1.0
        half = len(rows) // 2
        return both_orders(logits[:half], logits[half:], mirror) if swap else softmax(logits)

    return forecast


def _swapped(rows: pa.Table) -> pa.Table:
    texts = {name: rows[name] for name in rows.column_names if name not in canonical.OWN_COLUMNS}
    columns = {name: rows[name] for name in rows.column_names} | preference.swap(texts)
    return pa.table(columns, schema=rows.schema)


def _spread(chunk: Chunk, forecast: Forecast, classes: int) -> Probabilities:
    """Probabilities of all rows of a chunk, NaN for those without content. (N, C)"""
    p = np.full((len(chunk.ids), classes), np.nan)
    if not chunk.blank.all():
        p[~chunk.blank] = forecast(chunk.rows)
    return p


def _table(chunk: Chunk, p: Probabilities, labels: Sequence[str]) -> pa.Table:
    top = np.where(chunk.blank, 0, p.argmax(-1))
    names = pa.array([labels[i] for i in top], pa.string(), mask=chunk.blank)
    columns = {f"p_{name}": pa.array(p[:, i], mask=chunk.blank) for i, name in enumerate(labels)}
    return pa.table({"id": chunk.ids, "prediction": names, **columns})


def _facts(said: Mapping[str, Any], rows: int, empty: int, began: float) -> dict[str, Any]:
    seconds = time.perf_counter() - began
    facts = {"rows": rows, "empty": empty, "seconds": round(seconds, 3)}
    facts["rows_per_second"] = round(rows / seconds, 1)
    return {**facts, "tta": said["tta"], "temperature": said["temperature"]}
