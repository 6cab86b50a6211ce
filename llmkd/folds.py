"""Stratified folds that keep a group together, and which rows a fold trains on."""

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from llmkd.errors import DataError

WALKED = 100_000  # groups that StratifiedGroupKFold may walk: 0.4 ms each, so minutes of a million

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def assign(
    labels: npt.ArrayLike, groups: npt.ArrayLike, count: int, seed: int, *, stratify: bool = True
) -> npt.NDArray[np.int16]:
    """Fold of each row, shape (N,), 0 to count - 1; all -1 where count is 1.

    `labels` are ints (-1 = unknown) and `groups` anything hashable; a group stands in one fold.
    Raises DataError where there are fewer groups than folds, or where a fold's training or
    development side holds a single class.
    """
    classes = np.asarray(labels)
    if count == 1:
        return np.full(len(classes), -1, dtype=np.int16)
    codes, names = pd.factorize(np.asarray(groups))
    if len(names) < count:
        raise DataError(f"{len(names)} groups cannot fill {count} folds: lower folds.count or add data")
    folds = _split(classes, codes, count, seed, stratify=stratify)
    _check_classes(classes, folds, count)
    return folds


def check(folds: npt.ArrayLike, groups: npt.ArrayLike) -> None:
    """Raise DataError where one group stands in two folds; rows with fold -1 are not looked at."""
    frame = pd.DataFrame({"fold": np.asarray(folds), "group": np.asarray(groups)})
    spread = frame[frame.fold >= 0].groupby("group", sort=False).fold.nunique()
    torn = spread[spread > 1]
    if len(torn):
        raise DataError(
            f"{len(torn)} groups stand in more than one fold (first: {torn.index[0]!r}): run stage 00 again"
        )


def dev_rows(table: pa.Table, fold: int) -> Ints:
    """Indices of the rows that `fold` is judged on, in their given order only; empty for a single fold."""
    parts = _folds(table, fold)
    return np.flatnonzero(in_part(table, "train") & (parts == fold) & ~_bools(table, "swapped"))


def _split(
    classes: npt.NDArray[np.int64], groups: Ints, count: int, seed: int, *, stratify: bool
) -> npt.NDArray[np.int16]:
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

    number = int(groups.max()) + 1
    alone = len(groups) == number
    if stratify and not alone and number > WALKED:
        return _dealt(classes, groups, count, seed)
    kind = StratifiedKFold if alone and stratify else StratifiedGroupKFold if stratify else GroupKFold
    if count > np.unique(classes, return_counts=True)[1].max() or count > number:
        raise DataError(f"{count} folds for {len(classes)} rows are too many: lower folds.count")
    splitter = kind(n_splits=count, shuffle=True, random_state=seed)
    folds = np.full(len(classes), -1, dtype=np.int16)
    parts = splitter.split(classes, classes, None if alone and stratify else groups)
    for fold, (_, held_out) in enumerate(parts):
        folds[held_out] = fold
    return folds


def _dealt(classes: npt.NDArray[np.int64], groups: Ints, count: int, seed: int) -> npt.NDArray[np.int16]:
    """Folds of very many groups: the largest are walked, the others dealt by their first rows' classes."""
    sizes = np.bincount(groups)
    large = np.zeros(len(sizes), dtype=bool)
    large[np.argsort(-sizes, kind="stable")[: WALKED // 10]] = True
    walked, folds = large[groups], np.full(len(groups), -1, dtype=np.int16)
    _, codes = np.unique(groups[walked], return_inverse=True)
    folds[walked] = _split(classes[walked], codes, count, seed, stratify=True)
    _, first, codes = np.unique(groups[~walked], return_index=True, return_inverse=True)
    small = classes[~walked][first]
    folds[~walked] = _split(small, np.arange(len(small)), count, seed, stratify=True)[codes]
    return folds


def _check_classes(classes: npt.NDArray[np.int64], folds: npt.NDArray[np.int16], count: int) -> None:
    known = classes >= 0
    if not known.any():
        return
    for fold in range(count):
        for side, rows in (("training", folds != fold), ("development", folds == fold)):
            if len(np.unique(classes[rows & known])) < 2:
                raise DataError(
                    f"fold {fold} has fewer than two classes on its {side} side: "
                    "lower folds.count, or group by a field with more values"
                )


def _folds(table: pa.Table, fold: int) -> npt.NDArray[np.int16]:
    parts = table["fold"].to_numpy()
    last = max(int(parts.max(initial=-1)), 0)
    if not 0 <= fold <= last:
        raise DataError(f"fold {fold} is not among the rows' folds 0 to {last}")
    return np.asarray(parts, dtype=np.int16)


def in_part(table: pa.Table, part: str) -> Bools:
    """(N,)"""
    return np.asarray(pc.equal(table["part"], part).to_numpy())


def _bools(table: pa.Table, column: str) -> Bools:
    return np.asarray(table[column].to_numpy(), dtype=bool)
