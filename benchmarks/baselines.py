"""What a user would try first, on the same rows: python benchmarks/baselines.py RUN

RUN is a run directory whose stage 00 is done. classification: TF-IDF of words and bigrams with a logistic
regression. preference: a logistic regression and boosted trees on five length features.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from llmkd.evaluate import scores


def lengths(rows: pd.DataFrame) -> np.ndarray:
    """Words of prompt and answers, the answers' difference and log ratio, (N, 5)."""
    words = {name: rows[name].str.split().str.len() for name in ("prompt", "response_a", "response_b")}
    a, b = words["response_a"], words["response_b"]
    return np.stack([words["prompt"], a, b, a - b, np.log((a + 1) / (b + 1))], axis=1)


def main(run: str) -> None:
    rows = pq.read_table(Path(run) / "00_prepare" / "rows.parquet").to_pandas()
    rows = rows[~rows.swapped & (rows.label >= 0)]
    train, test = rows[rows.part == "train"], rows[rows.part == "test"]
    if "text" in rows:
        bigrams = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        models = {
            "TF-IDF bigrams, logistic regression": make_pipeline(
                bigrams, LogisticRegression(C=4, max_iter=500)
            )
        }
        x, z = train.text, test.text
    else:
        trees = HistGradientBoostingClassifier(
            max_iter=150, learning_rate=0.03, max_leaf_nodes=15, random_state=0
        )
        linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        models = {"logistic regression, five lengths": linear, "boosted trees, five lengths": trees}
        x, z = lengths(train), lengths(test)
    prior = np.tile(np.bincount(train.label) / len(train), (len(test), 1))
    labels = test.label.to_numpy().astype(np.int64)
    found = {"class prior": scores(prior, labels)}
    for name, model in models.items():
        found[name] = scores(model.fit(x, train.label).predict_proba(z), labels)
    for name, score in found.items():
        figures = "  ".join(f"{key} {score[key]:.4f}" for key in ("log_loss", "accuracy"))
        print(f"{name:40} {figures}  rows {score['rows']}")


if __name__ == "__main__":
    main(sys.argv[1])
