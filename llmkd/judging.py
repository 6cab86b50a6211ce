"""From cached and fresh logits to the tables of metrics.json: each row counted once, copies un-swapped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmkd import logits, tasks
from llmkd.batches import Rows
from llmkd.crossfit import view_rows
from llmkd.errors import DataError
from llmkd.evaluate import Logits, Probabilities, both_orders, mean_scores, scores, softmax
from llmkd.ids import Ids


def folds(table: pa.Table, files: Sequence[Path], labels: Sequence[str]) -> dict[str, Any]:
    """Scores of one model's folds from their caches, in the given order of each row.

    {"oof": over all training rows, each by the fold that did not see it; "test": the mean over folds;
    "test_ensemble": of the folds' mean probabilities}. No "oof" where there is a single fold.
    """
    truth = table["label"].to_numpy().astype(np.int64)
    rows, found = on_view(table, files, "test", labels)
    forecasts, at = [softmax(one) for one in found], rows[0]
    result: dict[str, Any] = {
        "test": mean_scores([scores(one, truth[at]) for one in forecasts]),
        "test_ensemble": scores(np.mean(forecasts, axis=0), truth[at]),
    }
    if len(files) > 1:
        rows, found = on_view(table, files, "oof", labels)
        result["oof"] = scores(softmax(np.concatenate(found)), truth[np.concatenate(rows)])
    return result


def on_view(
    table: pa.Table, files: Sequence[Path], view: str, labels: Sequence[str]
) -> tuple[list[Rows], list[Logits]]:
    """Of each fold's cache the row numbers of a view, in their given order, and the logits (N, C) on them."""
    ids = Ids(table["id"])
    given = ~table["swapped"].to_numpy(zero_copy_only=False).astype(bool)
    rows, found = [], []
    for fold, file in enumerate(files):
        at = view_rows(table, fold, len(files))[view]
        found.append(logits.read(file, view, ids.of(at), labels=labels)[given[at]])
        rows.append(at[given[at]])
    return rows, found


class TestRows:
    """The test part of a prepared table: rows in their given order, and where their swapped copies stand."""

    __test__ = False  # not a test case, whatever its name says to pytest

    def __init__(self, table: pa.Table, kind: str, classes: int) -> None:
        self.table = table.filter(pc.equal(table["part"], "test"))
        swapped = np.asarray(self.table["swapped"].to_numpy(), dtype=bool)
        self.given = np.flatnonzero(~swapped)
        stems = self.table["stem"].to_pylist()
        copies = {stems[row]: row for row in np.flatnonzero(swapped)}
        self.copies = np.asarray([copies.get(stems[row], -1) for row in self.given], dtype=np.int64)
        self.mirror = tasks.KINDS[kind].mirror(classes)
        self.labels = self.table["label"].to_numpy().astype(np.int64)[self.given]
        self.bayes: Probabilities | None = None
        if "bayes" in self.table.column_names and self.table["bayes"].null_count == 0:
            stored = np.asarray(self.table["bayes"].to_pylist(), dtype=np.float64)[self.given]
            self.bayes = stored / stored.sum(axis=1, keepdims=True)  # float32 rows sum to 1 only nearly

    def probabilities(self, found: Logits, *, swap: bool = False, temperature: float = 1.0) -> Probabilities:
        """(rows in the given order, C) from the logits of all of `self.table`'s rows."""
        found = found / temperature
        if swap:
            if (self.copies < 0).any():
                raise DataError(
                    "a test row has no copy in the other order; run stage 00 with task.swap: true"
                )
            return both_orders(found[self.given], found[self.copies], self.mirror)
        return softmax(found[self.given])

    def scores(
        self, found: Logits, *, swap: bool = False, temperature: float = 1.0
    ) -> dict[str, float | int]:
        return scores(self.probabilities(found, swap=swap, temperature=temperature), self.labels)

    def write(self, path: Path, found: Logits, labels: Sequence[str], *, swap: bool) -> None:
        """predictions.parquet: id, label, one probability a class, both orders averaged where asked, at
        temperature 1."""
        p = self.probabilities(found, swap=swap)
        columns = self._named() | {f"p_{name}": p[:, i] for i, name in enumerate(labels)}
        pq.write_table(pa.table(columns), path, compression="zstd")

    def write_logits(self, path: Path, found: Mapping[str, Logits], labels: Sequence[str]) -> None:
        """logits.parquet: id, label, each model's logits on the given orders; label names in its metadata."""
        columns = self._named()
        for name, values in found.items():
            flat = pa.array(np.ascontiguousarray(values[self.given], dtype=np.float32).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, len(labels))
        table = pa.table(columns).replace_schema_metadata({"labels": json.dumps(list(labels))})
        pq.write_table(table, path, compression="zstd")

    def _named(self) -> dict[str, Any]:
        ids = np.asarray(self.table["id"].to_pylist(), dtype=object)[self.given]
        return {"id": ids, "label": self.labels}


def summary(metrics: Mapping[str, Any]) -> str:
    """metrics.json as a table for a person."""
    rows = {f"teacher {name}": found["test"] for name, found in metrics.get("teachers", {}).items()}
    rows |= {f"peer {name}": found["test"] for name, found in metrics.get("peers", {}).items()}
    shown = (
        "baseline",
        "student",
        "merged",
        "merged_tta",
        "quantized",
        "quantized_tta",
        "artifact",
        "artifact_tta",
    )
    names = [one for name in shown for one in (name, f"{name}_calibrated")]
    rows |= {name: metrics[name] for name in names if name in metrics}
    rows |= {f"output {name}": found for name, found in metrics.get("outputs", {}).items()}
    further = [name for name in ("auc", "amex") if any(name in row for row in rows.values())]
    lines = [f"{'test rows':24}{'log loss':>10}{'accuracy':>10}{'ece':>8}{'rows':>8}"]
    lines[0] += "".join(f"{name:>10}" for name in further)
    for name, row in rows.items():
        line = f"{name:24}{row['log_loss']:10.4f}{row['accuracy']:10.4f}{row['ece']:8.4f}{row['rows']:8}"
        lines.append(line + "".join(f"{row[key]:10.4f}" for key in further if key in row))
    if metrics.get("transductive"):
        lines.append(
            "transductive: students learnt from teachers' predictions on these very rows, unlabelled"
        )
    calibration = metrics.get("calibration", {})
    if calibration.get("temperature"):
        test = calibration["test"]
        lines.append(
            f"calibrated by temperature {calibration['temperature']:.4f}: ece on test rows "
            f"{test['ece_before']:.4f} before, {test['ece_after']:.4f} after"
        )
    elif "fitted" in calibration:
        lines.append(
            f"not calibrated: out of fold, on {calibration['rows']} rows, a temperature of "
            f"{calibration['fitted']:.4f} is no better than 1 beyond chance"
        )
    elif calibration.get("rows"):
        lines.append(f"not calibrated: out of fold, {calibration['rows']} rows were judged without a mistake")
    elif "rows" in calibration:  # of this run's own artifact
        lines.append("not calibrated: no labelled row is out of fold")
    if "bayes_log_loss" in metrics:
        drawn = metrics["bayes_log_loss_drawn"]
        lines.append(
            f"{'Bayes floor':24}{metrics['bayes_log_loss']:10.4f}  ({drawn:.4f} on the labels drawn)"
        )
    if "drift" in metrics:
        size, drift = metrics["size_bytes"], metrics["drift"]
        lines.append(
            f"quantized against merged: {size['quantized'] / size['merged']:.2f} of the bytes, logits off by "
            f"{drift['mean_abs_logit']:.4f} (at most {drift['max_abs_logit']:.4f}), KL {drift['kl']:.1e}, "
            f"same class in {drift['agreement']:.2%}"
        )
    return "\n".join(lines)
