"""Folders that end with the process that made them; the next one removes what a killed process left."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

import filelock

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
    folder = parent / f"{prefix}.{platform.node()}.{token_hex(6)}"
    # The lock comes before the folder: at no moment does a folder in use look abandoned.
    with filelock.FileLock(f"{folder}.lock"):
        try:
            folder.mkdir()
            yield folder
        finally:
            _remove(folder)


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
            with suppress(filelock.Timeout), filelock.FileLock(path, blocking=False):
                _remove(path.with_suffix(""))
        except OSError as error:
            LOG.warning("what a killed process left cannot be removed: %s (%s)", path.with_suffix(""), error)


def _remove(folder: Path) -> None:
    """Remove a folder, then its lock file, which leads the next sweep to a folder that is left in between."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.with_name(f"{folder.name}.lock").unlink()
