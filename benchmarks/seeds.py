"""All seven stages over several seeds, and what each model reached: mean, standard error, each seed.

    python benchmarks/seeds.py configs/adult_lgbm.yaml --seeds 5 [key.subkey=value ...]

Seed s runs in <run>/seed<s>; finished work is skipped, so a broken series goes on where it stopped.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llmkd.config import load

STAGES = ("00_prepare", "01_pretrain", "02_teachers", "03_distill", "04_merge", "05_quantize", "06_evaluate")
STAGE_DIRECTORY = Path(__file__).parent.parent / "stages"
MODELS = ("before", "baseline", "student", "merged", "quantized", "quantized_tta")
SCORES = ("log_loss", "accuracy", "auc", "amex", "perplexity", "kl", "agreement", "rows_per_second")
DIGITS = {"perplexity": 2, "rows_per_second": 0}  # 4 of any other


def one_run(config: str, run: str, overrides: list[str]) -> tuple[dict[str, Any], float]:
    """metrics.json of one finished run, and the seconds that this call took."""
    began = time.perf_counter()
    for stage in STAGES:
        command = [sys.executable, str(STAGE_DIRECTORY / f"{stage}.py"), "--config", config]
        done = subprocess.run(
            [*command, *overrides, f"run={run}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if done.returncode:
            raise SystemExit(f"{stage} of {run} ended with {done.returncode}: {done.stderr.decode()[-500:]}")
    metrics = json.loads((Path(run) / "06_evaluate" / "metrics.json").read_text(encoding="utf-8"))
    return metrics, time.perf_counter() - began


def named(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Test scores by model, in the order of a table; a language model's are as `evaluate_lm` names them."""
    rows = {f"teacher {name}": found.get("test", found) for name, found in metrics["teachers"].items()}
    rows |= {f"peer {name}": found["test"] for name, found in metrics.get("peers", {}).items()}
    rows |= {name: metrics[name] for name in MODELS if name in metrics}
    return rows | {f"output {name}": found for name, found in metrics.get("outputs", {}).items()}


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: a model a row; of each score its mean, standard error and values."""
    scores = {score: None for model in runs[0].values() for score in model}  # in order, each once
    found = [score for which in SCORES for score in scores if score.split("/")[0] == which]
    lines = ["| on the test rows | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for name in runs[0]:
        values = [[run[name][score] for run in runs if score in run[name]] for score in found]
        cells = [cell(*pair) for pair in zip(values, found, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: list[float], score: str) -> str:
    if not values:
        return ""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    digits = DIGITS.get(score, 4)
    middle = f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"
    return f"{middle} ({' '.join(f'{value:.{digits}f}' for value in values)})" if digits else middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_intermixed_args()
    root, runs, minutes = load(arguments.config, arguments.overrides).run, [], []
    for seed in range(1, arguments.seeds + 1):
        overrides = [*arguments.overrides, f"seed={seed}"]
        metrics, seconds = one_run(arguments.config, f"{root}/seed{seed}", overrides)
        runs.append(named(metrics))
        minutes.append(seconds / 60)
        print(f"seed {seed}: {seconds / 60:.1f} min", file=sys.stderr, flush=True)
    print(table(runs))
    print(f"\n{arguments.seeds} seeds, {statistics.mean(minutes):.1f} min each")


if __name__ == "__main__":
    main()
