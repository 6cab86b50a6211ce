"""What a run will need, told from its config before anything is loaded: `plan`, and `table` to print it."""

from llmkd.planning.engine import plan
from llmkd.planning.text import table

__all__ = ["plan", "table"]
