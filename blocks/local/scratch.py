"""Folders that end with the process that made them; the next one removes what a killed process left."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

LOG = logging.getLogger("calipert.scratch")


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """Make an empty folder `<parent>/<prefix>.<host>.<random>` that is removed at the end of the block.

    A lock on the file `<folder>.lock` says that its process lives; the kernel frees it with the process. Entering
    makes `parent` if it is missing and first removes, as `sweep` does, what no process holds any more.
    Raises OSError if the folder cannot be made, or not be removed at the end.
    """
    sweep(parent, prefix)
    parent.mkdir(parents=True, exist_ok=True)
    folder, lock = _held(parent, prefix)
    try:
        try:
            folder.mkdir()
            yield folder
        finally:
            _remove(folder)
    finally:
        os.close(lock)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the folders of `scratch` under a parent whose process has ended.

    Those in use, of another prefix or of another host stay: a lock on a shared disk need not reach another host. A
    folder that cannot be removed stays, with a warning.
    """
    start = f"{prefix}.{platform.node()}."
    for path in parent.glob("*.lock") if parent.is_dir() else ():
        # A point behind the prefix and the host: those of a longer host's name.
        if not path.name.startswith(start) or "." in path.stem.removeprefix(start):
            continue
        try:
            _remove_unless_held(path)
        except OSError as error:
            LOG.warning("what a killed process left cannot be removed: %s (%s)", path.with_suffix(""), error)


def _held(parent: Path, prefix: str) -> tuple[Path, int]:
    """Return a new folder's path, and the descriptor that holds its lock.

    The lock comes before the folder: at no moment does a folder in use look abandoned.
    """
    while True:
        folder = parent / f"{prefix}.{platform.node()}.{token_hex(6)}"
        path = folder.with_name(f"{folder.name}.lock")
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _names(path, lock):
                return folder, lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # a sweep came between the two steps and took the file for an abandoned one


def _remove_unless_held(path: Path) -> None:
    """Remove a lock file and its folder unless a living process, this one included, holds the lock."""
    try:
        lock = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return  # its owner, or another sweep, was faster
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if _names(path, lock):
            _remove(path.with_suffix(""))
    finally:
        os.close(lock)


def _names(path: Path, descriptor: int) -> bool:
    """Whether the path still names the file that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(folder: Path) -> None:
    """Remove a folder, then its lock file, which leads the next sweep to a folder that is left in between."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.with_name(f"{folder.name}.lock").unlink()
