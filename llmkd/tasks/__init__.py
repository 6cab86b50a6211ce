"""What a row is: one module per kind of task, and the module is the namespace."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from llmkd.tasks import causal_lm, classification, image, preference, tabular

KINDS: dict[str, ModuleType] = {
    "preference": preference,
    "classification": classification,
    "tabular": tabular,
    "image": image,
    "causal_lm": causal_lm,
}


def content(kind: str, settings: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The columns that make a row what it is: a kind's texts, a tabular row's features, an image.

    settings: the task's `features` for tabular, its `image` for image; other kinds have none.
    """
    if kind == "tabular":
        return tabular.columns(settings or {})
    return image.columns(settings or {}) if kind == "image" else tuple(KINDS[kind].FIELDS)
