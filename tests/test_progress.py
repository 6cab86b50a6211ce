"""Bars: what is counted comes through whole, and is shown once it takes long."""

from typing import Any

import pytest

from llmkd import progress


def test_a_bar_gives_its_items_and_shows_how_many_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = progress.tqdm
    monkeypatch.delenv("TQDM_DISABLE", raising=False)

    def at_once(items: Any, what: str, **more: Any) -> Any:
        assert more["delay"] == 5
        return real(items, what, **{**more, "delay": 0, "mininterval": 0, "disable": more["disable"]})

    monkeypatch.setattr(progress, "tqdm", at_once)
    assert list(progress.bar([3, 4], "rows")) == [3, 4]
    shown = capfd.readouterr().err
    assert "rows:" in shown
    assert "1/2 [" in shown
    monkeypatch.setenv("RANK", "1")
    assert list(progress.bar([3, 4], "rows")) == [3, 4]
    assert capfd.readouterr().err == ""
