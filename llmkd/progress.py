"""A bar with the time left, on the first rank alone."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from llmkd import ranks

Item = TypeVar("Item")


def bar(items: Iterable[Item], what: str) -> Iterable[Item]:
    """The items, with a bar from the fifth second on, which goes with the last of them."""
    return tqdm(items, what, delay=5, leave=False, disable=not ranks.is_main())
