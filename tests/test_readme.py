"""The README's Python is run as it stands, on tiny models."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny

BLOCKS = re.findall(r"```python\n(.*?)```", (tiny.ROOT / "README.md").read_text(), re.DOTALL)


def test_every_file_of_the_package_has_its_line() -> None:
    readme = (tiny.ROOT / "README.md").read_text()
    files = [path for folder in ("llmkd", "benchmarks") for path in (tiny.ROOT / folder).rglob("*.py")]
    missing = [path.name for path in files if path.name != "__init__.py" and f"{path.name}`" not in readme]
    assert not missing


def test_the_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tokenizer = tiny.tokenizer()
    for seed, name in enumerate(("teacher", "student")):
        model = tiny.classifier("bert", seed, vocab_size=len(tokenizer), num_labels=2)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, rows in (("train", 60), ("test", 20)):
        texts = [f"some words {i} " + "good " * (i % 2) for i in range(rows)]
        frame = pd.DataFrame({"text": texts, "label": [i % 2 for i in range(rows)]})
        frame.to_parquet(tmp_path / f"{name}.parquet")
    monkeypatch.chdir(tmp_path)
    one_call = BLOCKS[0].replace("epochs=5", "epochs=5, max_tokens=32")  # tiny models have few positions
    exec(one_call, {})
    shown = capsys.readouterr().out
    assert "LABEL_" in shown
    assert len([word for word in shown.split() if re.fullmatch(r"[01]\.\d+", word)]) >= 3


def test_the_plain_functions(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(3, 12, 1000)
    given: dict[str, Any] = {
        "directory": tmp_path,
        "student": tiny.classifier(),
        "ids": [f"r{i}" for i in range(1000)],
        "tokens": np.random.default_rng(1).integers(3, 64, lengths.sum()).astype(np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "labels": np.arange(1000) % 3,
        "pad_id": 0,
        "teacher_logits": np.zeros((1000, 1, 3), np.float32),
    }
    exec(BLOCKS[1], given)
    assert given["logits"].shape == (100, 3)
