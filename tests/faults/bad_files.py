"""Files that hurt. Each function here gives one that writes into a directory, and is told of a finished run;
it returns the path that a config is to name."""

import gzip
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from llmkd import run

TEXTS = """
run: {root}/run
seed: 3
precision: fp32
task: {{kind: causal_lm, train: "{root}/train.jsonl", max_tokens: 32}}
folds: {{count: 1}}
teachers:
  - name: big
    init: &init
      architecture: llama
      config: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}}
student: {{name: small, init: *init}}
distill: {{method: sequence}}
quantize: null
"""
Columns = Mapping[str, Any]
Make = Callable[[Path, Path], Path]
HEADER = "id,prompt,response_a,response_b,label\n"


def table(count: int = 12, **columns: Any) -> dict[str, Any]:
    """Pairs that stage 00 takes as they are; `columns` stand in for theirs, None for one to leave out."""
    found: dict[str, Any] = {
        "id": [f"r{i}" for i in range(count)],
        **{name: [f"{name} {i}" for i in range(count)] for name in ("prompt", "response_a", "response_b")},
        "label": [i % 3 for i in range(count)],
    }
    return {name: values for name, values in {**found, **columns}.items() if values is not None}


def cell(column: str, value: Any, columns: Columns | None = None) -> dict[str, Any]:
    """The table with another value in its row 4."""
    found = dict(columns or table())
    found[column] = [value if row == 4 else old for row, old in enumerate(found[column])]
    return found


def csv_text(columns: Columns) -> str:
    sink = io.BytesIO()
    pyarrow.csv.write_csv(pa.table({name: [*map(str, column)] for name, column in columns.items()}), sink)
    return sink.getvalue().decode()


def json_lines(columns: Columns) -> list[str]:
    return [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def raw(name: str, data: str | bytes) -> Make:
    """A file of exactly these bytes."""

    def make(directory: Path, finished: Path) -> Path:
        path = directory / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return make


def csv(columns: Columns) -> Make:
    return raw("rows.csv", csv_text(columns))


def texts(root: Path, what: str = "some words") -> Path:
    """The config of a run `root`/run over texts, of a teacher whose next tokens are cached."""
    words = [f"row {i} of {what} that are to be read {i * i}" for i in range(40)]
    raw("train.jsonl", "\n".join(json_lines({"text": words})))(root, root)
    config = root / "lm.yaml"
    config.write_text(TEXTS.format(root=root))
    return config


def broken_lines(row: str) -> Make:
    """JSON lines of which the fifth is this."""
    lines = json_lines(table())
    return raw("rows.jsonl", "\n".join([*lines[:4], row, *lines[5:]]))


def parquet(columns: Columns) -> Make:
    return raw("rows.parquet", parquet_bytes(columns))


def parquet_bytes(columns: Columns) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), sink)
    return sink.getvalue()


def directory(name: str) -> Make:
    def make(inside: Path, finished: Path) -> Path:
        (inside / name).mkdir()
        return inside / name

    return make


def zipped(name: str) -> Make:
    return raw(name, gzip.compress(csv_text(table()).encode()))


def unreadable(directory: Path, finished: Path) -> Path:
    path = csv(table())(directory, finished)
    path.chmod(0)
    return path


def said(columns: Columns = {}, **more: Any) -> Make:  # noqa: B006
    """What a teacher that is a file says of all rows of the finished run, with some columns replaced."""

    def make(directory: Path, finished: Path) -> Path:
        rows = pq.read_table(finished / "00_prepare" / "rows.parquet").to_pylist()
        ids = [row["id"] for row in rows if not row["swapped"]]
        found = {"id": ids, "said": ["a"] * len(ids), "all": [[1.0, 2.0, 3.0]] * len(ids)}
        found |= {name: [share] * len(ids) for name, share in (("pa", 0.2), ("pb", 0.3), ("pt", 0.5))}
        for name, value in {**columns, **more}.items():
            found = cell(name, value, found)
        return parquet(found)(directory, finished)

    return make


def model(change: Callable[[Path], Any]) -> Make:
    """A copy of a finished run's Llama, changed."""

    def make(inside: Path, finished: Path) -> Path:
        path = Path(shutil.copytree(finished / "01_pretrain" / "llama" / "model", inside / "model"))
        change(path)
        return path

    return make


def without(*names: str) -> Callable[[Path], Any]:
    return lambda model: [(model / name).unlink() for name in names]


def holding(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda model: (model / name).write_bytes(data)


def settings(name: str = "config.json", **values: Any) -> Callable[[Path], Any]:
    """A change of one of a model's JSON files; None takes a setting out."""

    def change(model: Path) -> None:
        found = {**json.loads((model / name).read_text()), **values}
        kept = {key: value for key, value in found.items() if value is not None}
        (model / name).write_text(json.dumps(kept))

    return change


def cut_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def pickled_weights(model: Path) -> None:
    import torch

    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def five_labels(model: Path) -> None:
    """A head of five classes, as its config says too."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "score.weight": np.zeros((5, 32), np.float32)}, model / "model.safetensors")
    settings(id2label={i: str(i) for i in range(5)}, label2id={str(i): i for i in range(5)})(model)


def lost_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "gone.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


CACHED = "02_teachers/qwen/fold0"
Table = pa.Table


def cached(change: Callable[[Table], Table]) -> Callable[[Path], None]:
    """A change of a teacher's finished cache, sealed as if it had been made so."""

    def damage(finished: Path) -> None:
        path = finished / CACHED / "logits.parquet"
        pq.write_table(change(pq.read_table(path)), path)
        reseal(path.parent)

    return damage


def last(column: str, value: Any) -> Callable[[Table], Table]:
    """Another value in the last row that a student reads in the in-sample view."""

    def change(table: Table) -> Table:
        rows = table.to_pylist()
        next(row for row in reversed(rows) if row["view"] == "in_sample")[column] = value
        return pa.Table.from_pylist(rows, schema=table.schema)

    return change


def twice(table: Table) -> Table:
    rows = table.to_pylist()
    first = next(row for row in rows if row["view"] == "in_sample")
    return last("id", first["id"])(table)


def further(table: Table) -> Table:
    rows = table.to_pylist()
    row = next(row for row in rows if row["view"] == "in_sample")
    return pa.Table.from_pylist([*rows, {**row, "id": "another"}], schema=table.schema)


def in_order(*labels: str) -> Callable[[Table], Table]:
    return lambda table: table.replace_schema_metadata({"labels": json.dumps(labels)})


def as_text(table: Table) -> Table:
    texts = [[str(number) for number in row] for row in table["logits"].to_pylist()]
    return table.set_column(2, "logits", pa.array(texts))


def reseal(unit: Path) -> None:
    """A manifest that tells of the unit's files as they are now, as whoever changed them on purpose would."""
    path = unit / run.MANIFEST
    data = json.loads(path.read_text())
    del data["seal"]
    data["files"] = {name: run.file_entry(unit / name) for name in data["files"]}
    path.write_text(json.dumps({**data, "seal": run._seal(data)}))
