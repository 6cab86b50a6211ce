"""The memory model against measured peaks of small trainings; all cases: benchmarks/plan_memory.py."""

import runpy
from typing import Any

import pytest
import tiny

BENCH = runpy.run_path(str(tiny.ROOT / "benchmarks" / "plan_memory.py"))
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
SOME = {
    "llama": ("llama", {"precision": "fp32"}),
    "gemma2": ("gemma2", {"precision": "bf16", "lora": True, "checkpointing": True}),
    "bert": ("bert", {"precision": "bf16"}),
    "exits": ("llama", {"precision": "fp32", "lora": True, "method": "self_distillation"}),
}
MORE = {name: asked for name, asked in BENCH["cases"]().items() if "qwen2" not in name}


@pytest.mark.parametrize("name", SOME)
def test_a_training_needs_what_was_planned(name: str) -> None:
    architecture, more = SOME[name]
    sizes = {**BENCH["CONFIGS"][architecture], **SIZES}
    near(BENCH["case"](architecture, sizes=sizes, rows=8, length=64, **more))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_every_kind_of_training_needs_what_was_planned(name: str) -> None:
    near(MORE[name])


def near(asked: dict[str, Any]) -> None:
    """Within 15 %."""
    assert BENCH["planned"](asked) == pytest.approx(BENCH["measured"](asked), rel=0.15)
