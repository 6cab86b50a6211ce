"""The further outputs of a student that has several: exits at some depths, or a head a kind of label."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def outputs(model: Any, directory: Path) -> Iterator[tuple[str, nn.Module]]:
    """Each output's name, and a model that gives it; nothing where the model has only its own.

    An exit is the model cut to its first layers, so taking it costs no more than these.
    """
    from llmkd.models.exits import FILE, load_exits, truncate

    packed = getattr(model.config, "quantization_config", None)  # on a GPU: its layers cannot be taken out
    exits = load_exits(directory) if (directory / FILE).is_file() and not packed else {}
    for depth, head in exits.items():
        yield f"exit {depth}", truncate(model, depth, head)
    if getattr(model.config, "heads", 1) > 1:
        shipped = model.config.take
        for take in ("hard", "soft", "mean"):
            model.config.take = take
            yield take, model
        model.config.take = shipped
