"""The README.md of a finished model: hub metadata, and in plain words what it is and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkd import description
from llmkd.schema import Config
from llmkd.schema_models import NET

TAGS = ("llmkd", "distillation")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CLASSIFYING = """```python
from transformers import pipeline

classify = pipeline("text-classification", model="{name}", top_k=None{trust})
print(classify("the text, in the template the model was trained on"))
```"""
WRITING = """```python
from transformers import pipeline

write = pipeline("text-generation", model="{name}"{trust})
print(write("the beginning of a text"))
```"""
FILES = """Over a file of raw rows (.csv, .jsonl, .parquet), in its own template, both orders of a pair
averaged where it learnt both, and calibrated, as llmkd.json says:

```python
from pathlib import Path

from llmkd.predicting import predict_file

predict_file(Path("{name}"), "rows.csv", Path("predictions.parquet"){trust})
```"""
PACKED = """Packed GPTQ weights need `pip install optimum gptqmodel` in transformers. On a CPU, without them
and at the speed of a float model:

```python
from llmkd.models.artifact import load_artifact

model, tokenizer = load_artifact("{name}"{causal}{trust})
```"""
TRUSTED = """Its architecture is Python code that lies beside the weights: read it, then load with
`trust_remote_code=True` (`llmkd predict --trust-remote-code`)."""
SCORED = ("log_loss", "accuracy", "ece", "auc", "amex")
LIMITS = (
    "It repeats the errors and the preferences of its teachers and of those who labelled the rows.",
    "Scores are of rows like those it was trained on; on others it may be worse, and as sure of itself.",
    "It has the licences of its base model and of its training data; name them before passing it on.",
)


def of_config(
    config: Config, labels: Sequence[str], metrics: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The keyword arguments of `write_card` for a run's artifact; with its metrics.json, scores too."""
    asked, distill = config.quantize, config.distill_of(config.student)
    kind = config.task.kind
    trusted = [one.name for one in config.models if one.trust_remote_code]
    of = kind if config.student.is_net else "text"
    name = "quantized" if asked else "merged"
    scores = {
        f"{what}{label}": metrics[row][what]
        for row, label in (
            (name, ""),
            (f"{name}_tta", ", both orders"),
            (f"{name}_calibrated", ", calibrated"),
        )
        for what in SCORED
        if metrics and what in metrics.get(row, {})
    }
    return {
        "title": f"{config.student.name}, distilled" + (f", {asked.bits}-bit" if asked else ""),
        "facts": {
            "teachers": ", ".join(config.teachers_of(config.student)),
            "student": config.student.model if _is_hub_id(config.student.model) else config.student.name,
            "method": distill.method,
            "teachers' logits": "of next tokens" if kind == "causal_lm" else distill.view,
            "loss terms": ", ".join(f"{weight:g} {term}" for term, weight in distill.terms.items() if weight),
            "folds merged": config.folds.count,
            **(
                {
                    "bits": asked.bits,
                    "group size": asked.group_size,
                    "calibration rows": asked.calibration_rows,
                }
                if asked
                else {}
            ),
            **({} if kind == "causal_lm" else {"labels": ", ".join(labels)}),
            **(
                {"run with code of their own": f"{', '.join(trusted)} (trust_remote_code)"} if trusted else {}
            ),
        },
        "about": _about(config),
        "scores": scores,
        "limits": LIMITS,
        "base_model": config.student.model,
        "bits": asked.bits if asked else None,
        "task": "text-generation" if kind == "causal_lm" else f"{of}-classification",
        "trust_remote_code": config.student.trust_remote_code,
        "plain": not (config.student.init and config.student.init.architecture.startswith(NET)),
    }


def _about(config: Config) -> str:
    """What it reads, with the template of its texts; "" leaves it to `write_card`."""
    said = description.of_config(config)
    if not said.get("template"):
        return ""
    computed = "; reckoned from the texts: " + ", ".join(said["computed"]) if said["computed"] else ""
    return (
        f"A classifier of {said['kind']} rows, distilled from larger teachers. It reads at most "
        f"{said['max_tokens']} tokens of this template{computed}:\n\n```\n{said['template']}\n```"
    )


def write_card(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str | float | int],
    about: str = "",
    scores: Mapping[str, float] | None = None,
    limits: Sequence[str] = (),
    base_model: str | None = None,
    bits: int | None = None,
    task: str = "text-classification",
    plain: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """Write `path`/README.md and return it.

    Args:
        path: the model's directory.
        title: one line; also the name in the loading example.
        facts: how it was made, such as teachers, folds and seconds; one line each, in this order.
        about: what the model tells apart, in a sentence or two.
        scores: figures on the test part; those called as a metric also stand in the hub's metadata.
        limits: what it must not be trusted with.
        base_model: what the student was trained from; named only if it reads as a hub id, since a local
            path would mean nothing elsewhere.
        bits: of the packed weights; None for a float model.
        task: the hub's name of what it does.
        plain: whether transformers loads it without this package.
        trust_remote_code: whether loading it runs Python code that lies beside its weights.
    """
    causal = task == "text-generation"
    parts = [
        _metadata(title, base_model, bits, task, scores or {}),
        f"# {title}",
        about or f"A {'language model' if causal else 'classifier'}, distilled from larger teachers.",
        _section("How it was made", _lines(facts)),
        _section("How to load it", _loading(title, bits, causal, plain, trust_remote_code)),
        _section(
            "Scores on held-out rows",
            _lines({name: f"{value:.4f}" for name, value in (scores or {}).items()}),
        ),
        _section("Limits", "\n".join(f"- {limit}" for limit in limits)),
    ]
    card = path / "README.md"
    card.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return card


def _metadata(
    title: str, base_model: str | None, bits: int | None, task: str, scores: Mapping[str, float]
) -> str:
    """The hub's YAML; its lists of results are JSON, which YAML reads too."""
    tags = [*TAGS, *(["gptq", f"{bits}-bit"] if bits else [])]
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}"]
    if _is_hub_id(base_model):
        lines.append(f"base_model: {json.dumps(base_model)}")
    measured = [{"type": name, "value": round(scores[name], 6)} for name in SCORED if name in scores]
    if measured:
        rows = {"name": "held-out rows", "type": "held-out"}
        found = [{"task": {"type": task}, "dataset": rows, "metrics": measured}]
        lines.append(f"metrics: {json.dumps([one['type'] for one in measured])}")
        lines.append(f"model-index: {json.dumps([{'name': title, 'results': found}])}")
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _is_hub_id(name: str | None) -> bool:
    """`data/model` reads as one too, but is a path where there is such a directory."""
    return bool(name and HUB_ID.fullmatch(name) and not Path(name).exists())


def _section(heading: str, body: str) -> str:
    return f"## {heading}\n\n{body}" if body else ""


def _lines(facts: Mapping[str, str | float | int]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {_figure(value)}" for name, value in facts.items())


def _figure(value: str | float | int) -> str:
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _loading(title: str, bits: int | None, causal: bool, plain: bool, trust: bool) -> str:
    name = re.sub(r"[^\w.-]+", "-", title).strip("-").lower()
    packed = PACKED.replace("{causal}", ", causal=True" if causal else "")
    parts = [*([WRITING if causal else CLASSIFYING] if plain else []), *([packed] if bits else [])]
    parts += [] if causal else [FILES]
    code = "\n\n".join(part.replace("{name}", name) for part in parts)
    if not trust:
        return code.replace("{trust}", "")
    return f"{TRUSTED}\n\n{code.replace('{trust}', ', trust_remote_code=True')}"
