"""Files that are there whole or not at all, and locks that say what they wait for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

_LOG = logging.getLogger("calipert.files")

# So long another may hold a lock before a message says so.
QUIET_S = 2.0


@contextmanager
def replace_file(path: Path, suffix: str = "partial") -> Iterator[Path]:
    """Yield a path beside `path` to write to; at the end of the block it takes the place of `path` in one step.

    A reader, or a death at any moment, sees the old file or the new one. An error in the block leaves the old one.
    suffix: of the path beside; what a killed process left there is overwritten by the next one. Callers that may write
    the same file at the same time need different ones.
    """
    partial = path.with_name(f"{path.name}.{suffix}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def lock_file(path: Path, waiting_for: str) -> Iterator[None]:
    """Let one caller at a time, of all processes and threads of this machine, into the block.

    waiting_for: what a message says after QUIET_S: what another is doing meanwhile.
    """
    lock = filelock.FileLock(path)
    try:
        held = lock.acquire(timeout=QUIET_S)
    except filelock.Timeout:
        _LOG.info("%s: waiting for it", waiting_for)
        held = lock.acquire()
    with held:
        yield
