"""Folders in an S3 bucket, each whole or not there. docs/store.md says how they lie in it, and why.

The index of a folder, `<name>/index.json`, is uploaded after all of its files and only where none stands: the first to
publish a name wins. A file lies under its own SHA-256, `<name>/<sha256>/<path>`, so two uploads never write different
bytes under one key, and the winner's index names the winner's files whatever else was uploaded beside them. An upload
that was killed is continued by the next one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from blocks.store.checksums import file_checksum
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
_T = TypeVar("_T")


class StoredFile(BaseModel):
    """One file of a folder: bytes, and SHA-256 (hex)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str


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
        """Raises UserError for an address that is not of the form s3://bucket/prefix."""
        match = _URL.fullmatch(url)
        if match is None:
            # What stands there is not repeated: it may be a password.
            found = "an address that does not have the form s3://bucket/prefix"
            raise UserError("object store", "address", found, "correct it (environment CALIPERT_STORE)")
        self._bucket, self._prefix = match[1], match[2] or ""
        self.url = "/".join(filter(None, ["s3:/", self._bucket, self._prefix]))

    def put(self, folder: Path, name: str) -> dict[str, StoredFile]:
        """Upload the files of a folder, and return the files that then stand under the name: these, unless another
        upload came first, which stays as it is.

        Empty folders are not kept. Raises ValueError for anything but regular files, OSError as reading them does.
        """
        return self._run(self._put, folder, self._key(name), _files(folder))

    def get(self, name: str, folder: Path) -> bool:
        """Download a folder into one that is new or empty; False where there is none of this name.

        Raises DamagedFolder if a file is missing or has another size than the index says (checksums are left to the
        caller), OSError as writing the files does.
        """
        return self._run(self._get, self._key(name), folder)

    def files(self, name: str) -> dict[str, StoredFile] | None:
        """The files of a folder, from its index, by one small request; None where there is none of this name.

        Raises DamagedFolder if the index cannot be read.
        """
        return self._run(self._standing, self._key(name))

    def remove(self, name: str) -> None:
        """Remove a folder, its index first, and whatever unfinished uploads left under the name."""
        self._run(self._remove, self._key(name))

    def _key(self, name: str) -> str:
        if not _is_path(name):
            raise ValueError(f"{name!r} is no name of a folder: a relative path without . and ..")
        return f"{self._prefix}/{name}".lstrip("/")

    def _run(self, work: Callable[..., Coroutine[Any, Any, _T]], *arguments: Any) -> _T:
        """The result of a coroutine function on s3fs's own event loop, whichever runs in this thread."""
        with _explained(self.url, self._bucket):
            loop = _filesystem(os.getpid()).loop
            future = asyncio.run_coroutine_threadsafe(work(*arguments), loop)
            try:
                # In short waits: a cancellation of the flow reaches this thread only between two.
                while not concurrent.futures.wait([future], timeout=0.5).done:
                    pass
            except BaseException:
                future.cancel()
                raise
            return future.result()

    async def _call(self, method: str, **arguments: Any) -> Any:
        return await _filesystem(os.getpid())._call_s3(method, Bucket=self._bucket, **arguments)

    async def _standing(self, key: str) -> dict[str, StoredFile] | None:
        try:
            text = await self._read(f"{key}/{INDEX}")
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
            found = f"{key}/{INDEX} of schema {index.schema_version}, not {SCHEMA}"
            remedy = "use one version of calipert on all machines, or another prefix for each"
            raise UserError(self.url, "schema", found, remedy)
        for path in index.files:
            if not _is_path(path):
                raise DamagedFolder(f"{INDEX} names {path!r}, which is not within the folder")
        return index.files

    async def _put(self, folder: Path, key: str, files: dict[str, StoredFile]) -> dict[str, StoredFile]:
        standing = await self._standing(key)
        if standing is not None:
            return standing
        present = await self._objects(key)
        missing = {path: file for path, file in files.items() if present.get(_object(key, path, file)) != file.size}
        _LOG.info("uploading %.1f MB to s3://%s/%s", sum(f.size for f in missing.values()) / 1e6, self._bucket, key)
        try:
            await _all(FILES, (self._upload(folder / path, _object(key, path, file)) for path, file in missing.items()))
            standing = await self._publish(key, files)
        except OSError as error:
            # The first to publish ends the uploads of the others.
            standing = await self._standing(key) if _code(error) is not None else None
            if standing is None:
                raise
        if standing != files or not present.keys() <= {_object(key, path, file) for path, file in files.items()}:
            await self._tidy(key, standing)
        if any(file.size >= 2 * PART for file in files.values()):
            await self._abort_uploads(key)
        return standing

    async def _publish(self, key: str, files: dict[str, StoredFile]) -> dict[str, StoredFile]:
        text = json.dumps(Index(schema_version=SCHEMA, files=files).model_dump(), indent=1, sort_keys=True)
        for _ in range(TRIES):
            try:
                await self._call("put_object", Key=f"{key}/{INDEX}", Body=text.encode(), IfNoneMatch="*")
            except OSError as error:
                # The second of the two: another is at it in this moment.
                if _code(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
                    raise
            standing = await self._standing(key)
            if standing is not None:
                return standing
            await asyncio.sleep(0.5)
        raise DamagedFolder(f"{INDEX} comes and goes: others publish and remove this folder at the same time")

    async def _upload(self, path: Path, key: str) -> None:
        size = path.stat().st_size
        part = max(PART, -(-size // MOST_PARTS))
        await _filesystem(os.getpid())._put_file(
            str(path), f"{self._bucket}/{key}", chunksize=part, max_concurrency=PARTS // FILES
        )

    async def _get(self, key: str, folder: Path) -> bool:
        files = await self._standing(key)
        if files is None:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty")
        _LOG.info("downloading %.1f MB of s3://%s/%s", sum(f.size for f in files.values()) / 1e6, self._bucket, key)
        for path, file in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with (folder / path).open("wb") as new:
                new.truncate(file.size)
        await _all(
            PARTS,
            (
                self._download(folder / path, _object(key, path, file), start, file.size)
                for path, file in files.items()
                for start in range(0, file.size, PART)
            ),
        )
        return True

    async def _download(self, path: Path, key: str, start: int, size: int) -> None:
        """One part of a file of this size in bytes."""
        end = min(start + PART, size)
        try:
            content = await self._read(key, start, end, size)
        except OSError as error:
            if _code(error) not in ("NoSuchKey", "InvalidRange"):
                raise
            raise DamagedFolder(f"{key} is missing or shorter than {size} bytes") from error
        with path.open("r+b") as file:
            file.seek(start)
            file.write(content)

    async def _read(self, key: str, start: int = 0, end: int | None = None, size: int | None = None) -> bytes:
        """The bytes of an object from start to before end, where an end is given; a connection that breaks on the way
        is not the end. Raises DamagedFolder if the object has another size than the one given."""
        import aiohttp
        from botocore.exceptions import HTTPClientError, IncompleteReadError  # type: ignore[import-untyped]

        limits = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
        for again in range(TRIES - 1, -1, -1):
            answer = await self._call("get_object", Key=key, **limits)
            whole = answer.get("ContentRange", "").rpartition("/")[2]
            if size is not None and whole != str(size):
                raise DamagedFolder(f"{key} has {whole or 'an unknown number of'} bytes, not {size}")
            try:
                async with answer["Body"] as body:
                    content: bytes = await body.read()
                return content
            except (HTTPClientError, IncompleteReadError, aiohttp.ClientError):
                if not again:
                    raise
                await asyncio.sleep(0.5 * (TRIES - again))
        raise AssertionError("the last try returns or raises")

    async def _remove(self, key: str) -> None:
        await self._call("delete_object", Key=f"{key}/{INDEX}")
        await self._delete(list(await self._objects(key)))
        await self._abort_uploads(key)

    async def _tidy(self, key: str, standing: dict[str, StoredFile]) -> None:
        """Remove what lies under a name that its index does not name: from uploads that came second or were killed."""
        named = {_object(key, path, file) for path, file in standing.items()}
        await self._delete([left for left in await self._objects(key) if left not in named])

    async def _objects(self, key: str) -> dict[str, int]:
        """Key -> size in bytes of all that lies under a name but the index."""
        found: dict[str, int] = {}
        more: dict[str, str] = {}
        while True:
            page = await self._call("list_objects_v2", Prefix=f"{key}/", **more)
            found |= {entry["Key"]: entry["Size"] for entry in page.get("Contents", [])}
            if not page.get("IsTruncated"):
                found.pop(f"{key}/{INDEX}", None)
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    async def _delete(self, keys: list[str]) -> None:
        for start in range(0, len(keys), 1000):
            objects = [{"Key": key} for key in keys[start : start + 1000]]
            answer = await self._call("delete_objects", Delete={"Objects": objects, "Quiet": True})
            for failure in answer.get("Errors", []):
                found = f"{failure['Key']} cannot be removed: {failure.get('Code')}: {failure.get('Message')}"
                raise UserError(self.url, "credentials", found, _CREDENTIALS)

    async def _abort_uploads(self, key: str) -> None:
        """End the unfinished uploads of large files under a name, whose parts no listing shows."""
        page = await self._call("list_multipart_uploads", Prefix=f"{key}/")
        for upload in page.get("Uploads", []):
            try:
                await self._call("abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"])
            except OSError as error:
                # Ended in the meantime.
                if _code(error) != "NoSuchUpload":
                    raise


@cache
def _filesystem(process: int) -> Any:
    """The client of a process (given by its id: a forked child must not use its parent's)."""
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
        # What stands there is not repeated: it may be a password.
        found = "no address of the form http(s)://host:port, without a user name"
        raise UserError("environment", "AWS_ENDPOINT_URL", found, "correct it; credentials have their own variables")


def _endpoint() -> str:
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    return next((os.environ[name] for name in variables if os.environ.get(name)), "https://s3.amazonaws.com")


@contextmanager
def _explained(url: str, bucket: str) -> Iterator[None]:
    """What S3 answers, or that it does not, as one UserError. Errors of the local disk pass as they are."""
    import aiohttp
    from botocore.exceptions import (
        BotoCoreError,
        ConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    kept = "; nothing that was made on this machine is lost: start again afterwards"
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise UserError(url, "credentials", f"none ({error})", _CREDENTIALS + kept) from error
    except (ConnectionError, HTTPClientError, aiohttp.ClientError) as error:
        found = f"no answer from {_endpoint()} after {TRIES} tries ({error})"
        remedy = "see whether the service runs and can be reached; AWS_ENDPOINT_URL names another than Amazon's"
        raise UserError(url, "endpoint", found, remedy + kept) from error
    except BotoCoreError as error:
        remedy = "check the variables and files that configure access to S3 (docs/store.md)"
        raise UserError(url, "configuration", f"{type(error).__name__}: {error}", remedy + kept) from error
    except OSError as error:
        code = _code(error)
        if code is None:
            raise
        found = f"{code}: {error} ({_endpoint()})"
        if code == "NoSuchBucket":
            found = f"no bucket {bucket} at {_endpoint()}"
            remedy = "make the bucket, or correct CALIPERT_STORE or AWS_ENDPOINT_URL"
            raise UserError(url, "bucket", found, remedy + kept) from error
        if code in _REFUSED:
            raise UserError(url, "credentials", found, _CREDENTIALS + kept) from error
        raise UserError(url, "service", found, "see what the service's own log says" + kept) from error


_CREDENTIALS = (
    "give credentials that may read, write, list and delete there: the Secret blocks of docs/secrets.md, or"
    " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)


def _code(error: BaseException) -> str | None:
    """S3's code of an error that s3fs has translated; None for any other error."""
    answer = getattr(error.__cause__, "response", None)
    return str(answer["Error"].get("Code")) if isinstance(answer, dict) and "Error" in answer else None


async def _all(most: int, coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run them, so many at a time; the first error ends the rest and is raised."""
    waiting = iter(coroutines)

    async def work() -> None:
        for coroutine in waiting:
            await coroutine

    workers = [asyncio.ensure_future(work()) for _ in range(most)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def _files(folder: Path) -> dict[str, StoredFile]:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path}: only regular files can be uploaded")
        files[path.relative_to(folder).as_posix()] = StoredFile(size=path.stat().st_size, sha256=file_checksum(path))
    return files


def _is_path(name: str) -> bool:
    """Whether it is a relative path, with `/`, that leads nowhere else."""
    return name not in ("", ".") and PurePosixPath(name).as_posix() == name and not _leads_out(PurePosixPath(name))


def _leads_out(path: PurePosixPath) -> bool:
    return path.is_absolute() or ".." in path.parts


def _object(key: str, path: str, file: StoredFile) -> str:
    return f"{key}/{file.sha256}/{path}"
