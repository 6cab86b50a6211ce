"""Libraries imported together: what that leaves of the garbage collector."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from llmkd import libraries


def test_what_was_imported_is_not_collected_again(tmp_path: Path) -> None:
    (tmp_path / "much.py").write_text(
        "import gc\nseen = gc.isenabled()\nmuch = [[] for _ in range(10_000)]\n"
    )
    script = """if True:
        import gc
        from llmkd import libraries
        libraries.load(["much"])
        import much
        assert not much.seen
        assert gc.isenabled()
        frozen = gc.get_freeze_count()
        assert frozen > 10_000
        libraries.load(["much"])
        assert gc.get_freeze_count() == frozen, "once is enough"
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_library_that_is_not_there_leaves_the_collector_on() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        libraries.load(["no_such_library"])
    assert gc.isenabled()
