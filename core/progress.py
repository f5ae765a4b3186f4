"""How far a long pass is, as lines of the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

LOG = logging.getLogger("calipert")
EVERY = 30.0  # seconds between two lines

T = TypeVar("T")


def log_progress(
    what: str, parts: Iterable[tuple[slice, T]], total: int, of: str = "cells"
) -> Iterator[tuple[slice, T]]:
    """Hand the parts of a pass on, and log how many of all `total` cells are behind, at most every half minute.

    Parameters
    ----------
    what : str
        What is counted, for the log.
    parts : Iterable[tuple[slice, T]]
        Cells (a slice of their positions, ascending) and what there is of them.
    total : int
        Of all parts together.
    of : str
        What else the slices count.

    Yields
    ------
    Iterator[tuple[slice, T]]
    """
    began = said = time.monotonic()
    for span, part in parts:
        yield span, part
        now = time.monotonic()
        if now - said > EVERY:
            said = now
            LOG.info("%s: %s of %s %s", what, f"{span.stop:,}", f"{total:,}", of)
    LOG.debug("%s: %s %s in %.1f s", what, f"{total:,}", of, time.monotonic() - began)
