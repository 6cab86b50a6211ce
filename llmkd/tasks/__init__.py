"""What a row is: one module per kind of task, and the module is the namespace."""

from types import ModuleType

from llmkd.tasks import classification, preference

KINDS: dict[str, ModuleType] = {"preference": preference, "classification": classification}
