"""SHA-256 of files, each read once by a process for as long as it stays the same."""

from __future__ import annotations

import threading
from hashlib import file_digest
from pathlib import Path

from pydantic import BaseModel, ConfigDict

# (path, size, mtime in ns, inode) -> SHA-256 of every file that this process has read to check it.
_known: dict[tuple[str, int, int, int], str] = {}
_lock = threading.Lock()


class StoredFile(BaseModel):
    """One file of a folder: bytes, and SHA-256 (hex)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str


def file_checksum(path: Path, place: Path | None = None) -> str:
    """Return the SHA-256 (hex) of a file; it is read again only if its place, size, time or inode has changed.

    place: where the file will lie, if it is about to be renamed. Raises OSError as reading it does.
    """
    status = path.stat()
    identity = (str(place or path), status.st_size, status.st_mtime_ns, status.st_ino)
    with _lock:
        if identity not in _known:
            with path.open("rb") as file:
                _known[identity] = file_digest(file, "sha256").hexdigest()
        return _known[identity]


def checksum_files(folder: Path, place: Path | None = None) -> dict[str, StoredFile]:
    """Return the files of a folder by their path in it, with `/`, sorted; empty folders are left out.

    place: where the folder will lie, if it is about to be renamed. Raises ValueError for anything but regular files.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path}: the store takes regular files only")
        checksum = file_checksum(path, (place or folder) / name)
        files[name] = StoredFile(size=path.stat().st_size, sha256=checksum)
    return files
