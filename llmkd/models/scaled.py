"""What a config tells of a language model's head; for the head itself, and for a plan, which has no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# words that make a head do more than multiply and cap
SCALED = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logits_mup_width_multiplier",
    "unpadded_vocab_size",
)


def scaled_by(config: Mapping[str, Any]) -> str | None:
    """The first of those that a config sets; None where it sets none."""
    return next((name for name in SCALED if config.get(name) not in (None, 1)), None)
