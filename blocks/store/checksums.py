"""SHA-256 of files, each read once by a process for as long as it stays the same."""

from __future__ import annotations

import threading
from hashlib import file_digest
from pathlib import Path

# (path, size, mtime in ns, inode) -> SHA-256 of every file that this process has read to check it.
_known: dict[tuple[str, int, int, int], str] = {}
_lock = threading.Lock()


def file_checksum(path: Path, place: Path | None = None) -> str:
    """SHA-256 (hex) of a file; read again only if its place, size, time or inode has changed.

    place: where the file will lie, if it is about to be renamed. Raises OSError as reading it does.
    """
    status = path.stat()
    identity = (str(place or path), status.st_size, status.st_mtime_ns, status.st_ino)
    with _lock:
        if identity not in _known:
            with path.open("rb") as file:
                _known[identity] = file_digest(file, "sha256").hexdigest()
        return _known[identity]
