"""Classification of one text."""

from collections.abc import Mapping

FIELDS: tuple[str, ...] = ("text",)
NEEDED: tuple[tuple[str, ...], ...] = (("text",),)
LABELS: tuple[str, ...] | None = None
TEMPLATE = "{text}"
TRIM: tuple[tuple[str, ...], ...] = (("text",),)
COMPUTED: tuple[str, ...] = ()


def computed(row: Mapping[str, str]) -> dict[str, str]:
    """No computed template fields: a single text has nothing to be weighed against."""
    return {}


def mirror(count: int) -> tuple[int, ...] | None:
    """None: a single text has no order to swap."""
    return None
