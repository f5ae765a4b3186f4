"""How much of this machine a step may use."""

from __future__ import annotations

import os

from core.errors import UserError

VARIABLE = "CALIPERT_MEMORY_GB"
DEFAULT_GB = 2.0
LEAST_GB = 0.25


def chunk_memory() -> int:
    """Bytes that the chunks of a raw matrix may take while it is prepared: CALIPERT_MEMORY_GB, by default 2 GB.

    It decides how fast a file is read, never what is read. Raises UserError for what is no number, or too small.
    """
    text = os.environ.get(VARIABLE, str(DEFAULT_GB))
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not LEAST_GB <= gigabytes < float("inf"):
        raise UserError(VARIABLE, "value", repr(text), f"a number of gigabytes of at least {LEAST_GB}, as in 2")
    return int(gigabytes * 1e9)
