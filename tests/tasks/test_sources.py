"""Raw files: named by the user, downloaded from a server on this machine, or simulated."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from prefect import Flow
from prefect.states import Failed

from blocks.config.catalog import open_catalog
from blocks.http import ConnectionLost
from core.catalog.registry import Catalog
from core.catalog.schema import HttpsSource, S3Source
from core.errors import UserError
from flows.benchmark import benchmark
from flows.calibrate import calibrate
from flows.prepare import prepare
from tasks.downloads import is_download_transient
from tasks.inputs import choose_dataset, resolve_sources
from tasks.prepare import DECIDING
from tasks.sources import describe_source, download_once, fetch_source, is_worth_a_retry

CONTENT = b"\x89HDF\r\n\x1a\n" + b"counts" * 1000
CHANGED = CONTENT + b"!"
asked: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked[self.path] += 1
        if self.path == "/broken.h5ad":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:100])
        elif self.path in ("/whole.h5ad", "/slow.h5ad", "/new/whole.h5ad?download=1"):
            content = CHANGED if "new" in self.path else CONTENT
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:100])
            if "slow" in self.path:
                self.wfile.flush()
                time.sleep(0.3)
            self.wfile.write(content[100:])
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
    path = download_once("set", source(f"{server}/whole.h5ad", sha256(CONTENT).hexdigest()))
    assert path.read_bytes() == CONTENT
    assert left_in(path.parent) == ["whole.h5ad", "whole.h5ad.sha256"]
    before = asked["/whole.h5ad"]
    assert download_once("set", source(f"{server}/whole.h5ad")) == path
    assert asked["/whole.h5ad"] == before


def left_in(folder: Path) -> list[str]:
    """All but hidden files: the lock may stay."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_simultaneous_callers_download_once(server: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: download_once("set", source(f"{server}/slow.h5ad")), range(2)))
    assert both[0] == both[1]
    assert both[0].read_bytes() == CONTENT
    assert left_in(both[0].parent) == ["slow.h5ad", "slow.h5ad.sha256"]
    assert asked["/slow.h5ad"] == 1


def test_a_changed_address_is_downloaded_anew(server: str) -> None:
    old = download_once("set", source(f"{server}/whole.h5ad"))
    new = download_once("set", source(f"{server}/new/whole.h5ad?download=1"))
    assert (old.name, new.name) == ("whole.h5ad", "whole.h5ad")
    assert old.read_bytes() == CONTENT
    assert new.read_bytes() == CHANGED


def test_a_download_that_breaks_off_leaves_nothing_under_its_name(server: str, data: Path) -> None:
    with pytest.raises((httpx.TransportError, ConnectionError)):
        download_once("set", source(f"{server}/broken.h5ad"))
    (folder,) = (data / "downloads" / "set").iterdir()
    assert "broken.h5ad" not in left_in(folder)


def test_a_missing_file_on_the_server_is_the_users_to_mend(server: str) -> None:
    with pytest.raises(UserError, match="HTTP 404"):
        download_once("set", source(f"{server}/missing.h5ad"))


def test_a_file_that_changed_after_its_download_is_refused(server: str) -> None:
    path = download_once("set", source(f"{server}/whole.h5ad"))
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(UserError, match="at its first download it had") as caught:
        download_once("set", source(f"{server}/whole.h5ad"))
    assert sha256(CONTENT).hexdigest() in caught.value.remedy


def test_a_wrong_checksum_is_refused(server: str) -> None:
    with pytest.raises(UserError) as caught:
        download_once("set", source(f"{server}/whole.h5ad", "0" * 64))
    assert caught.value.field == "sha256"
    assert "0" * 64 in caught.value.remedy


def test_a_named_file_is_used_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = tmp_path / "a.h5ad", tmp_path / "b.h5ad"
    file.touch()
    other.touch()
    norman19 = open_catalog().dataset("norman19")
    assert resolve_sources([norman19], {}) == {}
    monkeypatch.setenv("CALIPERT_SOURCE_NORMAN19", str(other))
    assert resolve_sources([norman19], {}) == {"norman19": other.resolve()}
    assert resolve_sources([norman19], {"norman19": str(file)}) == {"norman19": file.resolve()}
    monkeypatch.setenv("CALIPERT_SOURCE_NORMAN19", str(tmp_path / "none.h5ad"))
    with pytest.raises(UserError) as caught:
        resolve_sources([norman19], {})
    assert caught.value.field == "CALIPERT_SOURCE_NORMAN19"


def test_a_local_source_must_be_named_and_every_named_one_used(tmp_path: Path) -> None:
    panel = open_catalog().dataset("papalexi21_panel")
    with pytest.raises(UserError, match="--source papalexi21_panel=FILE"):
        resolve_sources([panel], {})
    file = tmp_path / "x.h5ad"
    file.touch()
    resolve_sources([panel], {"papalexi21_panel": str(file)})
    with pytest.raises(UserError, match="takes no part"):
        resolve_sources([panel], {"papalexi21_panel": str(file), "reactome": str(file)})


def test_the_simulated_raw_file_is_made_once() -> None:
    first = fetch_source.fn(open_catalog().dataset("demo"))
    stamp = first.stat().st_mtime_ns
    assert fetch_source.fn(open_catalog().dataset("demo")) == first
    assert first.stat().st_mtime_ns == stamp


def test_folds_are_checked_against_the_task() -> None:
    assert choose_dataset("demo", None) == open_catalog().dataset("demo")
    assert choose_dataset("demo", "leave-one-out").folds == "leave-one-out"
    for name, folds in (("demo", 1), ("norman19_small", 5)):
        with pytest.raises(UserError) as caught:
            choose_dataset(name, folds)
        assert caught.value.where == "--folds"


def test_where_a_raw_file_comes_from_is_told_without_a_path_of_this_machine(server: str, tmp_path: Path) -> None:
    demo, panel = open_catalog().dataset("demo"), open_catalog().dataset("papalexi21_panel")
    file = tmp_path / "mine.h5ad"
    file.touch()
    assert describe_source(demo, fetch_source.fn(demo)) == "simulated"
    assert describe_source(demo, fetch_source.fn(demo, file)) == "mine.h5ad"
    assert describe_source(panel, fetch_source.fn(panel, file)) == "mine.h5ad"
    public = open_catalog().dataset("norman19").model_copy(update={"source": source(f"{server}/whole.h5ad")})
    assert describe_source(public, fetch_source.fn(public)) == f"{server}/whole.h5ad"
    assert describe_source(public, fetch_source.fn(public, file)) == "mine.h5ad"


@pytest.mark.parametrize("flow", [prepare, calibrate])
def test_a_file_for_nothing_is_refused_before_any_work(flow: Flow[..., object], tmp_path: Path, data: Path) -> None:
    file = tmp_path / "mine.h5ad"
    file.touch()
    with pytest.raises(UserError, match="'dmeo' takes no part"):
        flow.fn(dataset="demo", sources={"dmeo": str(file)})
    assert not data.exists()


def test_the_mirror_is_downloaded_and_named_but_a_named_file_comes_first(
    server: str, tmp_path: Path, users_entry: Callable[..., str]
) -> None:
    name = users_entry(server)
    mirror, raw = (choose_dataset(name, origin=origin) for origin in ("mirror", "raw"))
    file = fetch_source.fn(mirror)
    assert file.read_bytes() == CHANGED
    assert fetch_source.fn(raw).read_bytes() == CONTENT
    assert describe_source(mirror, file) == f"{server}/new/whole.h5ad?download=1"
    assert describe_source(raw, fetch_source.fn(raw)) == f"{server}/whole.h5ad"
    mine = tmp_path / "mine.h5ad"
    mine.touch()
    assert fetch_source.fn(mirror, mine) == mine
    assert describe_source(mirror, mine.resolve()) == "mine.h5ad"


@pytest.fixture
def users_entry(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts an entry `screen` with a mirror, both on the test's server, into the catalog."""

    def put(server: str) -> str:
        entry = (
            open_catalog()
            .dataset("norman19")
            .model_copy(
                update={
                    "name": "screen",
                    "source": source(f"{server}/whole.h5ad"),
                    "mirror": source(f"{server}/new/whole.h5ad?download=1"),
                }
            )
        )
        monkeypatch.setattr(Catalog, "dataset", lambda catalog, name: entry)
        return "screen"

    return put


def test_the_cells_of_a_file_are_the_same_artifact_whatever_it_was_asked_for_as() -> None:
    raw, mirror = (choose_dataset("norman19", origin=origin) for origin in ("raw", "mirror"))
    assert raw.model_dump(include=DECIDING) == mirror.model_dump(include=DECIDING)
    assert "mirror" not in raw.model_dump(include=DECIDING)


def test_file_licence_and_citation_are_said_before_a_download_and_not_again(
    server: str, users_entry: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    spec = choose_dataset(users_entry(server))
    with caplog.at_level(logging.INFO, "calipert"):
        fetch_source.fn(spec)
        first, *rest = caplog.messages
        for text in (f"{server}/whole.h5ad", spec.licence, spec.citation):
            assert text in first
        assert any(message.startswith("downloading") for message in rest)
        caplog.clear()
        fetch_source.fn(spec)
        assert caplog.messages == []


@pytest.mark.parametrize("flow", [prepare, calibrate, benchmark])
def test_a_mirror_that_is_not_there_is_refused_before_any_work(flow: Flow[..., object], data: Path) -> None:
    with pytest.raises(UserError, match="none, but the origin is to be mirror"):
        flow.fn(dataset="demo", origin="mirror")
    assert not data.exists()


@pytest.mark.parametrize("kind", ["https", "s3"])
def test_a_lost_connection_is_tried_again_and_named(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = {
        "https": source("http://127.0.0.1:9/a.h5ad"),
        "s3": S3Source(kind="s3", url="s3://screens/a.h5ad", anonymous=True, endpoint="http://127.0.0.1:9"),
    }[kind]
    spec = open_catalog().dataset("norman19").model_copy(update={"source": nowhere})
    with pytest.raises(ConnectionLost) as caught:
        fetch_source.fn(spec)
    assert caught.value.where == nowhere.url
    assert "--source norman19=FILE" in caught.value.remedy
    assert is_worth_a_retry(None, None, Failed(data=caught.value))
    assert nowhere.url in caplog.messages[-1]


def test_what_does_not_pass_is_not_tried_again(server: str) -> None:
    spec = open_catalog().dataset("norman19").model_copy(update={"source": source(f"{server}/missing.h5ad")})
    with pytest.raises(UserError, match="HTTP 404") as caught:
        fetch_source.fn(spec)
    assert not is_worth_a_retry(None, None, Failed(data=caught.value))
    assert not is_worth_a_retry(None, None, Failed(data=ValueError("no")))


@pytest.mark.parametrize(("number", "passes"), [(errno.EBUSY, True), (errno.EREMOTEIO, True), (errno.ENOSPC, False)])
def test_what_s3_says_in_numbers_may_pass_but_a_full_disk_does_not(number: int, passes: bool) -> None:
    assert is_download_transient(OSError(number, "x")) == passes


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tasks.sources.download", full)
    source = HttpsSource.model_construct(kind="https", url=f"{server}/other.h5ad", sha256=None)
    with pytest.raises(UserError, match="no space left") as error:
        download_once("other", source)
    assert "CALIPERT_DATA" in error.value.remedy
