"""From cached and fresh logits to the tables of metrics.json: each row counted once, copies un-swapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmkd import logits, tasks
from llmkd.crossfit import view_rows
from llmkd.errors import DataError
from llmkd.evaluate import Logits, Probabilities, both_orders, mean_scores, scores, softmax


def folds(table: pa.Table, files: Sequence[Path], labels: Sequence[str]) -> dict[str, Any]:
    """Scores of one model's folds from their caches, in the given order of each row.

    {"oof": over all training rows, each by the fold that did not see it; "test": the mean over folds;
    "test_ensemble": of the folds' mean probabilities}. No "oof" where there is a single fold.
    """
    ids = np.asarray(table["id"].to_pylist(), dtype=object)
    given = ~table["swapped"].to_numpy(zero_copy_only=False).astype(bool)
    truth = table["label"].to_numpy().astype(np.int64)
    rows = {"oof": [], "test": []}  # type: dict[str, list[Any]]
    found = {"oof": [], "test": []}  # type: dict[str, list[Any]]
    for fold, file in enumerate(files):
        for view in ("test", "oof") if len(files) > 1 else ("test",):
            at = view_rows(table, fold, len(files))[view]
            on_view = logits.read(file, view, ids[at], labels=labels)
            rows[view].append(at[given[at]])
            found[view].append(softmax(on_view[given[at]]))
    at = rows["test"][0]
    result: dict[str, Any] = {
        "test": mean_scores([scores(one, truth[at]) for one in found["test"]]),
        "test_ensemble": scores(np.mean(found["test"], axis=0), truth[at]),
    }
    if found["oof"]:
        result["oof"] = scores(np.concatenate(found["oof"]), truth[np.concatenate(rows["oof"])])
    return result


class TestRows:
    """The test part of a prepared table: rows in their given order, and where their swapped copies stand."""

    __test__ = False  # not a test case, whatever its name says to pytest

    def __init__(self, table: pa.Table, kind: str, classes: int) -> None:
        self.table = table.filter(pa.array([part == "test" for part in table["part"].to_pylist()]))
        swapped = np.asarray(self.table["swapped"].to_pylist(), dtype=bool)
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

    def probabilities(self, found: Logits, *, swap: bool) -> Probabilities:
        """(rows in the given order, C) from the logits of all of `self.table`'s rows."""
        if swap:
            if (self.copies < 0).any():
                raise DataError(
                    "a test row has no copy in the other order; run stage 00 with task.swap: true"
                )
            return both_orders(found[self.given], found[self.copies], self.mirror)
        return softmax(found[self.given])

    def scores(self, found: Logits, *, swap: bool = False) -> dict[str, float | int]:
        return scores(self.probabilities(found, swap=swap), self.labels)

    def write(self, path: Path, found: Logits, labels: Sequence[str], *, swap: bool) -> None:
        """predictions.parquet: id, label, one probability a class, as shipped (both orders where asked)."""
        ids = np.asarray(self.table["id"].to_pylist(), dtype=object)[self.given]
        p = self.probabilities(found, swap=swap)
        columns: dict[str, Any] = {"id": ids, "label": self.labels}
        columns |= {f"p_{name}": p[:, i] for i, name in enumerate(labels)}
        pq.write_table(pa.table(columns), path, compression="zstd")


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
    rows |= {name: metrics[name] for name in shown if name in metrics}
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
