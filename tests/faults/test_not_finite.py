"""Numbers that are none where nothing is trained: in an artifact that is judged or asked, in trees' features.

Losses, gradients and captured logits: `test_resume`; files of logits: `test_bad_input`, `test_logits`.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_teachers as boosted
import tiny
import torch
from safetensors.torch import load_file, save_file

from llmkd.errors import ModelError
from llmkd.predicting import predict_file
from llmkd.teachers import lightgbm as trees


@pytest.fixture
def spoiled(copy: Path) -> Path:
    """The merged student with a weight of its head that is no number, as no stage would leave it."""
    model = Path(shutil.copytree(copy / "04_merge" / "model", copy.parent / "spoiled"))
    tensors = load_file(model / "model.safetensors")
    tensors["score.weight"][0, 0] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_an_artifact_that_is_judged_names_its_rows(
    copy: Path, spoiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny.snapshot(copy)
    assert tiny.stage("06_evaluate", f"run={copy}", f"--artifact={spoiled}") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "logits of 80 rows are not finite, first ['test-0000000" in error
    assert "try precision: fp32" in error
    assert tiny.snapshot(copy) == before


def test_an_artifact_that_is_asked_names_its_rows_and_writes_nothing(spoiled: Path, tmp_path: Path) -> None:
    rows = pd.DataFrame({name: ["one", "two"] for name in ("prompt", "response_a", "response_b")})
    rows.assign(id=["first", "second"]).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ModelError, match=r"logits of \d rows are not finite, first \['first'[^\n]*$"):
        predict_file(spoiled, str(tmp_path / "rows.csv"), tmp_path / "out.parquet")
    assert not list(tmp_path.glob("out*"))


def test_trees_take_what_is_missing_and_still_say_a_number() -> None:
    """NaN is LightGBM's word for a value that is not there: one of a row, all of them, a whole column."""
    features, labels = boosted.rows()
    features.loc[::3, "number"] = np.nan
    features.loc[::7, features.select_dtypes("number").columns] = np.nan
    features["empty"] = np.nan
    found = trees.logits(boosted.grow(features, labels)[0], features, np.arange(len(features)))
    assert found.shape == (len(features), 3)
    assert np.isfinite(found).all()
