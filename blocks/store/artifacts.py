"""The artifact store: folders of files, each named by the hash of what produced it, whole or not there.

docs/store.md says how it lies on the disk and in a bucket, and what is certain of it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from blocks.config.paths import store_folder
from blocks.config.settings import read_settings
from blocks.local.files import lock_file
from blocks.local.scratch import scratch, sweep
from blocks.store.bucket import DamagedFolder, ObjectStore
from blocks.store.checksums import StoredFile, checksum_files, file_checksum
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
_SCRATCH = "artifact"
# What this process (by its id) knows to be in which bucket.
_shared: set[tuple[int, str | None, str]] = set()


def artifact_key(kind: str, inputs: Mapping[str, str], parameters: Mapping[str, JSON], code: str) -> str:
    """Return the SHA-256 (hex) of what produces an artifact: its name in the store.

    inputs: name -> key or checksum of what goes in. parameters: JSON values; the order of names does not
    count, floats count to the last bit, 1 and 1.0 differ, tuples count as lists. code: see
    blocks.store.code.code_hash.
    Raises TypeError for a value that is not JSON, ValueError for NaN and infinities, which JSON cannot hold.
    """
    recipe = {"kind": kind, "inputs": inputs, "parameters": parameters, "code": code}
    text = json.dumps(_to_json(recipe, ""), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()


class Manifest(BaseModel):
    """What an artifact is made of and from. Two equal artifacts differ in `created` (UTC) at most."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int
    kind: str
    key: str
    inputs: dict[str, str]
    parameters: dict[str, Any]
    code: str
    files: dict[str, StoredFile]
    created: datetime


@dataclass(frozen=True)
class ArtifactStore:
    """Content-addressed artifacts in a folder, <root>/<kind>/<key>/ with a manifest.json and read-only files.

    remote: s3://bucket/prefix that several machines share, of which the folder then is the cache; None where the store
    is this machine's alone. An artifact appears by one atomic rename after everything in it has reached the disk, in
    the bucket by its index, uploaded last; one with a valid manifest is never computed again. Callers touch only the
    folder that they get.
    """

    root: str = field(default_factory=lambda: str(store_folder()))
    remote: str | None = field(default_factory=lambda: read_settings().store)

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
        """Return the folder of an artifact, and build it first where it is neither here nor in the bucket.

        build: called with an empty folder to fill.
        Every file is checked against its checksum (once per process, as long as it does not change). A
        damaged artifact is removed and built again, with a warning. A caller waits while another process
        or thread of this host builds the same key; should two hosts build one key, each keeps its own folder,
        and the first to upload has its artifact in the bucket. A build that fails or is killed leaves nothing under
        the key; what a killed process left elsewhere is removed by the next one.
        Raises ValueError if `key` is not the key of the recipe or `build` leaves anything but regular files,
        UserError if the disk is full, the folder cannot be written (what it already holds can be used all the
        same) or the bucket cannot be used (what was built stays, and is uploaded the next time), and whatever `build`
        raises.
        """
        if key != artifact_key(kind, inputs, parameters, code):
            raise ValueError(f"{key} is not the key of this {kind}'s inputs, parameters and code")
        final, created = self._folder(kind, key), datetime.now(UTC)
        # As they are now: the key is theirs, whatever `build` does with them.
        own_inputs, own_parameters = dict(inputs), {name: _to_json(value, name) for name, value in parameters.items()}

        def make(content: Path) -> None:
            build(content)
            files = checksum_files(content, final)
            if MANIFEST in files:
                raise ValueError(f"{MANIFEST}: the store writes this file itself")
            manifest = Manifest(
                schema_version=SCHEMA,
                kind=kind,
                key=key,
                inputs=own_inputs,
                parameters=own_parameters,
                code=code,
                files=files,
                created=created,
            )
            (content / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
            _settle(content)

        with self._explain_errors(kind):
            _sweep(os.getpid(), self.root)
            if _find_damage(final, kind, key) is not None:
                self._place(kind, key, make)
            elif not self._is_shared(kind, key):
                with self._lock(kind, key) if os.access(self.root, os.W_OK) else nullcontext():
                    self._share(kind, key)
        return final

    def find(self, kind: str, key: str) -> Path | None:
        """Return the folder of an artifact that is whole, here or in the bucket, from where it is fetched; else None.

        Raises UserError as `obtain` does.
        """
        final = self._folder(kind, key)
        with self._explain_errors(kind):
            _sweep(os.getpid(), self.root)
            if _find_damage(final, kind, key) is None:
                return final
            if self.remote is None or not self._is_shared(kind, key):
                return None
            return final if self._place(kind, key, None) else None

    @contextmanager
    def _explain_errors(self, kind: str) -> Iterator[None]:
        """Turn errors of the disk that the user can fix into UserError."""
        root = Path(self.root)
        try:
            yield
        except Exception as error:
            if _out_of_space(error):
                existing = next(place for place in (root, *root.parents) if place.exists())
                found = (
                    f"the disk was full before this artifact ({kind}) was complete; with its unfinished files removed,"
                    f" {shutil.disk_usage(existing).free / 1e6:,.1f} MB are free, and it needs more than that"
                )
                remedy = "free some space, or move the data folder to a larger disk (environment CALIPERT_DATA)"
                raise UserError(self.root, "free disk space", found, remedy) from error
            if _no_permission(error, root):
                found = f"no permission to put an artifact ({kind}) there ({error})"
                remedy = (
                    "let the user that calipert runs as write there, or name another data folder (environment"
                    " CALIPERT_DATA); what the store already holds can be used as it is"
                )
                raise UserError(self.root, "folder of the store", found, remedy) from error
            raise

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
        with lock_file(folder / key, f"another run on this machine computes the same {kind} ({key[:12]}...)"):
            yield

    def _place(self, kind: str, key: str, make: Callable[[Path], None] | None) -> bool:
        """Put an artifact that is not there, or damaged, under its name: from the bucket, else by `make`.

        make: fills and seals an empty folder. Returns False if the artifact is in no bucket and there is no `make`.
        """
        final = self._folder(kind, key)
        with self._lock(kind, key):
            # Checked again under the lock, and again whenever another host has published in the meantime.
            while (damage := _find_damage(final, kind, key)) is not None:
                with scratch(Path(self.root) / _TEMPORARY, _SCRATCH) as temporary:
                    if final.exists():
                        _LOG.warning("%s %s is damaged (%s): removing it", kind, key, damage)
                        # Renamed first: half an artifact is never seen under its name, even if this process dies.
                        final.rename(temporary / "damaged")
                        shutil.rmtree(temporary / "damaged")
                    content = temporary / kind / key
                    content.mkdir(parents=True)
                    if not self._fetch(content, kind, key):
                        if make is None:
                            return False
                        make(content)
                    _publish(content, final)
            self._share(kind, key)
        return True

    def _fetch(self, content: Path, kind: str, key: str) -> bool:
        """Fill an empty folder with the bucket's artifact and seal it.

        Returns False, and the folder is empty, if there is none or it is damaged.
        """
        if self.remote is None:
            return False
        bucket, name = ObjectStore(self.remote), f"{kind}/{key}"
        try:
            if not bucket.get(name, content):
                return False
            damage = _find_damage(content, kind, key, self._folder(kind, key))
        except DamagedFolder as error:
            damage = str(error)
        if damage is None:
            _settle(content)
            _shared.add((os.getpid(), self.remote, name))
            return True
        self._remove_remote(kind, key, damage)
        shutil.rmtree(content)
        content.mkdir()
        return False

    def _remove_remote(self, kind: str, key: str, damage: str) -> None:
        _LOG.warning("%s %s in %s is damaged (%s): removing it there", kind, key, self.remote, damage)
        ObjectStore(str(self.remote)).remove(f"{kind}/{key}")
        _shared.discard((os.getpid(), str(self.remote), f"{kind}/{key}"))

    def _is_shared(self, kind: str, key: str) -> bool:
        """Whether an artifact needs no upload: there is no bucket, or it is there. Asked once in a process."""
        if self.remote is None or (os.getpid(), self.remote, f"{kind}/{key}") in _shared:
            return True
        try:
            published = ObjectStore(self.remote).files(f"{kind}/{key}")
        except DamagedFolder as error:
            self._remove_remote(kind, key, str(error))
            return False
        if published is not None:
            self._remember(kind, key, published)
        return published is not None

    def _share(self, kind: str, key: str) -> None:
        """Upload an artifact that is here and not in the bucket."""
        name = f"{kind}/{key}"
        if self.remote is not None and (os.getpid(), self.remote, name) not in _shared:
            self._remember(kind, key, ObjectStore(self.remote).put(self._folder(kind, key), name))

    def _remember(self, kind: str, key: str, published: Mapping[str, StoredFile]) -> None:
        _shared.add((os.getpid(), self.remote, f"{kind}/{key}"))
        manifest = _read_manifest(self._folder(kind, key))
        there = {name: file for name, file in published.items() if name != MANIFEST}
        if manifest is not None and manifest.files != there:
            _LOG.warning(
                "another machine has uploaded %s %s with other values than those computed here: both are kept",
                kind,
                key,
            )


@cache
def _sweep(process: int, root: str) -> None:
    """Once in a process: also where all is there, and nothing is built, the remains of a killed one go."""
    sweep(Path(root) / _TEMPORARY, _SCRATCH)


def _to_json(value: object, where: str) -> object:
    """Return a value in dicts, lists and scalars.

    Nothing but JSON gets in: json.dumps would write the name 1 as "1" and let two recipes share one key.
    """
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"{where or 'recipe'}: the name {name!r} is not a string")
        return {name: _to_json(item, f"{where}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{where}: {value!r} is not a JSON value")


def _read_manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None


def _find_damage(folder: Path, kind: str, key: str, place: Path | None = None) -> str | None:
    """Return what is wrong with an artifact, None if nothing is.

    place: where the folder will lie, if it is about to be renamed.
    """
    manifest = _read_manifest(folder)
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
            if file_checksum(path, (place or folder) / name) != expected.sha256:
                return f"{name} has changed"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _settle(content: Path) -> None:
    """Make the files read-only, and all of it durable."""
    for path in (*content.rglob("*"), content):
        if not path.is_dir():
            path.chmod(0o444)
        _sync(path)


def _publish(content: Path, final: Path) -> None:
    """Rename an artifact to its final place, in one atomic step.

    It fails if the name is taken, since a rename never replaces a folder that holds files; then another builder
    published first.
    """
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
