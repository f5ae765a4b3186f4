"""Downloads over HTTPS and from S3 that continue where they broke off."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from blocks.config.secrets import S3_KEY, S3_SECRET, read_s3_credentials
from blocks.http import is_transient, is_transient_status, open_client
from blocks.local.files import replace_file
from core.catalog.schema import HttpsSource, S3Source
from core.errors import UserError
from tasks.artifacts import LOG

CHUNK = 8 << 20  # bytes that one request to S3 asks for
TIMEOUT = 60.0  # seconds without a byte, after which the connection counts as broken
EVERY = 30.0  # seconds between two lines of progress
HDF5 = b"\x89HDF\r\n\x1a\n"
# What s3fs makes of "slow down", "internal error" and the like.
S3_TRANSIENT = (errno.EBUSY, errno.EREMOTEIO, errno.EIO)


class Stream(NamedTuple):
    """The bytes of a file from `start` on. total: its size, None if unknown. version: changes with its content."""

    start: int
    total: int | None
    version: str | None
    chunks: Iterator[bytes]


def download(source: HttpsSource | S3Source, target: Path) -> None:
    """Fetch a file into `target`, which appears under its name only when it is whole. One caller at a time.

    What an earlier try left in `<target>.part` is kept if the server says that the file is still the same.
    Raises ConnectionError if bytes are missing (the next try goes on from there), UserError if the file cannot be
    downloaded, or is no HDF5 though it is named .h5ad.
    """
    # Costs time, and nothing is downloaded in most runs.
    from core.io.h5ad import require_space

    part, state = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.part.json")
    version = _read_version(state)
    start = part.stat().st_size if part.exists() and version else 0
    with OPEN[source.kind](source, start, version) as stream:
        if stream.total is not None:
            require_space(target.parent, stream.total - stream.start, source.url)
        with part.open("r+b" if part.exists() else "wb") as file:
            # First the bytes of another version go, then comes the new one's name: killed in between, nothing is mixed.
            file.truncate(stream.start)
            os.fsync(file.fileno())
            write_whole(state, json.dumps({"version": stream.version}))
            file.seek(stream.start)
            _receive(stream, file, source.url)
            file.flush()
            os.fsync(file.fileno())
            received = file.tell()
    if stream.total is not None and received != stream.total:
        if received > stream.total:
            part.unlink()
        raise ConnectionError(f"{source.url}: {received:,} of {stream.total:,} bytes arrived")
    if target.suffix == ".h5ad":
        _require_hdf5(part, source.url)
    part.replace(target)
    state.unlink()


def is_download_transient(error: BaseException) -> bool:
    """Whether a download that failed with this error is worth another try, over HTTPS or from S3."""
    # Costs time, and is not needed as long as nothing fails.
    from aiohttp import ClientError
    from botocore import exceptions as s3

    if type(error) is OSError:
        return error.errno in S3_TRANSIENT
    return is_transient(error) or isinstance(error, s3.ConnectionError | s3.HTTPClientError | ClientError)


def _read_version(state: Path) -> str | None:
    """Return the version of the file that the kept bytes belong to; None if it is not known."""
    try:
        version = json.loads(state.read_text(encoding="utf-8"))["version"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None


def write_whole(path: Path, text: str) -> None:
    """Write a small file that is there whole or not at all."""
    with replace_file(path) as new:
        new.write_text(text, encoding="utf-8")


def _receive(stream: Stream, file: Any, url: str) -> None:
    size = f"{stream.total / 1e6:,.0f} MB" if stream.total is not None else "size unknown"
    LOG.info("downloading %s (%s%s)", url, size, f", from {stream.start / 1e6:,.0f} MB on" if stream.start else "")
    said = time.monotonic()
    for chunk in stream.chunks:
        file.write(chunk)
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            LOG.info("downloading %s: %.0f of %s", url, file.tell() / 1e6, size)


def _require_hdf5(part: Path, url: str) -> None:
    with part.open("rb") as file:
        head = file.read(len(HDF5))
    if head != HDF5:
        part.unlink()
        remedy = "open the address in a browser: the server may answer with a page instead of the file"
        raise UserError(url, "content", f"no HDF5 file (it begins with {head!r})", remedy)


@contextmanager
def _open_https(source: HttpsSource, start: int, version: str | None) -> Iterator[Stream]:
    # Unpacked on the way, the bytes would not be those that ranges count.
    headers = {"Accept-Encoding": "identity"}
    if start and version:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    with (
        open_client(headers=headers, follow_redirects=True, timeout=TIMEOUT) as client,
        client.stream("GET", source.url) as answer,
    ):
        _require_safe(answer, source.url)
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            # Nothing is left to ask for: the part is whole, or longer than the file.
            total = answer.headers.get("content-range", "").rpartition("/")[2]
            if not total.isdigit() or int(total) != start:
                # Without a version the next try begins at the first byte.
                yield Stream(0, None, None, _break_off(f"{source.url}: the server has no bytes from {start:,} on"))
            else:
                yield Stream(start, start, version, iter(()))
            return
        _require_success(answer, source.url)
        found = answer.headers.get("etag", "")
        # A weak tag does not promise the same bytes.
        found = answer.headers.get("last-modified") if not found or found.startswith("W/") else found
        length = answer.headers.get("content-length")
        begin = 0
        if answer.status_code == httpx.codes.PARTIAL_CONTENT:
            if not answer.headers.get("content-range", "").startswith(f"bytes {start}-"):
                raise ConnectionError(f"{source.url}: the server sent another range than bytes {start}-")
            begin = start
            if found and found != version:
                # A server, or a cache on the way, that does not understand If-Range.
                yield Stream(0, None, None, _break_off(f"{source.url}: the file has changed since its first part came"))
                return
        total_size = begin + int(length) if length is not None else None
        yield Stream(begin, total_size, found, answer.iter_raw())


def _break_off(why: str) -> Iterator[bytes]:
    """Give no bytes, but a failure after which the next try begins at the first byte."""
    raise ConnectionError(why)
    yield b""


def _require_safe(answer: httpx.Response, url: str) -> None:
    """Refuse a redirection from https to plain http: others on the way could read and change the file."""
    if url.startswith("https:") and answer.url.scheme != "https":
        raise UserError(url, "address", f"redirected to {answer.url}", "give an address that stays on https")


def _require_success(answer: httpx.Response, url: str) -> None:
    if answer.is_client_error and not is_transient_status(answer.status_code):
        found = f"HTTP {answer.status_code} {answer.reason_phrase}"
        raise UserError(url, "address", found, "check the address, or download the file and name it with --source")
    answer.raise_for_status()


@contextmanager
def _open_s3(source: S3Source, start: int, version: str | None) -> Iterator[Stream]:
    import s3fs
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    bucket = s3fs.S3FileSystem(
        anon=source.anonymous,
        endpoint_url=source.endpoint,
        skip_instance_cache=True,
        use_listings_cache=False,
        **({} if source.anonymous else read_s3_credentials()),
    )
    try:
        found = bucket.info(source.url)
    except (FileNotFoundError, PermissionError, NoCredentialsError, PartialCredentialsError) as error:
        remedy = (
            "check the address; `anonymous: true` is for public files, others need AWS credentials or the Secret "
            f"blocks {S3_KEY} and {S3_SECRET}"
        )
        raise UserError(source.url, "address", f"{type(error).__name__}: {error}", remedy) from error
    total, etag = int(found["size"]), str(found["ETag"])
    begin = start if etag == version and start <= total else 0

    def chunks() -> Iterator[bytes]:
        for position in range(begin, total, CHUNK):
            yield bucket.cat_file(source.url, start=position, end=min(position + CHUNK, total))
        if str(bucket.info(source.url)["ETag"]) != etag:
            raise ConnectionError(f"{source.url} was changed while it was read")

    yield Stream(begin, total, etag, chunks())


OPEN: dict[str, Callable[[Any, int, str | None], AbstractContextManager[Stream]]] = {
    "https": _open_https,
    "s3": _open_s3,
}
