"""What boosted trees read of a row: its features, or what can be computed of its texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmkd import mapped, tasks
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
    known = [*columns, *task.COMPUTED]
    unknown = sorted(set(fields or ()) - set(known))
    if unknown or not known:
        raise ConfigError(
            f"fields: no {', '.join(unknown) or 'feature'} among those of {kind} rows: {', '.join(known)}"
        )
    default = [name for name in task.COMPUTED if name not in task.WORDY] if task.COMPUTED else list(columns)
    found: dict[str, list[Any]] = {name: [] for name in fields or default}
    computed = [name for name in found if name in task.COMPUTED]
    for start in range(0, len(table), mapped.BATCH) if computed else ():  # some rows' texts at a time
        for row in table.select([*task.FIELDS, *columns]).slice(start, mapped.BATCH).to_pylist():
            values = task.computed(row)
            for name in computed:
                found[name].append(values[name])
    return {name: found[name] if name in computed else table[name].to_pylist() for name in found}
