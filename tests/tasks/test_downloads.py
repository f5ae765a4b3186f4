"""A download killed at any byte goes on from there and ends with the same bytes; what is not the file is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.catalog.schema import HttpsSource, S3Source
from core.errors import UserError
from tasks import downloads
from tasks.downloads import HDF5, download

ROOT = Path(__file__).resolve().parents[2]
CONTENT = HDF5 + bytes(range(256)) * 40


class Behaviour:
    """What the server does next: content and tag, where it breaks off, which ranges it was asked for."""

    def __init__(self) -> None:
        self.content, self.tag = CONTENT, '"one"'
        self.cut: int | None = None
        self.ranges = True
        self.lie = 0
        self.stall = threading.Event()
        self.stalls = False
        self.understands_if_range = True
        self.tells_size = True
        self.asked: list[str | None] = []


@pytest.fixture
def server() -> Iterator[tuple[HttpsSource, Behaviour]]:
    does = Behaviour()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            does.asked.append(wanted)
            start = 0
            same = self.headers.get("If-Range") == does.tag or not does.understands_if_range
            if does.ranges and wanted and same:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            size = len(does.content)
            if start >= size:
                self.send_response(416)
                if does.tells_size:
                    self.send_header("Content-Range", f"bytes */{size}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.send_header("Content-Length", str(size - start + does.lie))
            self.send_header("ETag", does.tag)
            self.end_headers()
            self.wfile.write(does.content[start : does.cut])
            self.wfile.flush()
            if does.stalls:
                does.stall.wait(20)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/file.h5ad"
        yield HttpsSource.model_construct(kind="https", url=url, sha256=None), does
        does.stall.set()
        running.shutdown()


def broken(source: Any, target: Path) -> None:
    with pytest.raises((httpx.TransportError, ConnectionError)):
        download(source, target)
    assert not target.exists()


@pytest.mark.parametrize("cut", [1, 7, 8, 1000, len(CONTENT) - 1])
def test_a_download_cut_at_any_byte_goes_on_from_there(
    server: tuple[HttpsSource, Behaviour], tmp_path: Path, cut: int
) -> None:
    source, does = server
    target = tmp_path / "file.h5ad"
    does.cut = cut
    broken(source, target)
    does.cut = None
    download(source, target)
    assert target.read_bytes() == CONTENT
    assert does.asked == [None, f"bytes={cut}-"]
    assert [path.name for path in tmp_path.iterdir()] == ["file.h5ad"]


KILLED = """
import sys
from pathlib import Path
from core.catalog.schema import HttpsSource
from tasks.downloads import download
download(HttpsSource.model_construct(kind="https", url=sys.argv[1], sha256=None), Path(sys.argv[2]))
"""


def test_a_process_killed_while_it_downloads_loses_nothing_that_was_written(
    server: tuple[HttpsSource, Behaviour], tmp_path: Path
) -> None:
    source, does = server
    does.content = HDF5 + bytes(range(256)) * 8000
    does.cut, does.stalls = 1_500_000, True
    target, part = tmp_path / "file.h5ad", tmp_path / "file.h5ad.part"
    with subprocess.Popen([sys.executable, "-c", KILLED, source.url, str(target)], cwd=ROOT) as running:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 1_000_000):
            assert time.monotonic() < deadline, "nothing arrived"
            time.sleep(0.05)
        running.kill()
    kept = part.stat().st_size
    does.cut, does.stalls = None, False
    download(source, target)
    assert target.read_bytes() == does.content
    assert does.asked == [None, f"bytes={kept}-"]


def test_killed_between_the_last_byte_and_the_name(server: tuple[HttpsSource, Behaviour], tmp_path: Path) -> None:
    source, does = server
    (tmp_path / "file.h5ad.part").write_bytes(CONTENT)
    (tmp_path / "file.h5ad.part.json").write_text('{"version": "\\"one\\""}')
    download(source, tmp_path / "file.h5ad")
    assert (tmp_path / "file.h5ad").read_bytes() == CONTENT
    assert does.asked == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("change", ["another file", "no ranges"])
def test_it_starts_again_where_the_rest_cannot_be_had(
    server: tuple[HttpsSource, Behaviour], tmp_path: Path, change: str
) -> None:
    source, does = server
    does.cut = 3000
    broken(source, tmp_path / "file.h5ad")
    does.cut = None
    if change == "another file":
        does.content, does.tag = HDF5 + b"other" * 10, '"two"'
    does.ranges = change != "no ranges"
    download(source, tmp_path / "file.h5ad")
    assert (tmp_path / "file.h5ad").read_bytes() == does.content


def test_the_old_bytes_go_before_the_new_version_is_named(
    server: tuple[HttpsSource, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two, a later try does not take bytes of the one file for those of the other."""
    source, does = server
    target, part = tmp_path / "file.h5ad", tmp_path / "file.h5ad.part"
    does.cut = 3000
    broken(source, target)
    does.cut, does.content, does.tag = None, HDF5 + b"other" * 1000, '"two"'

    class Killed(BaseException):
        pass

    def killed(path: Path, text: str) -> None:
        assert part.stat().st_size == 0
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(downloads, "write_whole", killed)
        with pytest.raises(Killed):
            download(source, target)
    download(source, target)
    assert target.read_bytes() == does.content


def test_a_cache_that_does_not_understand_if_range_mixes_nothing(
    server: tuple[HttpsSource, Behaviour], tmp_path: Path
) -> None:
    source, does = server
    does.cut = 3000
    broken(source, tmp_path / "file.h5ad")
    does.cut, does.understands_if_range = None, False
    does.content, does.tag = HDF5 + b"other" * 1000, '"two"'
    broken(source, tmp_path / "file.h5ad")
    download(source, tmp_path / "file.h5ad")
    assert (tmp_path / "file.h5ad").read_bytes() == does.content


def test_no_bytes_left_and_no_size_told_begins_anew(server: tuple[HttpsSource, Behaviour], tmp_path: Path) -> None:
    source, does = server
    (tmp_path / "file.gmt.part").write_bytes(CONTENT)
    (tmp_path / "file.gmt.part.json").write_text('{"version": "\\"one\\""}')
    does.tells_size = False
    broken(source, tmp_path / "file.gmt")
    download(source, tmp_path / "file.gmt")
    assert (tmp_path / "file.gmt").read_bytes() == CONTENT


@pytest.mark.parametrize("state", ["", "{", "[]", '{"version": 3}'])
def test_a_state_that_cannot_be_read_is_none(server: tuple[HttpsSource, Behaviour], tmp_path: Path, state: str) -> None:
    source, does = server
    (tmp_path / "file.h5ad.part").write_bytes(b"x" * 100)
    (tmp_path / "file.h5ad.part.json").write_text(state)
    download(source, tmp_path / "file.h5ad")
    assert (tmp_path / "file.h5ad").read_bytes() == CONTENT
    assert does.asked == [None]


def test_a_disk_that_is_too_small_is_found_before_the_download(
    server: tuple[HttpsSource, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(CONTENT) - 1))
    with pytest.raises(UserError, match="are missing") as error:
        download(server[0], tmp_path / "file.h5ad")
    assert server[0].url in error.value.found


def test_a_length_that_lies_is_no_whole_file(server: tuple[HttpsSource, Behaviour], tmp_path: Path) -> None:
    source, does = server
    does.lie = 10
    broken(source, tmp_path / "file.h5ad")


def test_a_server_that_stalls_counts_as_broken(
    server: tuple[HttpsSource, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, does = server
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    does.cut, does.stalls = 500, True
    broken(source, tmp_path / "file.h5ad")
    does.cut, does.stalls = None, False
    download(source, tmp_path / "file.h5ad")
    assert (tmp_path / "file.h5ad").read_bytes() == CONTENT


def test_a_page_instead_of_the_file_is_refused(server: tuple[HttpsSource, Behaviour], tmp_path: Path) -> None:
    source, does = server
    does.content = b"<html>Please log in</html>"
    with pytest.raises(UserError, match="no HDF5 file"):
        download(source, tmp_path / "file.h5ad")
    assert not (tmp_path / "file.h5ad").exists()
    does.content = CONTENT
    download(source, tmp_path / "file.h5ad")
    assert (tmp_path / "file.h5ad").read_bytes() == CONTENT


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """Address of a local S3 server, and a file system with its owner's credentials."""
    import s3fs
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    endpoint = "http://{}:{}".format(*running.get_host_and_port())
    owner = s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True)
    owner.makedirs("screens", exist_ok=True)
    yield endpoint, owner
    running.stop()


def on_s3(endpoint: str, key: str, anonymous: bool) -> S3Source:
    return S3Source(kind="s3", url=f"s3://screens/{key}", anonymous=anonymous, endpoint=endpoint)


def test_s3_with_credentials_and_anonymous(bucket: tuple[str, Any], tmp_path: Path) -> None:
    endpoint, owner = bucket
    owner.pipe_file("screens/private.h5ad", CONTENT)
    owner.pipe_file("screens/public.h5ad", CONTENT)
    owner.chmod("screens/public.h5ad", "public-read")
    for key, anonymous in (("private.h5ad", False), ("public.h5ad", True)):
        download(on_s3(endpoint, key, anonymous), tmp_path / key)
        assert (tmp_path / key).read_bytes() == CONTENT
    for key, anonymous in (("private.h5ad", True), ("absent.h5ad", False)):
        with pytest.raises(UserError, match="check the address"):
            download(on_s3(endpoint, key, anonymous), tmp_path / "none.h5ad")


@pytest.mark.parametrize("same", [True, False])
def test_s3_goes_on_only_with_the_same_object(bucket: tuple[str, Any], tmp_path: Path, same: bool) -> None:
    endpoint, owner = bucket
    owner.pipe_file("screens/file.h5ad", CONTENT)
    tag = owner.info("screens/file.h5ad")["ETag"] if same else '"another"'
    # Other bytes than the object's show which of them were kept.
    part = b"x" * 8 if not same else HDF5
    (tmp_path / "file.h5ad.part").write_bytes(part)
    (tmp_path / "file.h5ad.part.json").write_text(json.dumps({"version": tag}))
    download(on_s3(endpoint, "file.h5ad", False), tmp_path / "file.h5ad")
    assert (tmp_path / "file.h5ad").read_bytes() == CONTENT


def test_a_redirection_from_https_to_plain_http_is_refused() -> None:
    answer = httpx.Response(200, request=httpx.Request("GET", "http://mirror.example/file.h5ad"))
    with pytest.raises(UserError, match="redirected to http://mirror"):
        downloads._require_safe(answer, "https://example.org/file.h5ad")
    downloads._require_safe(answer, "http://127.0.0.1/file.h5ad")
