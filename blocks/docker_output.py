"""A model's output, brought out of its container as an archive that is checked member by member.

Nothing of the host is bound to /output: a folder of the host could be filled until the disk is full, through deleted
files that no watcher sees, and would have to be read with the model's links in it. Instead /output is a memory file
system whose size and number of files the kernel limits; a second container, which sleeps and cannot write to it, keeps
it from the model's end until it was read.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from io import RawIOBase
from pathlib import Path, PurePosixPath

# Of a path below /output, in bytes: what any file system takes.
LONGEST_PATH = 1024
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


class RefusedOutput(Exception):
    """The output holds what it may not; the message says what."""


def unpack(chunks: Iterable[bytes], folder: Path, most_bytes: int, most_files: int) -> None:
    """Write the files and folders of an archive of /output into an empty folder, as files of this user.

    chunks: of a tar whose members lie below `output/`. Contents are taken, and nothing else: no owner, mode or time.
    Raises RefusedOutput for anything but plain files and folders, for names that lead out of the folder, and for more
    bytes or files than the limits; what came before is left in `folder`.
    """
    size = 0
    try:
        with tarfile.open(fileobj=_Stream(iter(chunks)), mode="r|", bufsize=2**18) as archive:
            for number, member in enumerate(archive):
                if number > most_files:
                    raise RefusedOutput(f"more than {most_files:,} files and folders")
                size += member.size
                if size > most_bytes:
                    raise RefusedOutput(f"more than {most_bytes:,} bytes, at {member.name!r}")
                _write(archive, member, folder)
    except tarfile.TarError as error:
        raise RefusedOutput(f"no readable archive ({error})") from error


def move_into(source: Path, output: Path) -> None:
    """Move what is in a folder into another. Raises RefusedOutput, before anything is moved, for a name that is there:
    it would replace what the model did not write."""
    paths = sorted(source.iterdir())
    for path in paths:
        if os.path.lexists(output / path.name):
            raise RefusedOutput(f"{path.name!r}, a name that the benchmark uses itself")
    for path in paths:
        shutil.move(path, output / path.name)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    path = folder / _below(member.name)
    if member.type == tarfile.DIRTYPE:
        path.mkdir(exist_ok=path == folder)
    elif member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and (content := archive.extractfile(member)) is not None:
        with path.open("xb") as file:
            shutil.copyfileobj(content, file, 2**18)
    else:
        raise RefusedOutput(f"{member.name!r}, which is {_KINDS.get(member.type, 'no plain file')}")


def _below(name: str) -> PurePosixPath:
    """The path below /output of a member."""
    path = PurePosixPath(name)
    if path.is_absolute() or path.parts[:1] != ("output",) or ".." in path.parts:
        raise RefusedOutput(f"{name!r}, a name that leads elsewhere")
    if len(os.fsencode(name)) > LONGEST_PATH:
        raise RefusedOutput(f"a path of more than {LONGEST_PATH} bytes, {name[:80]!r}...")
    return path.relative_to("output")


class _Stream(RawIOBase):
    """Chunks as a file that can be read once, from its beginning to its end."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = chunk
        taken = self._rest if size < 0 else self._rest[:size]
        self._rest = self._rest[len(taken) :]
        return taken
