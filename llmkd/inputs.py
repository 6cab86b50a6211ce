"""What stages 00 and 01 left for the later ones: rows, and models to start from, held against the config."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkd import run
from llmkd.errors import RunError
from llmkd.schema import Config
from llmkd.schema_models import Model
from llmkd.settings import is_made, prepare_settings, pretrain_settings

if TYPE_CHECKING:
    import pyarrow as pa

PREPARE, PRETRAIN, TEACHERS = "00_prepare", "01_pretrain", "02_teachers"
DISTILL, MERGE, QUANTIZE, EVALUATE = "03_distill", "04_merge", "05_quantize", "06_evaluate"


def command(config: Config, stage: str) -> str:
    """The remedy for a missing input: the command that makes it."""
    return f"run: python stages/{stage}.py {config.given}"


def rows_directory(config: Config) -> Path:
    """Stage 00's finished directory. Raises RunError where it is missing or of another config."""
    directory = Path(config.run) / PREPARE
    _check_settings(config, directory, prepare_settings(config))
    return directory


def _check_settings(config: Config, directory: Path, settings: dict[str, Any]) -> None:
    """Stages 00 and 01 read raw files, which may be large: settings are compared here, no fingerprints."""
    remedy = command(config, directory.relative_to(config.run).parts[0])
    if run.manifest(directory, remedy).get("settings") != json.loads(json.dumps(settings, default=str)):
        raise RunError(f"{directory}: made from another config; {remedy}")


def prepared(config: Config) -> tuple[pa.Table, list[str], str]:
    """Stage 00's rows, the label names and the digest of its directory."""
    directory = rows_directory(config)
    digest = run.digest(directory, command(config, PREPARE))  # before a byte of it is believed
    table = _unpacked(directory, digest)
    return table, json.loads(table.schema.metadata[b"labels"]), digest


@lru_cache(maxsize=1)
def _unpacked(directory: Path, _: str) -> pa.Table:
    """The rows, in a mapped file; a stage asks for them more than once."""
    from llmkd import mapped

    return mapped.table(directory / "rows.parquet")


def checkpoint(model: Model) -> dict[str, str]:
    """The digest of a checkpoint that lies on this disk; a hub's is known by its name."""
    named = {"": model.model, " tokenizer": model.init.tokenizer if model.init else None}
    local = {
        what: Path(name) for what, name in named.items() if isinstance(name, str) and Path(name).is_dir()
    }
    return {f"{model.name}{what}": run.checkpoint_digest(path) for what, path in local.items()}


def base(config: Config, model: Model) -> tuple[str, dict[str, str]]:
    """Where a model's weights come from before fine-tuning, and its digest where they lie on disk."""
    if not is_made(config, model):
        assert model.model is not None
        return model.model, checkpoint(model)
    directory = Path(config.run) / PRETRAIN / model.name
    _check_settings(config, directory, pretrain_settings(config, model))
    made_from = run.manifest(directory, command(config, PRETRAIN))["inputs"].get(PREPARE)
    if made_from not in (None, run.digest(rows_directory(config), command(config, PREPARE))):
        raise RunError(f"{directory}: made from other rows; {command(config, PRETRAIN)}")
    return str(directory / "model"), {
        f"{PRETRAIN}/{model.name}": run.digest(directory, command(config, PRETRAIN))
    }
