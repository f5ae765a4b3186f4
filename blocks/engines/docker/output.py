"""What a model writes, brought out of its container as an archive that is checked member by member.

Nothing of the host is bound to /output or /checkpoint: a folder of the host could be filled until the disk is full,
through deleted files that no watcher sees, and would have to be read with the model's links in it. Instead each is a
memory file system whose size and number of files the kernel limits; a second container, which sleeps and cannot write
to it, keeps it while the model's own does not run.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

from docker.models.containers import Container

from blocks.engines.docker.limits import Limits

# Of a member's path, in bytes: what any file system takes.
LONGEST_PATH = 1024
CHUNK = 2**20
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


class RefusedOutput(Exception):
    """The output holds what it may not; the message says what."""


class Member(NamedTuple):
    """A file or folder. path: below the folder that was archived. content: None for a folder. size: in bytes."""

    path: PurePosixPath
    content: IO[bytes] | None
    size: int


@contextmanager
def open_folder(
    container: Container, place: str, limits: Limits, check: Callable[[], None]
) -> Iterator[Iterator[Member]]:
    """Yield what is in a folder of a container, as `read_members` does.

    check: called while it is read; what it raises ends that. What is refused is not read to its end: the engine removes
    no container while it is being read.
    """

    def check_each(chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            check()
            yield chunk

    with closing(container.get_archive(place, chunk_size=CHUNK)[0]) as chunks:
        yield read_members(check_each(chunks), place, int(limits.output), limits.output_files)


def read_members(chunks: Iterable[bytes], root: str, most_bytes: int, most_files: int) -> Iterator[Member]:
    """Yield the files and folders in an archive of a folder, each checked; a content can be read until the next one.

    chunks: of the tar. root: the folder's path in its container; the folder itself is left out.
    Raises RefusedOutput for anything but plain files and folders, for names that lead out of the folder, and for more
    bytes or files than the limits; TarError where the archive cannot be read.
    """
    size, left = 0, filter(None, chunks)
    stream: Any = SimpleNamespace(read=lambda _: next(left, b""))
    with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as archive:
        for number, member in enumerate(archive):
            if number > most_files:
                raise RefusedOutput(f"more than {most_files:,} files and folders")
            size += member.size
            if size > most_bytes:
                raise RefusedOutput(f"more than {most_bytes:,} bytes, at {member.name!r}")
            path = _locate(member.name, PurePosixPath(root).name)
            content = _open_content(archive, member)
            if path != PurePosixPath():
                yield Member(path, content, member.size)


@contextmanager
def _refuse_broken_archive() -> Iterator[None]:
    """Turn an archive that breaks off, which may be within a content, into RefusedOutput."""
    try:
        yield
    except tarfile.TarError as error:
        raise RefusedOutput(f"no readable archive ({error})") from error


@_refuse_broken_archive()
def unpack(found: Iterable[Member], folder: Path) -> None:
    """Write files and folders into an empty folder, as files of this user.

    Contents are taken, and nothing else: no owner, mode or time. Raises RefusedOutput where `read_members` refuses one
    or the archive cannot be read; what came before is left.
    """
    for member in found:
        path = folder / member.path
        if member.content is None:
            path.mkdir()
        else:
            with path.open("xb") as file:
                shutil.copyfileobj(member.content, file, 2**18)


@_refuse_broken_archive()
def repack(found: Iterable[Member], path: Path, uid: int, gid: int) -> None:
    """Write files and folders into a tar, as those of a user.

    Contents are taken, and nothing else. Raises as `unpack` does; a tar without an end is left.
    """
    # Of the formats the one that keeps names that are no UTF-8.
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for member in found:
            info = tarfile.TarInfo(str(member.path))
            info.uid, info.gid, info.size = uid, gid, member.size
            info.type, info.mode = (tarfile.DIRTYPE, 0o755) if member.content is None else (tarfile.REGTYPE, 0o644)
            archive.addfile(info, member.content)


def move_into(source: Path, output: Path) -> None:
    """Move what is in a folder into another.

    Raises RefusedOutput, before anything is moved, for a name that is there: it would replace what the model did not
    write.
    """
    paths = sorted(source.iterdir())
    for path in paths:
        if os.path.lexists(output / path.name):
            raise RefusedOutput(f"{path.name!r}, a name that the benchmark uses itself")
    for path in paths:
        shutil.move(path, output / path.name)


def _open_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes] | None:
    """Return what is in a file; None for a folder."""
    if member.type == tarfile.DIRTYPE:
        return None
    if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and (content := archive.extractfile(member)) is not None:
        return content
    raise RefusedOutput(f"{member.name!r}, which is {_KINDS.get(member.type, 'no plain file')}")


def _locate(name: str, root: str) -> PurePosixPath:
    """Return the path of a member below the folder that was archived."""
    path = PurePosixPath(name)
    if path.is_absolute() or path.parts[:1] != (root,) or ".." in path.parts:
        raise RefusedOutput(f"{name!r}, a name that leads elsewhere")
    if len(os.fsencode(name)) > LONGEST_PATH:
        raise RefusedOutput(f"a path of more than {LONGEST_PATH} bytes, {name[:80]!r}...")
    return path.relative_to(root)
