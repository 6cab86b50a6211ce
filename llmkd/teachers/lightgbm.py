"""Boosted trees as a teacher: features of rows in, raw logits out (Ke et al. 2017, LightGBM)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkd.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    import lightgbm
    import pandas as pd

Rows = NDArray[np.int64]  # row numbers
# What `fit_fold` sets itself. boosting: a forest's raw scores are no logits, and dart cannot stop early;
# sigmoid would scale the logit of a binary model; a data set's categories come from the frame.
OWN = (
    "objective",
    "num_class",
    "metric",
    "boosting",
    "sigmoid",
    "num_iterations",
    "early_stopping_round",
    "categorical_feature",
    "seed",
    "num_threads",
    "deterministic",
    "force_row_wise",
    "force_col_wise",
    "verbosity",
)


def frame(columns: Mapping[str, Sequence[Any]], categories: Collection[str] | None = None) -> pd.DataFrame:
    """Named columns of equal length as float64 or category features, (N, F).

    categories: the names that are categories, whatever their values look like; where None, every column
    with a value that is no number is one. None, NaN and "" are missing. Levels are strings, sorted.
    Raises DataError naming a value that is no number in a column that must be numeric.
    """
    import pandas as pd

    found = {}
    for name, given in columns.items():
        values = pd.Series(list(given), dtype=object)
        values = values.where(values.notna() & (values != ""), None)
        numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
        wrong = values[numbers.isna() & values.notna()]
        if categories is not None and name not in categories and len(wrong):
            raise DataError(
                f"feature {name!r}: {str(wrong.iloc[0])[:40]!r} in row {wrong.index[0]} is no number: "
                "mend it or name the feature as a category"
            )
        if len(wrong) or name in (categories or ()):
            texts = values.map(str, na_action="ignore")
            numbers = pd.Series(pd.Categorical(texts, categories=sorted(set(texts.dropna()))))
        found[name] = numbers
    return pd.DataFrame(found)


def fit_fold(
    features: pd.DataFrame,
    labels: NDArray[np.int64],
    train: Rows,
    dev: Rows | None,
    classes: int,
    *,
    params: Mapping[str, Any],
    rounds: int,
    early_stopping: int,
    seed: int,
    threads: int,
) -> tuple[lightgbm.Booster, dict[str, Any]]:
    """Trees fitted on the labelled rows of `train`; with `dev` rows, cut where their log loss is lowest.

    features (N, F) numeric or category, labels (N,) int64, -1 = none. `early_stopping` rounds without a
    gain end the training, 0 never does. The same seed gives the same trees on any number of threads.
    The model is as `load` would give it. The history: best_iteration, best (log loss on dev, None without
    labelled rows there), rounds (boosted in all).
    Raises ConfigError for a parameter that LightGBM does not know or that is set here, DataError for
    features it cannot take and without labelled rows.
    """
    import lightgbm

    _check_params(params)
    _check_features(features)
    train = train[labels[train] >= 0]
    dev = None if dev is None else dev[labels[dev] >= 0]
    if not len(train):
        raise DataError("no labelled rows to train on; check folds.count and the prepared rows")
    metric = "multi_logloss" if classes > 2 else "binary_logloss"
    settings = {
        **params,
        "objective": "multiclass" if classes > 2 else "binary",
        **({"num_class": classes} if classes > 2 else {}),
        "metric": metric,
        "seed": seed,
        "num_threads": threads,
        "deterministic": True,
        "force_row_wise": True,  # LightGBM would otherwise choose by timing
        "verbosity": -1,
    }
    data = lightgbm.Dataset(features.iloc[train], labels[train])
    held, callbacks, curve = [], [], dict[str, dict[str, list[float]]]()
    if dev is not None and len(dev):
        held = [data.create_valid(features.iloc[dev], labels[dev])]
        callbacks = [lightgbm.record_evaluation(curve)]
        # a patience longer than the training still notes where the log loss was lowest
        callbacks.append(lightgbm.early_stopping(early_stopping or rounds + 1, verbose=False))
    try:
        grown = lightgbm.train(
            settings, data, rounds, valid_sets=held, valid_names=["dev"], callbacks=callbacks
        )
    except lightgbm.basic.LightGBMError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"params {dict(params)}: {reason}; see LightGBM's Parameters") from error
    losses = curve["dev"][metric] if held else []
    best = grown.best_iteration if held else rounds
    history = {
        "best_iteration": best,
        "best": float(losses[best - 1]) if held else None,
        "rounds": len(losses) or rounds,
    }
    # as text, LightGBM keeps the trees up to the best round only
    return lightgbm.Booster(model_str=grown.model_to_string()), history


def logits(model: lightgbm.Booster, features: pd.DataFrame, rows: Rows) -> NDArray[np.float32]:
    """Raw logits (len(rows), C), float32, whose softmax are the model's probabilities.

    A binary model's one score s, the log odds, becomes [-s/2, s/2]. Levels that the training frame did
    not have count as missing. Raises DataError where the features are not the model's.
    """
    _check_features(features)
    names, expected = [_plain(name) for name in features.columns], model.feature_name()
    if names != expected:
        raise DataError(f"features {names} are not those of the trees, {expected}: give these in this order")
    found = [_plain(name) for name in features.select_dtypes("category").columns]
    if found != categories(model):
        raise DataError(
            f"categories {found} are not those of the trees, {categories(model)}: name these to `frame`"
        )
    scores = np.asarray(model.predict(features.iloc[rows], raw_score=True))  # (n,) or (n, C)
    scores = np.stack([-scores / 2, scores / 2], axis=1) if scores.ndim == 1 else scores
    return scores.astype(np.float32)


def categories(model: lightgbm.Booster) -> list[str]:
    """The names of the features that the trees take as categories."""
    return [model.feature_name()[at] for at in model.params.get("categorical_feature", ())]


def save(model: lightgbm.Booster, path: Path) -> None:
    """LightGBM's own text format, which holds the categories' levels too."""
    path.write_text(model.model_to_string(), encoding="utf-8")


def load(path: Path) -> lightgbm.Booster:
    """What `save` wrote. Raises ModelError."""
    import lightgbm

    if not path.is_file():
        raise ModelError(f"{path}: no such file; run stage 02 anew")
    text = path.read_text(encoding="utf-8")
    # LightGBM ends the whole process over some damaged texts, so the two ends are looked at first
    if not text.startswith("tree\n") or "\npandas_categorical:" not in text:
        raise ModelError(f"{path}: not a whole LightGBM text model; run stage 02 anew")
    return lightgbm.Booster(model_str=text)


def _plain(name: str) -> str:
    return name.replace(" ", "_")  # as LightGBM itself does it


def _check_features(features: pd.DataFrame) -> None:
    for name, kind in features.dtypes.items():
        if re.search(r'[\[\]{}":,]', str(name)):
            raise DataError(
                f'feature {name!r}: LightGBM takes no [ ] {{ }} " : , in a name: rename the column'
            )
        if kind.name != "category" and kind.kind not in "iufb":
            raise DataError(
                f"feature {name!r} is {kind}, neither numeric nor category: pass it through `frame`"
            )


def _check_params(params: Mapping[str, Any]) -> None:
    """LightGBM ignores what it does not know, so a misspelt parameter would train something else."""
    from lightgbm.basic import _ConfigAliases

    known = _ConfigAliases._get_all_param_aliases()
    main = {alias: name for name, aliases in known.items() for alias in aliases}
    for name in params:
        if name not in main:
            raise ConfigError(f"LightGBM parameter {name!r} is unknown: see its documentation, Parameters")
        if main[name] in OWN:
            raise ConfigError(f"LightGBM parameter {name!r} is set by this teacher: leave it out")
