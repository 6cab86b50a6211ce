"""The README.md of a finished model: hub metadata, and in plain words what it is and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

TAGS = ("llmkd", "distillation")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LOADING = """```python
from transformers import pipeline

classify = pipeline("text-classification", model="{name}", top_k=None)
print(classify("{example}"))
```"""
WRITING = """```python
from transformers import pipeline

write = pipeline("text-generation", model="{name}")
print(write("{example}"))
```"""
PACKED = """Packed GPTQ weights need `pip install optimum gptqmodel` in transformers. On a CPU, without them
and at the speed of a float model:

```python
from llmkd.models.artifact import load_artifact

model, tokenizer = load_artifact("{name}"{causal})
```"""


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
    causal: bool = False,
) -> Path:
    """Write `path`/README.md and return it.

    Args:
        path: the model's directory.
        title: one line; also the name in the loading example.
        facts: how it was made, such as teachers, folds and seconds; one line each, in this order.
        about: what the model tells apart, in a sentence or two.
        scores: figures on the test part.
        limits: what it must not be trusted with.
        base_model: what the student was trained from; named only if it reads as a hub id, since a local
            path would mean nothing elsewhere.
        bits: of the packed weights; None for a float model.
        causal: whether it is a language model, and no classifier.
    """
    parts = [
        _metadata(base_model, bits, causal),
        f"# {title}",
        about
        or f"A {'language model' if causal else 'sequence classifier'}, distilled from larger teachers.",
        _section("How it was made", _lines(facts)),
        _section("How to load it", _loading(title, bits, causal)),
        _section("Scores", _lines({name: f"{value:.4f}" for name, value in (scores or {}).items()})),
        _section("Limits", "\n".join(f"- {limit}" for limit in limits)),
    ]
    card = path / "README.md"
    card.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return card


def _metadata(base_model: str | None, bits: int | None, causal: bool) -> str:
    tags = [*TAGS, *(["gptq", f"{bits}-bit"] if bits else [])]
    task = "text-generation" if causal else "text-classification"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}"]
    if base_model and HUB_ID.fullmatch(base_model):
        lines.append(f"base_model: {json.dumps(base_model)}")
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _section(heading: str, body: str) -> str:
    return f"## {heading}\n\n{body}" if body else ""


def _lines(facts: Mapping[str, str | float | int]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {_figure(value)}" for name, value in facts.items())


def _figure(value: str | float | int) -> str:
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _loading(title: str, bits: int | None, causal: bool) -> str:
    name = re.sub(r"[^\w.-]+", "-", title).strip("-").lower()
    use = (WRITING if causal else LOADING).format(
        name=name, example="the text, in the template the model was trained on"
    )
    packed = PACKED.format(name=name, causal=", causal=True" if causal else "")
    return f"{use}\n\n{packed}" if bits else use
