"""What boosted trees read of a row: its features, or what can be computed of its texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmkd import tasks
from llmkd.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa


def feature_columns(
    table: pa.Table, kind: str, columns: Sequence[str] = (), fields: Sequence[str] | None = None
) -> dict[str, list[Any]]:
    """Named columns of N values: of `columns` and of a kind's computed fields those that `fields` names.

    By default the computed fields that are no running words, or all columns where a kind computes none.

    Raises ConfigError where `fields` names none of them, and where there are none at all.
    """
    task = tasks.KINDS[kind]
    found: dict[str, list[Any]] = {name: table[name].to_pylist() for name in columns}
    default = list(columns)
    if task.COMPUTED:
        rows = table.select([*task.FIELDS, *columns]).to_pylist()
        computed = [task.computed(row) for row in rows]
        found |= {name: [row[name] for row in computed] for name in task.COMPUTED}
        default = [name for name in task.COMPUTED if name not in task.WORDY]
    unknown = sorted(set(fields or ()) - set(found))
    if unknown or not found:
        raise ConfigError(
            f"fields: no {', '.join(unknown) or 'feature'} among those of {kind} rows: {', '.join(found)}"
        )
    return {name: found[name] for name in fields or default}
