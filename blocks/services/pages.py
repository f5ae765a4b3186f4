"""Reading long lists from a Prefect server, which gives a part of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

PAGE = 200  # entries that the server gives at once

T = TypeVar("T")


def read_pages(read: Callable[..., Sequence[T]], **query: Any) -> list[T]:
    """All entries that a reading method of Prefect's client finds for a query, in its order."""
    found: list[T] = []
    while page := read(**query, limit=PAGE, offset=len(found)):
        found += page
    return found
