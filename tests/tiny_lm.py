"""A tiny run of sequence distillation that several test files build on."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import tiny
from conftest import STAGES

from llmkd import lm, lm_rows
from llmkd.config import load
from llmkd.inputs import prepared
from llmkd.settings import text_settings
from llmkd.tasks.arena import texts

SIZES = "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64"
CONFIG = """
run: {root}/run
seed: 3
precision: fp32
task: {{kind: causal_lm, train: {root}/train.parquet, test: {root}/test.parquet, max_tokens: 48}}
folds: {{count: 1}}
pretrain:
  - {{objective: causal_lm, data: {root}/train.parquet, models: [big], learning_rate: 3.0e-3, batch_rows: 8}}
teachers:
  - name: big
    init:
      architecture: llama
      config: {{hidden_size: 64, intermediate_size: 64, num_hidden_layers: 2, {sizes}}}
      tokenizer: {{vocab_size: 320}}
student:
  name: small
  init:
    architecture: llama
    config: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, {tied}, {sizes}}}
    tokenizer: {{vocab_size: 320}}
  lora: null
distill: {{method: sequence, baseline: true, epochs: 1, learning_rate: 3.0e-3, batch_rows: 8}}
merge: {{dtype: fp32}}
quantize: {{bits: 8, group_size: 32, calibration_rows: 8}}
evaluate: {{continuations: 2, new_tokens: 6}}
"""
TIED = "tie_word_embeddings: true"
LEARN, REST = ("02_teachers", "03_distill"), ("03_distill", "04_merge", "06_evaluate")
# one step over all rows that moves nothing: what is logged is the untrained student's
STILL = ("distill.batch_rows=40", "distill.learning_rate=1.0e-30", "distill.baseline=false")
WHOLE = "distill.cache={how: topk, k: 320, bits: 32}"


def go(root: Path, *overrides: str, stages: tuple[str, ...] = STAGES) -> int:
    """The stages of `root`'s run, up to the first that fails; its exit code."""
    for name in stages:
        if code := tiny.stage(name, *overrides, config=root / "lm.yaml"):
            return code
    return 0


def begin(root: Path) -> None:
    """All seven stages; one training text is a test text too."""
    said = texts(50, 1)
    pd.DataFrame({"text": said[:41]}).to_parquet(root / "train.parquet")
    pd.DataFrame({"text": said[40:50]}).to_parquet(root / "test.parquet")
    (root / "lm.yaml").write_text(CONFIG.format(root=root, sizes=SIZES, tied=TIED))
    assert go(root) == 0


def metrics(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "run/06_evaluate/metrics.json").read_text()))


def rows_of(config: Any, part: str) -> tuple[Any, Any]:
    """A part's rows as the student reads them, and what was cut of them."""
    settings = text_settings(config, config.student)
    return lm_rows.examples(prepared(config)[0], lm.tokenizer_of(config), part, **settings)


def rows(root: Path, part: str) -> tuple[Any, Any]:
    """The same of a run that lies at `root`, and the student's tokenizer."""
    config = load(root / "lm.yaml")
    return rows_of(config, part)[0], lm.tokenizer_of(config)
