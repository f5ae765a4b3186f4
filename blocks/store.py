"""The artifact store: folders of files, each named by the hash of what produced it, whole or not there."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import filelock
from prefect.blocks.core import Block
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blocks.checksums import file_checksum
from blocks.paths import store_folder
from core.errors import UserError

JSON: TypeAlias = "str | int | float | bool | list[JSON] | tuple[JSON, ...] | Mapping[str, JSON] | None"

SCHEMA = 1
MANIFEST = "manifest.json"

_LOG = logging.getLogger("calipert.store")
_KIND = re.compile(r"[a-z][a-z0-9_-]*")
_KEY = re.compile(r"[0-9a-f]{64}")
# Beside the kinds, so that publishing is a rename within one file system. The dot keeps them apart.
_TEMPORARY = ".temporary"
_LOCKS = ".locks"


def artifact_key(kind: str, inputs: Mapping[str, str], parameters: Mapping[str, JSON], code: str) -> str:
    """SHA-256 (hex) of what produces an artifact: its name in the store.

    inputs: name -> key or checksum of what goes in. parameters: JSON values; the order of names does not
    count, floats count to the last bit, 1 and 1.0 differ, tuples count as lists. code: see
    blocks.code.code_hash.
    Raises TypeError for a value that is not JSON, ValueError for NaN and infinities, which JSON cannot hold.
    """
    recipe = {"kind": kind, "inputs": inputs, "parameters": parameters, "code": code}
    text = json.dumps(_plain(recipe, ""), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()


class ManifestFile(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is made of and from. Two equal artifacts differ in `created` (UTC) at most."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int
    kind: str
    key: str
    inputs: dict[str, str]
    parameters: dict[str, Any]
    code: str
    files: dict[str, ManifestFile]
    created: datetime


class ArtifactStore(Block):
    """Content-addressed artifacts in a folder: <root>/<kind>/<key>/ with a manifest.json and read-only files.

    An artifact appears by one atomic rename after everything in it has reached the disk; one with a valid
    manifest is never computed again. Callers touch only the folder that they are handed.
    """

    _block_type_name = "Calipert artifact store"
    _block_type_slug = "calipert-artifact-store"

    root: str = Field(default_factory=lambda: str(store_folder()), description="Folder of the store.")

    def obtain(
        self,
        kind: str,
        key: str,
        build: Callable[[Path], None],
        *,
        inputs: Mapping[str, str],
        parameters: Mapping[str, JSON],
        code: str,
    ) -> Path:
        """The folder of an artifact; `build` is called with an empty folder to fill if there is none yet.

        Every file is checked against its checksum (once per process, as long as it does not change). A
        damaged artifact is removed and built again, with a warning. Who asks for a key that another process
        or thread of this host is building waits for it; should two hosts build one key, the first to publish
        wins and both get its folder. A build that fails or is killed leaves nothing under the key; what a killed
        one left elsewhere is removed when the key is built again.
        Raises ValueError if `key` is not the key of the recipe or `build` leaves anything but regular files,
        UserError if the disk is full or the folder cannot be written (what it already holds can be used all the
        same), and whatever `build` raises.
        """
        if key != artifact_key(kind, inputs, parameters, code):
            raise ValueError(f"{key} is not the key of this {kind}'s inputs, parameters and code")
        final = self._folder(kind, key)
        manifest = Manifest(
            schema_version=SCHEMA,
            kind=kind,
            key=key,
            inputs=dict(inputs),
            parameters={name: _plain(value, name) for name, value in parameters.items()},
            code=code,
            files={},
            created=datetime.now(UTC),
        )
        try:
            return final if _damage(final, kind, key) is None else self._built(final, manifest, build)
        except Exception as error:
            if _out_of_space(error):
                raise self._full(kind) from error
            if _no_permission(error, Path(self.root)):
                raise self._read_only(kind, error) from error
            raise

    def _full(self, kind: str) -> UserError:
        free = shutil.disk_usage(_existing(Path(self.root))).free
        return UserError(
            self.root,
            "free disk space",
            f"the disk was full before this artifact ({kind}) was complete; with its unfinished files removed,"
            f" {free / 1e6:,.1f} MB are free, and it needs more than that",
            "free some space, or move the data folder to a larger disk (environment CALIPERT_DATA)",
        )

    def _read_only(self, kind: str, error: BaseException) -> UserError:
        return UserError(
            self.root,
            "folder of the store",
            f"no permission to put an artifact ({kind}) there ({error})",
            "let the user that calipert runs as write there, or name another data folder (environment"
            " CALIPERT_DATA); what the store already holds can be used as it is",
        )

    def _folder(self, kind: str, key: str) -> Path:
        if not _KIND.fullmatch(kind):
            raise ValueError(f"{kind!r} is not a kind: lower-case letters, digits, _ and -")
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a key: 64 hexadecimal digits")
        return Path(self.root) / kind / key

    @contextmanager
    def _lock(self, kind: str, key: str) -> Iterator[None]:
        folder = Path(self.root) / _LOCKS / kind
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / key)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            _LOG.info("%s %s is being computed elsewhere: waiting for it", kind, key)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _temporary(self, kind: str, key: str) -> Path:
        folder = Path(self.root) / _TEMPORARY / kind
        folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=_prefix(key), dir=folder))

    def _remove_remains(self, kind: str, key: str) -> None:
        """Removes what killed builders of this host left. Only under the key's lock, which no live one then holds;
        the locks of a shared folder need not reach another host."""
        folder = Path(self.root) / _TEMPORARY / kind
        for left in folder.iterdir() if folder.exists() else ():
            if left.name.startswith(_prefix(key)):
                shutil.rmtree(left)

    def _discard(self, folder: Path, kind: str, key: str) -> None:
        # Renamed first: half an artifact is never seen under its name, even if this process dies on the way.
        aside = self._temporary(kind, key)
        folder.rename(aside / folder.name)
        shutil.rmtree(aside)

    def _built(self, final: Path, manifest: Manifest, build: Callable[[Path], None]) -> Path:
        kind, key = manifest.kind, manifest.key
        with self._lock(kind, key):
            self._remove_remains(kind, key)
            # Checked again under the lock, and again whenever another host has published in the meantime.
            while (damage := _damage(final, kind, key)) is not None:
                if final.exists():
                    _LOG.warning("%s %s is damaged (%s): computing it again", kind, key, damage)
                    self._discard(final, kind, key)
                temporary = self._temporary(kind, key)
                try:
                    content = temporary / "content"
                    content.mkdir()
                    build(content)
                    _seal(content, manifest, final)
                    _publish(content, final)
                finally:
                    shutil.rmtree(temporary)
        return final


def _prefix(key: str) -> str:
    """How the temporary folders begin in which this host builds a key."""
    return f"{key}.{platform.node()}."


def _plain(value: object, where: str) -> object:
    """The value in dicts, lists and scalars. Nothing but JSON gets in: json.dumps would write the name 1 as
    "1" and let two recipes share one key."""
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"{where or 'recipe'}: the name {name!r} is not a string")
        return {name: _plain(item, f"{where}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{where}: {value!r} is not a JSON value")


def _manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None


def _damage(folder: Path, kind: str, key: str) -> str | None:
    """What is wrong with an artifact, None if nothing is."""
    manifest = _manifest(folder)
    if manifest is None:
        return "no readable manifest"
    if manifest.schema_version != SCHEMA:
        return f"its manifest has schema {manifest.schema_version}, not {SCHEMA}"
    if key != artifact_key(kind, manifest.inputs, manifest.parameters, manifest.code):
        return "its manifest belongs to another artifact"
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            status = path.stat()
            if status.st_size != expected.size:
                return f"{name} has {status.st_size} bytes, not {expected.size}"
            if file_checksum(path) != expected.sha256:
                return f"{name} has changed"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _seal(content: Path, manifest: Manifest, final: Path) -> None:
    """Makes the built files read-only and durable, then writes the manifest, last."""
    files = {}
    for path in sorted(content.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(content).as_posix()
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{name}: an artifact holds regular files only")
        if name == MANIFEST:
            raise ValueError(f"{name}: the store writes this file itself")
        path.chmod(0o444)
        _sync(path)
        status = path.stat()
        files[name] = ManifestFile(size=status.st_size, sha256=file_checksum(path, final / name))
    sealed = manifest.model_copy(update={"files": files})
    path = content / MANIFEST
    path.write_text(sealed.model_dump_json(indent=1), encoding="utf-8")
    path.chmod(0o444)
    _sync(path)
    for folder in (content, *(path for path in content.rglob("*") if path.is_dir())):
        _sync(folder)


def _publish(content: Path, final: Path) -> None:
    """One atomic rename. It fails if the name is taken, since a rename never replaces a folder that holds
    files; then what stands there is another builder's, published first."""
    final.parent.mkdir(exist_ok=True)
    try:
        content.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk or quota is behind an error; libraries such as HDF5 report it in their text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _no_permission(error: BaseException, root: Path) -> bool:
    """Whether the file system, or the rights of a folder, forbade to write in the store or to make it."""
    if not isinstance(error, OSError) or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
        return False
    place = Path(str(error.filename))
    return place.is_relative_to(root) or root.is_relative_to(place)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())
