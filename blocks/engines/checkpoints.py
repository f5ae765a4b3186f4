"""Folders in which a training, or a maker of embeddings, leaves what lets the next one continue where it was killed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blocks.config.paths import checkpoints_folder

# One that was not used for so long is removed: the code or the data have changed.
KEPT_S = 30 * 24 * 3600.0


@contextmanager
def checkpoint(key: str) -> Iterator[Path]:
    """Yield the folder of this key, as a killed holder left it, or empty; it is removed when the block ends well.

    key: of the artifact that is computed. What an error or a death leaves stays for the next holder. Entering removes
    other keys' folders that did not change for KEPT_S. The caller ensures that no two hold one key at a time.
    """
    folder = checkpoints_folder() / key
    _remove_old(folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    yield folder
    shutil.rmtree(folder)


def _remove_old(parent: Path) -> None:
    oldest = time.time() - KEPT_S
    for folder in parent.iterdir() if parent.is_dir() else ():
        # A holder renames its files, and its folder goes with its end, while others look.
        with suppress(FileNotFoundError):
            if folder.stat().st_mtime < oldest and all(path.stat().st_mtime < oldest for path in folder.rglob("*")):
                shutil.rmtree(folder, ignore_errors=True)
