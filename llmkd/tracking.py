"""Curves and figures of a run in TensorBoard, W&B or MLflow, by the Trainer's own integrations.

Rank 0 alone writes. What they are told are settings and numbers: no texts of rows, no path but a config's.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkd import ranks
from llmkd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import TrainerCallback

TRACKING = "tracking"  # beside a run's units, so that no manifest tells of it


@dataclass(frozen=True)
class Track:
    """Where to (a config's `tracking:`), the run's directory, the unit's place in it, its settings."""

    to: str
    run: Path
    unit: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.run.name}/{self.unit}"

    @property
    def directory(self) -> Path:
        return self.run / TRACKING


Log = Callable[[Mapping[str, float], int], None]  # figures by name, and the step


def check(to: str) -> None:
    """Raises ConfigError where a tracker's package is missing; it bears the tracker's name."""
    try:
        importlib.metadata.version(to) if to != "none" else None
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"tracking = {to!r}: not installed; pip install {to}, or tracking: none") from None


@contextmanager
def tracked(
    track: Track | None, scores: Callable[[], list[dict[str, float]]], *, resumed: bool
) -> Iterator[list[TrainerCallback]]:
    """The callbacks of one training: what the Trainer logs, and the development scores as they come.

    scores: [{step, dev_log_loss}] so far. resumed: an earlier process's events of this training are kept.
    """
    if track is None or track.to == "none" or not ranks.is_main():
        yield []
        return
    with OPENED[track.to](track, resumed) as (theirs, log):
        yield [_callback(track, theirs, log, scores)]


def record(track: Track, metrics: Mapping[str, Any]) -> None:
    """The final figures of a unit, by dotted names with slashes; what is no number is left out."""
    if track.to == "none" or not ranks.is_main():
        return
    with OPENED[track.to](track, False) as (_, log):
        log(numbers(metrics), 0)


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"student": {"log_loss": 0.9}} as {"student/log_loss": 0.9}."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[f"{prefix}{name}"] = float(value)
    return found


def _callback(
    track: Track, theirs: Any, log: Log, scores: Callable[[], list[dict[str, float]]]
) -> TrainerCallback:
    """The integration's own callback, and the development scores beside it.

    It is told the unit for a directory and shown no model, whose config names the path it was loaded from.
    """
    from transformers import TrainerCallback

    class Tracked(TrainerCallback):
        told = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            shown = copy.copy(args)
            shown.output_dir, shown.run_name = track.unit, track.name
            theirs.on_train_begin(shown, state, control, **{**kwargs, "model": None})
            self.told = len(scores())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for entry in scores()[self.told :]:
                log({"eval/dev_log_loss": entry["dev_log_loss"]}, int(entry["step"]))
            self.told = len(scores())

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            theirs.on_log(args, state, control, **kwargs)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            theirs.on_train_end(args, state, control, **kwargs)

    return Tracked()


@contextmanager
def _tensorboard(track: Track, resumed: bool) -> Iterator[tuple[Any, Log]]:
    """Event files in tracking/<unit>/ of the run."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    directory = track.directory / track.unit
    if not resumed:
        shutil.rmtree(directory, ignore_errors=True)
    writer = SummaryWriter(str(directory))  # type: ignore[no-untyped-call]
    writer.add_text(
        "config", f"    {json.dumps(track.settings, indent=1, default=str)}".replace("\n", "\n    ")
    )

    def log(figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    try:
        yield TensorBoardCallback(writer), log
    finally:
        writer.close()


@contextmanager
def _wandb(track: Track, resumed: bool) -> Iterator[tuple[Any, Log]]:
    """A run of the project WANDB_PROJECT, `llmkd` by default; no console output and no code go with it."""
    import wandb  # type: ignore[import-not-found]
    from transformers.integrations.integration_utils import WandbCallback

    track.directory.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "llmkd"),
        group=track.run.name,
        name=track.name,
        dir=str(track.directory),
        config={"config": dict(track.settings)},
        settings=wandb.Settings(
            console="off", save_code=False, disable_git=True, disable_code=True, x_disable_meta=True
        ),
    )

    def log(figures: Mapping[str, float], step: int) -> None:
        run.log({**figures, "train/global_step": step})

    with run:
        yield WandbCallback(), log


@contextmanager
def _mlflow(track: Track, resumed: bool) -> Iterator[tuple[Any, Log]]:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME, by default the run's name, where MLFLOW_TRACKING_URI
    says; by default a SQLite file in the run's tracking/."""
    import mlflow  # type: ignore[import-not-found]
    from transformers.integrations.integration_utils import MLflowCallback

    track.directory.mkdir(parents=True, exist_ok=True)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{track.directory / 'mlflow.db'}")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", track.run.name))
    source = {"mlflow.source.name": track.unit.split("/")[0]}  # or it would be the script's path
    with mlflow.start_run(run_name=track.name, tags=source):
        mlflow.set_tags({f"config.{name}": str(value)[:5000] for name, value in track.settings.items()})
        yield MLflowCallback(), lambda figures, step: mlflow.log_metrics(dict(figures), step=step)


OPENED: dict[str, Callable[[Track, bool], AbstractContextManager[tuple[Any, Log]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
