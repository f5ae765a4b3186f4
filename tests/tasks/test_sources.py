"""Raw files: named by the user, downloaded from a server on this machine, or simulated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from core import catalog
from core.catalog.schema import HttpsSource
from core.errors import UserError
from tasks.inputs import check_sources, chosen_dataset, named_source
from tasks.sources import downloaded, fetch_source

CONTENT = b"counts" * 1000


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/broken.h5ad":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:100])
        elif self.path == "/whole.h5ad":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def source(url: str, checksum: str | None = None) -> HttpsSource:
    # The catalog takes https only; the test's server speaks http.
    return HttpsSource.model_construct(kind="https", url=url, sha256=checksum)


def test_a_download_appears_whole_and_is_not_repeated(server: str, data: Path) -> None:
    path = downloaded("set", source(f"{server}/whole.h5ad", sha256(CONTENT).hexdigest()))
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["whole.h5ad"]
    # A second call does not ask the server: nobody answers at port 9.
    again = downloaded("set", source("http://127.0.0.1:9/whole.h5ad"))
    assert again == path


def test_a_download_that_breaks_off_leaves_nothing_under_its_name(server: str, data: Path) -> None:
    with pytest.raises((httpx.TransportError, ConnectionError)):
        downloaded("set", source(f"{server}/broken.h5ad"))
    assert not (data / "downloads" / "set" / "broken.h5ad").exists()


def test_a_missing_file_on_the_server_is_an_http_error(server: str) -> None:
    with pytest.raises(httpx.HTTPStatusError):
        downloaded("set", source(f"{server}/missing.h5ad"))


def test_a_wrong_checksum_is_refused(server: str) -> None:
    with pytest.raises(UserError) as caught:
        downloaded("set", source(f"{server}/whole.h5ad", "0" * 64))
    assert caught.value.field == "sha256"
    assert "0" * 64 in caught.value.remedy


def test_a_named_file_is_used_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = tmp_path / "a.h5ad", tmp_path / "b.h5ad"
    file.touch()
    other.touch()
    assert named_source("norman19", {}) is None
    monkeypatch.setenv("CALIPERT_SOURCE_NORMAN19", str(other))
    assert named_source("norman19", {}) == other.resolve()
    assert named_source("norman19", {"norman19": str(file)}) == file.resolve()
    monkeypatch.setenv("CALIPERT_SOURCE_NORMAN19", str(tmp_path / "none.h5ad"))
    with pytest.raises(UserError) as caught:
        named_source("norman19", {})
    assert caught.value.field == "CALIPERT_SOURCE_NORMAN19"


def test_a_local_source_must_be_named_and_every_named_one_used(tmp_path: Path) -> None:
    panel = catalog.dataset("papalexi21_panel")
    with pytest.raises(UserError, match="--source papalexi21_panel=FILE"):
        check_sources([panel], {})
    file = tmp_path / "x.h5ad"
    file.touch()
    check_sources([panel], {"papalexi21_panel": str(file)})
    with pytest.raises(UserError, match="takes no part"):
        check_sources([panel], {"papalexi21_panel": str(file), "reactome": str(file)})


def test_the_simulated_raw_file_is_made_once() -> None:
    first = fetch_source.fn(catalog.dataset("demo"), {})
    stamp = first.stat().st_mtime_ns
    assert fetch_source.fn(catalog.dataset("demo"), {}) == first
    assert first.stat().st_mtime_ns == stamp


def test_folds_are_checked_against_the_task() -> None:
    assert chosen_dataset("demo", None) == catalog.dataset("demo")
    assert chosen_dataset("demo", "leave-one-out").folds == "leave-one-out"
    for name, folds in (("demo", 1), ("norman19_small", 5)):
        with pytest.raises(UserError) as caught:
            chosen_dataset(name, folds)
        assert caught.value.where == "--folds"
