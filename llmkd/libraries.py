"""The libraries that stages work with, imported together before they do."""

import gc
import sys
from collections.abc import Sequence
from importlib import import_module

ROWS = ("llmkd.sources", "llmkd.rows", "pyarrow.parquet", "sklearn.model_selection")
WEIGHTS = ("transformers.modeling_utils", "peft", "deepspeed")  # accelerate asks the last of each saved model
MODELS = ("llmkd.crossfit", "llmkd.train", "llmkd.models.load")
# but for gptqmodel, which starts threads that no fork keeps
ALL = (*ROWS, *WEIGHTS, *MODELS, "llmkd.judging", "llmkd.quantize", "sklearn.metrics")


def load(modules: Sequence[str] = MODELS) -> None:
    """Import modules, and leave what they hold out of every later garbage collection.

    Hundreds of thousands of objects come to stay, and collecting among them takes a fifth of the time. In a
    fork, looking at them would copy the memory that holds them.
    """
    if all(name in sys.modules for name in modules):
        return
    gc.disable()
    try:
        for name in modules:
            import_module(name)
        gc.freeze()
    finally:
        gc.enable()
