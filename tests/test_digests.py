"""What raw files hold: told by their bytes, and read no more often than they change."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from llmkd import digests, run


def test_source_digest_follows_bytes_not_names(tmp_path: Path) -> None:
    one, two = tmp_path / "a-1.csv", tmp_path / "a-2.csv"
    one.write_text("x")
    two.write_text("y")
    both = run.source_digest(str(tmp_path / "a-*.csv"))
    assert run.source_digest(str(one)) != run.source_digest(str(two)) != both
    two.write_text("z")
    assert run.source_digest(str(tmp_path / "a-*.csv")) != both
    shutil.copy(one, tmp_path / "b.csv")
    assert run.source_digest(str(tmp_path / "b.csv")) == run.source_digest(str(one))


def test_raw_files_are_read_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "a.csv", list[Path]()

    def counted(path: Path) -> dict[str, Any]:
        read.append(path)
        return file_entry(path)

    file_entry = digests.file_entry
    monkeypatch.setattr(digests, "file_entry", counted)
    path.write_text("x")
    assert run.source_digest(str(path)) == run.source_digest(str(path))
    assert read == [path]
    path.write_text("yy")
    run.source_digest(str(path))
    assert read == [path, path]


def test_source_digest_of_what_is_no_file_is_of_its_words() -> None:
    assert run.source_digest("arena:rows=10,seed=1") == run.source_digest("arena:rows=10,seed=1")
    assert run.source_digest("arena:rows=10,seed=1") != run.source_digest("arena:rows=10,seed=2")
