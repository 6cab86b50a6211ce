"""Finished runs without a model in them, and what a test reads of their reports."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmkd import logits, run
from llmkd.evaluate import drift, mean_scores, scores, softmax
from llmkd.reporting import gather, judged

LABELS = ["<script>document.title='taken'</script>", "b & c", "constructor"]
HOSTILE = "<img src=x onerror=alert(1)>"
TEXT = "a text that stays where it is"
TEST, FOLDS = 60, 2
Table = dict[str, Any]


def unit(
    root: Path, place: str, settings: Table, inputs: Sequence[str], metrics: Table, **files: Any
) -> None:
    """A finished unit; files: writers by what they are called, `__` for a slash."""
    digests = {name: run.digest(root / name) for name in inputs}
    stage = place.split("/")[0]
    with run.writing(root / place, stage, settings, digests, 5, alone=True) as made:
        for name, write in files.items():
            path = made.path / name.replace("__", "/").replace("_of_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        made.metrics.update(metrics)
        made.rows["train"] = 40


def history(terms: Sequence[str], fold: int) -> Table:
    entries = [
        {"step": step, "epoch": 0.1 * step, "learning_rate": 0.1, "grad_norm": 1.0, "loss": 1 / step + fold}
        | dict.fromkeys(terms, 2 / step + fold)
        for step in (1, 2, 4)
    ]
    return {"loss": entries, "dev": [{"step": 4, "dev_log_loss": 1.0 + fold}], "best": 1.0, "steps": 4}


def forecasts(truth: np.ndarray, strength: float, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (strength * np.eye(3)[truth] + random.normal(size=(len(truth), 3))).astype(np.float32)


def fixed(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def made(root: Path, *, student: float = 1.0, baseline: float | None = 0.2, artifacts: bool = True) -> Path:
    """A finished classifier's run without a model in it: two teachers, two folds, `student` and `baseline`
    as sure of the labels as told."""
    truth = np.random.default_rng(1).integers(0, 3, TEST)
    ids = [f"row {i} {HOSTILE}" if i % 2 else f"row {i}" for i in range(TEST)]
    table = pa.table(
        {
            "id": [*ids, *(f"t{i}" for i in range(8))],
            "stem": [*ids, *(f"t{i}" for i in range(8))],
            "swapped": [False] * (TEST + 8),
            "part": ["test"] * TEST + ["train"] * 8,
            "fold": [-1] * TEST + [i % FOLDS for i in range(8)],
            "label": [*truth.tolist(), *[0] * 8],
            "text": [TEXT] * (TEST + 8),
        }
    ).replace_schema_metadata({"labels": json.dumps(LABELS)})
    task = {"kind": "classification", "train": "/home/someone/data/train.parquet", "api_key": "hunter2"}
    report = {"labels": LABELS}
    unit(
        root,
        "00_prepare",
        {"task": task},
        [],
        report,
        rows_of_parquet=lambda path: pq.write_table(table, path),
    )

    def fold(
        place: str, settings: Table, found: np.ndarray, inputs: Sequence[str], terms: Sequence[str]
    ) -> None:
        k = settings["fold"]
        cached = {"test": (ids, found)}
        unit(
            root,
            place,
            settings,
            ["00_prepare", *inputs],
            history(terms, k),
            logits_of_parquet=lambda path: logits.write(path, cached, teacher="t", labels=LABELS),
            adapter__model_of_safetensors=lambda path: path.write_bytes(b"0" * (100 + k)),
        )

    metrics: Table = {"teachers": {}, "transductive": False}
    places = []

    def judge(
        name: str, strength: float, settings: Table, seed: int, stage: str, inputs: Any, terms: Any
    ) -> Table:
        found = [forecasts(truth, strength, seed + k) for k in range(FOLDS)]
        for k, one in enumerate(found):
            places.append(f"{stage}/{name}/fold{k}")
            fold(places[-1], {**settings, "fold": k}, one, inputs(k), terms)
        return mean_scores([scores(softmax(one), truth) for one in found])

    for seed, name in ((10, "llama"), (20, "qwen")):
        settings = {"teacher": {"name": name}, "note": HOSTILE, "precision": "fp32"}
        told = judge(name, 2.0, settings, seed, "02_teachers", lambda k: [], ["ce"])
        metrics["teachers"][name] = {**told, "test": told}
    which = {"student": {"name": "gemma"}}
    distill = {"weighting": "fixed", "teacher_weights": {"qwen": 2.0}}
    if baseline is not None:
        settings = {**which, "kind": "baseline"}
        metrics["baseline"] = judge(
            "gemma-baseline", baseline, settings, 30, "03_distill", lambda k: [], ["ce"]
        )
    settings = {**which, "kind": "student", "teachers": ["llama", "qwen"], "distill": distill}
    taught = ["ce", "kl/llama", "kl/qwen"]
    read = lambda k: [f"02_teachers/{name}/fold{k}" for name in ("llama", "qwen")]  # noqa: E731
    metrics["student"] = judge("gemma", student, settings, 40, "03_distill", read, taught)
    unit(root, "04_merge", which, [f"03_distill/gemma/fold{k}" for k in range(FOLDS)], {})
    unit(root, "05_quantize", {"quantize": {"bits": 8}}, ["00_prepare", "04_merge"], {})
    merged = forecasts(truth, student, 50)
    quantized = merged + np.float32(0.01)
    quantized[7, 0] += 1
    for name, found in (("merged", merged), ("quantized", quantized)):
        metrics[name] = scores(softmax(found), truth)
    metrics |= {
        "drift": drift(merged, quantized),
        "latency": {"rows_per_second": 1000.0, "artifacts": {"merged": 1200.0, "quantized": 1000.0}},
        "size_bytes": {"merged": 400, "quantized": 200},
        "calibration": {"temperature": 1.5, "rows": 8},
    }
    p = softmax(quantized)
    order = np.random.default_rng(3).permutation(TEST)
    named = {"id": [ids[at] for at in order], "label": truth[order]}
    both = {"merged": fixed(merged[order]), "quantized": fixed(quantized[order])} if artifacts else {}
    files = {
        "metrics_of_json": lambda path: run.write_json(path, metrics),
        "predictions_of_parquet": lambda path: pq.write_table(
            pa.table(named | {f"p_{name}": p[order, i] for i, name in enumerate(LABELS)}), path
        ),
    }
    if artifacts:
        files["logits_of_parquet"] = lambda path: pq.write_table(pa.table(named | both), path)
    unit(root, "06_evaluate", which, ["00_prepare", "05_quantize", *places], metrics, **files)
    return root


def language(root: Path) -> Path:
    """A finished language model's run, likewise."""
    task = {"task": {"kind": "causal_lm"}}
    unit(root, "00_prepare", task, [], {})
    unit(
        root,
        "01_pretrain/big",
        {},
        [],
        {},
        model__model_of_safetensors=lambda path: path.write_bytes(b"0" * 900),
    )
    which = {"student": {"name": "small"}}
    settings = {**which, "kind": "student", "teachers": ["big"], "fold": 0, "distill": {"weighting": "fixed"}}
    told = {**history(["ce", "kl/big"], 0), "dev": []}
    unit(root, "03_distill/small/fold0", settings, ["00_prepare", "01_pretrain/big"], told)
    unit(root, "04_merge", which, ["03_distill/small/fold0"], {})
    found = {"nll": 2.0, "perplexity": 7.39, "tokens": 500.0, "tokens_per_second": 90.0}
    near = {"kl/big": 0.25, "agreement/big": 0.75}
    metrics = {
        "teachers": {"big": found},
        "before": {**found, **near, "perplexity": 90.0},
        "baseline": {**found, **near, "perplexity": 9.0},
        "student": {**found, **near, "perplexity": 8.0},
        "merged": {**found, **near, "perplexity": 8.0},
        "size_bytes": {"merged": 300},
        "continuations": [{"prompt": f"once {HOSTILE}", "said": {"teacher big": "upon", "merged": HOSTILE}}],
    }
    inputs = ["00_prepare", "03_distill/small/fold0", "04_merge"]
    unit(root, "06_evaluate", which, inputs, {}, metrics_of_json=lambda path: run.write_json(path, metrics))
    return root


def rows_of(root: Path) -> Table:
    data = gather.gather(root)
    return judged.judged(root, data["units"], LABELS, data["student"], [])


def page(path: Path) -> str:
    """The report without plotly's own code."""
    content = path.read_text(encoding="utf-8")
    return re.sub(r'id="plotly">.*?</script>', "", content, flags=re.DOTALL)


def plots(content: str) -> Table:
    found = re.search(r'id="figures">(.*?)</script>', content, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def escaped() -> str:
    return HOSTILE.replace("<", "&lt;").replace(">", "&gt;")
