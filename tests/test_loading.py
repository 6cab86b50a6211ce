"""What a stage's process holds once it has imported all that it needs."""

import subprocess
import sys

CODE = """
import gc, weakref
from llmkd.loading import settle

class Node:
    pass

settle()
frozen = gc.get_freeze_count()
later = Node()
later.itself, seen = later, weakref.ref(later)
settle()
del later
gc.collect()
print(frozen > 1000, gc.get_freeze_count() == frozen, seen() is None)
"""


def test_what_imports_left_is_frozen_once_and_what_comes_later_is_still_collected() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]
