"""Every shipped config loads."""

from pathlib import Path

import pytest

from llmkd.config import load

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def test_configs_are_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_runs_under_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths in a config are relative to where a stage is started
    config = load(path)
    assert config.run.startswith("runs/")
    assert not Path(config.task.train).is_absolute()
