"""Folders in an S3 bucket, each whole or not there. docs/store.md says how they lie in it, and why.

The index of a folder, `<name>/index.json`, is uploaded after all of its files and only where there is none: the first
to publish a name wins. A file lies under its own SHA-256, `<name>/<sha256>/<path>`, so two uploads never write
different bytes under one key, and the winner's index names the winner's files whatever else was uploaded beside them.
An upload that was killed is continued by the next one.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path, PurePosixPath
from time import sleep
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from blocks.store.checksums import StoredFile, checksum_files
from core.errors import UserError

SCHEMA = 1
INDEX = "index.json"
# Bytes of a part, and parts at a time: a transfer holds at most their product of the files in memory, 128 MiB, and the
# client about as much again.
PART = 8 << 20
PARTS = 16
FILES = 4
MOST_PARTS = 10_000
# Seconds to connect and to wait for an answer, and how often a request that can pass is tried.
CONNECT_S = 5.0
READ_S = 60.0
TRIES = 4
# A cancellation of the flow reaches this thread only between two waits.
WAIT_S = 0.5

_LOG = logging.getLogger("calipert.store")
_URL = re.compile(r"s3://([A-Za-z0-9._-]{3,63})(?:/(.*?))?/*")
_REFUSED = {
    "AccessDenied",
    "AllAccessDisabled",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "403",
}


class Index(BaseModel):
    """What a folder in a bucket is made of: path, relative to it and with `/`, -> file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int
    files: dict[str, StoredFile]


class DamagedFolder(Exception):
    """A folder in the bucket is not what its index says; the text says in what."""


class ObjectStore:
    """Folders under `s3://bucket/prefix`.

    The endpoint is AWS_ENDPOINT_URL's, else Amazon's; the credentials are those of blocks.config.secrets, else what the
    AWS chain finds. Names are paths with `/`; none may lie within another. Every method raises UserError, which names
    the address and the remedy, for a bucket that is not there, refused credentials, and a service that does not answer
    after some tries; none waits for ever. Callable from any thread.
    """

    def __init__(self, url: str) -> None:
        """Raise UserError for an address that is not of the form s3://bucket/prefix."""
        match = _URL.fullmatch(url)
        if match is None:
            # The text is not repeated: it may be a password.
            found = "an address that does not have the form s3://bucket/prefix"
            raise UserError("object store", "address", found, "correct it (environment CALIPERT_STORE)")
        self._bucket, self._prefix = match[1], match[2] or ""
        self.url = "/".join(filter(None, ["s3:/", self._bucket, self._prefix]))

    def put(self, folder: Path, name: str) -> dict[str, StoredFile]:
        """Upload the files of a folder, and return the files that the name then has.

        These are the folder's, unless another upload came first, which stays as it is. Empty folders are not kept.
        Raises ValueError for anything but regular files, OSError as reading them does.
        """
        path, files = self._path(name), checksum_files(folder)
        with self._explain_errors():
            published = self._read_index(path)
            if published is not None:
                return published
            present = self._list_objects(path)
            objects = {_object(path, name, file): (folder / name, file.size) for name, file in files.items()}
            missing = {place: file for place, (file, size) in objects.items() if present.get(place) != size}
            _LOG.info("uploading %.1f MB to s3://%s", sum(file.stat().st_size for file in missing.values()) / 1e6, path)
            try:
                self._upload(missing)
                published = self._publish(path, files)
            except OSError as error:
                # The first to publish ends the uploads of the others.
                published = self._read_index(path) if _code(error) is not None else None
                if published is None:
                    raise
            if published != files or not present.keys() <= objects.keys():
                # What uploads left that came second or were killed.
                named = {_object(path, name, file) for name, file in published.items()}
                self._delete(place for place in self._list_objects(path) if place not in named)
            if any(file.size >= 2 * PART for file in files.values()):
                self._abort_uploads(path)
            return published

    def get(self, name: str, folder: Path) -> bool:
        """Download a folder into one that is new or empty; return False where there is none of this name.

        Raises DamagedFolder if a file is missing or has another size than the index says (checksums are left to the
        caller), OSError as writing the files does.
        """
        path = self._path(name)
        with self._explain_errors():
            files = self._read_index(path)
            if files is None:
                return False
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ValueError(f"{folder} is not empty")
            _LOG.info("downloading %.1f MB of s3://%s", sum(file.size for file in files.values()) / 1e6, path)
            for name, file in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with (folder / name).open("wb") as new:
                    new.truncate(file.size)
            self._download_parts(
                (folder / name, _object(path, name, file), start, file.size)
                for name, file in files.items()
                for start in range(0, file.size, PART)
            )
            return True

    def files(self, name: str) -> dict[str, StoredFile] | None:
        """Return the files of a folder, from its index, by one small request; None where there is none of this name.

        Raises DamagedFolder if the index cannot be read.
        """
        path = self._path(name)
        with self._explain_errors():
            return self._read_index(path)

    def remove(self, name: str) -> None:
        """Remove a folder, its index first, and whatever unfinished uploads left under the name."""
        path = self._path(name)
        with self._explain_errors():
            self._delete([f"{path}/{INDEX}"])
            self._delete(self._list_objects(path))
            self._abort_uploads(path)

    def _path(self, name: str) -> str:
        """Return a name as s3fs takes it: bucket/prefix/name."""
        if not _is_path(name):
            raise ValueError(f"{name!r} is no name of a folder: a relative path without . and ..")
        return "/".join(filter(None, [self._bucket, self._prefix, name]))

    def _read_index(self, path: str) -> dict[str, StoredFile] | None:
        try:
            text = _read(f"{path}/{INDEX}")
        except FileNotFoundError as error:
            if _code(error) == "NoSuchKey":
                return None
            raise
        try:
            index = Index.model_validate_json(text)
        except ValidationError as error:
            raise DamagedFolder(f"{INDEX} cannot be read") from error
        if index.schema_version != SCHEMA:
            # Not damage, which would be removed and replaced by turns.
            found = f"{path}/{INDEX} of schema {index.schema_version}, not {SCHEMA}"
            remedy = "use one version of calipert on all machines, or another prefix for each"
            raise UserError(self.url, "schema", found, remedy)
        for file in index.files:
            if not _is_path(file):
                raise DamagedFolder(f"{INDEX} names {file!r}, which is not within the folder")
        return index.files

    def _publish(self, path: str, files: dict[str, StoredFile]) -> dict[str, StoredFile]:
        text = json.dumps(Index(schema_version=SCHEMA, files=files).model_dump(), indent=1, sort_keys=True)
        for _ in range(TRIES):
            try:
                _open_filesystem().pipe_file(f"{path}/{INDEX}", text.encode(), mode="create")
            except OSError as error:
                # The second of the two: another uploads it at this moment.
                if _code(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
                    raise
            published = self._read_index(path)
            if published is not None:
                return published
            sleep(0.5)
        raise DamagedFolder(f"{INDEX} comes and goes: others publish and remove this folder at the same time")

    def _upload(self, files: Mapping[str, Path]) -> None:
        """Upload files, by their place in the bucket."""
        largest = max((file.stat().st_size for file in files.values()), default=0)
        _open_filesystem().put(
            [str(file) for file in files.values()],
            list(files),
            batch_size=FILES,
            chunksize=max(PART, -(-largest // MOST_PARTS)),
            max_concurrency=PARTS // FILES,
        )

    def _download_parts(self, parts: Iterable[tuple[Path, str, int, int]]) -> None:
        """Download parts, some at a time. The first error, or a cancellation of the flow, ends the rest."""
        pool = ThreadPoolExecutor(PARTS)
        try:
            waiting = {pool.submit(self._download, *part) for part in parts}
            while waiting:
                done, waiting = wait(waiting, WAIT_S, FIRST_COMPLETED)
                for each in done:
                    each.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _download(self, path: Path, place: str, start: int, size: int) -> None:
        """Download one part of a file of this size in bytes."""
        end = min(start + PART, size)
        try:
            # Behind the last part one byte more: an object that is longer shows.
            content = _read(place, start, end + (end == size))
        except OSError as error:
            if _code(error) not in ("NoSuchKey", "InvalidRange"):
                raise
            raise DamagedFolder(f"{place} is missing or shorter than {size} bytes") from error
        if len(content) != end - start:
            raise DamagedFolder(f"{place} is {'longer' if len(content) > end - start else 'shorter'} than {size} bytes")
        with path.open("r+b") as file:
            file.seek(start)
            file.write(content)

    def _list_objects(self, path: str) -> dict[str, int]:
        """Return place -> size in bytes of all that lies under a name but the index."""
        parent, _, name = path.rpartition("/")
        found = _open_filesystem().find(parent, prefix=f"{name}/", detail=True)
        return {place: entry["size"] for place, entry in found.items() if place != f"{path}/{INDEX}"}

    def _delete(self, places: Iterable[str]) -> None:
        keys = [place.removeprefix(f"{self._bucket}/") for place in places]
        for start in range(0, len(keys), 1000):
            objects = [{"Key": key} for key in keys[start : start + 1000]]
            # Not `rm`, which is silent about what it could not remove.
            answer = _open_filesystem().call_s3(
                "delete_objects", Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True}
            )
            for failure in answer.get("Errors", []):
                found = f"{failure['Key']} cannot be removed: {failure.get('Code')}: {failure.get('Message')}"
                raise UserError(self.url, "credentials", found, _CREDENTIALS)

    def _abort_uploads(self, path: str) -> None:
        """End the unfinished uploads of large files under a name, whose parts no listing shows."""
        prefix = path.removeprefix(f"{self._bucket}/")
        page = _open_filesystem().call_s3("list_multipart_uploads", Bucket=self._bucket, Prefix=f"{prefix}/")
        for upload in page.get("Uploads", []):
            try:
                _open_filesystem().abort_mpu(self._bucket, upload["Key"], upload["UploadId"])
            except OSError as error:
                # Ended in the meantime.
                if _code(error) != "NoSuchUpload":
                    raise

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turn what S3 answers, or that it does not, into one UserError. Errors of the local disk pass as they are."""
        import aiohttp
        from botocore import exceptions

        kept = "; nothing that was made on this machine is lost: start again afterwards"
        try:
            yield
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
            raise UserError(self.url, "credentials", f"none ({error})", _CREDENTIALS + kept) from error
        except (exceptions.ConnectionError, exceptions.HTTPClientError, aiohttp.ClientError) as error:
            found = f"no answer from {_endpoint()} after {TRIES} tries ({error})"
            remedy = "see whether the service runs and can be reached; AWS_ENDPOINT_URL names another than Amazon's"
            raise UserError(self.url, "endpoint", found, remedy + kept) from error
        except exceptions.BotoCoreError as error:
            remedy = "check the variables and files that configure access to S3 (docs/store.md)"
            raise UserError(self.url, "configuration", f"{type(error).__name__}: {error}", remedy + kept) from error
        except OSError as error:
            code = _code(error)
            if code is None:
                raise
            found = f"{code}: {error} ({_endpoint()})"
            if code == "NoSuchBucket":
                found = f"no bucket {self._bucket} at {_endpoint()}"
                remedy = "create the bucket, or correct CALIPERT_STORE or AWS_ENDPOINT_URL"
                raise UserError(self.url, "bucket", found, remedy + kept) from error
            if code in _REFUSED:
                raise UserError(self.url, "credentials", found, _CREDENTIALS + kept) from error
            raise UserError(self.url, "service", found, "see what the service's own log says" + kept) from error


def _read(place: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes of an object from start to before end; a connection that breaks on the way is not the end."""
    import aiohttp
    from botocore import exceptions

    # One connection: with more it would ask for the size first.
    read: Callable[[], bytes] = partial(_open_filesystem().cat_file, place, start=start, end=end, max_concurrency=1)
    for again in range(1, TRIES):
        with suppress(
            exceptions.IncompleteReadError, exceptions.ResponseStreamingError, aiohttp.ClientError, TimeoutError
        ):
            return read()
        sleep(0.5 * again)
    return read()


def _open_filesystem() -> Any:
    return _filesystem(os.getpid())


@cache
def _filesystem(process: int) -> Any:
    """Return the client of a process, given by its id: a forked child must not use its parent's."""
    import s3fs

    from blocks.config.secrets import read_s3_credentials

    _require_plain_endpoint()
    files = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_S,
            "read_timeout": READ_S,
            "max_pool_connections": PARTS + FILES,
            "retries": {"mode": "standard", "total_max_attempts": TRIES},
        },
        **read_s3_credentials(),
    )
    # botocore's retries are enough: s3fs would repeat all of them.
    files.retries = 1
    return files


def _require_plain_endpoint() -> None:
    parts = urlsplit(_endpoint())
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        # The text is not repeated: it may be a password.
        found = "no address of the form http(s)://host:port, without a user name"
        raise UserError("environment", "AWS_ENDPOINT_URL", found, "correct it; credentials have their own variables")


def _endpoint() -> str:
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    return next((os.environ[name] for name in variables if os.environ.get(name)), "https://s3.amazonaws.com")


_CREDENTIALS = (
    "give credentials that may read, write, list and delete there: the Secret blocks of docs/secrets.md, or"
    " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)


def _code(error: BaseException) -> str | None:
    """Return S3's code of an error that s3fs has translated; None for any other error."""
    answer = getattr(error.__cause__, "response", None)
    return str(answer["Error"].get("Code")) if isinstance(answer, dict) and "Error" in answer else None


def _is_path(name: str) -> bool:
    """Whether it is a relative path, with `/`, that stays below its folder."""
    path = PurePosixPath(name)
    return name not in ("", ".") and path.as_posix() == name and not path.is_absolute() and ".." not in path.parts


def _object(path: str, name: str, file: StoredFile) -> str:
    """Return the place of a file of a folder."""
    return f"{path}/{file.sha256}/{name}"
