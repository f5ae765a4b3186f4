"""Folders in a bucket, and the artifact store of several machines: whole or not there, whatever dies on the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import filelock
import httpx
import pytest

from blocks.config.paths import PROJECT_ROOT
from blocks.store import artifacts as store_module
from blocks.store import bucket as module
from blocks.store.artifacts import ArtifactStore, artifact_key
from blocks.store.bucket import DamagedFolder, ObjectStore
from blocks.store.checksums import StoredFile, checksum_files
from core.errors import UserError
from tests.helpers.small_artifact import refuse, write

URL = "s3://screens/group/store"
KEY = artifact_key("cells", {}, {}, "c0de")
RECIPE: dict[str, Any] = {"inputs": {}, "parameters": {}, "code": "c0de"}
LARGE = 17 << 20


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the address of the S3 service, with credentials and no patience."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "CALIPERT_STORE", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(module, "TRIES", 2)

    def point(address: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        module._filesystem.cache_clear()

    yield point
    module._filesystem.cache_clear()
    store_module._shared.clear()


@pytest.fixture
def service(endpoint: Callable[[str], None]) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    address = "http://{}:{}".format(*running.get_host_and_port())
    # What it holds outlives it in this process.
    httpx.post(f"{address}/moto-api/reset", timeout=60).raise_for_status()
    endpoint(address)
    yield address
    running.stop()


@pytest.fixture
def owner(service: str) -> Any:
    """The file system of the bucket's owner, who can do with it what he wants."""
    import s3fs

    files = s3fs.S3FileSystem(endpoint_url=service, skip_instance_cache=True, use_listings_cache=False)
    files.mkdir("screens")
    return files


@pytest.fixture
def bucket(owner: Any) -> ObjectStore:
    return ObjectStore(URL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "deep" / "er").mkdir(parents=True)
    (made / "one.txt").write_text("one", encoding="utf-8")
    (made / "deep" / "er" / "zwei ü#?%.bin").write_bytes(bytes(range(256)))
    (made / "empty").touch()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects(owner: Any, name: str = "") -> list[str]:
    start = "screens/group/store"
    return sorted(path.removeprefix(f"{start}/") for path in owner.find(f"{start}/{name}".rstrip("/")))


def unfinished(owner: Any) -> list[str]:
    return [upload["Key"] for upload in owner.call_s3("list_multipart_uploads", Bucket="screens").get("Uploads", [])]


# Folders


def test_a_folder_comes_back_as_it_went(bucket: ObjectStore, folder: Path, tmp_path: Path, owner: Any) -> None:
    assert not bucket.get("jobs/1", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    standing = bucket.put(folder, "jobs/1")
    assert standing["one.txt"] == StoredFile(
        size=3, sha256="7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    )
    assert bucket.files("jobs/1") == standing
    assert bucket.get("jobs/1", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    assert objects(owner) == sorted(
        ["jobs/1/index.json", *(f"jobs/1/{file.sha256}/{path}" for path, file in standing.items())]
    )
    bucket.remove("jobs/1")
    assert objects(owner) == []
    assert bucket.files("jobs/1") is None
    bucket.remove("jobs/1")


def test_a_large_file_goes_in_parts(bucket: ObjectStore, tmp_path: Path, owner: Any) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "large.bin").write_bytes(random.Random(0).randbytes(LARGE))
    standing = bucket.put(tmp_path / "made", "large")
    path = f"screens/group/store/large/{standing['large.bin'].sha256}/large.bin"
    assert owner.info(path)["ETag"].rstrip('"').endswith("-3")
    assert bucket.get("large", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "made")
    # What was begun and not ended goes with the folder.
    owner.call_s3("create_multipart_upload", Bucket="screens", Key="group/store/large/ab/left.bin")
    bucket.remove("large")
    assert objects(owner) == unfinished(owner) == []


def test_the_first_to_publish_wins_and_the_loser_leaves_nothing(
    bucket: ObjectStore, folder: Path, tmp_path: Path, owner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loser = tmp_path / "loser"
    loser.mkdir()
    (loser / "one.txt").write_text("another", encoding="utf-8")
    publish = ObjectStore._publish

    def late(self: ObjectStore, path: str, files: dict[str, StoredFile]) -> dict[str, StoredFile]:
        """The winner comes between the loser's files and its index."""
        if "empty" not in files:
            self.put(folder, "jobs/1")
        return publish(self, path, files)

    monkeypatch.setattr(ObjectStore, "_publish", late)
    standing = bucket.put(loser, "jobs/1")
    assert standing == checksum_files(folder)
    assert bucket.get("jobs/1", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    assert len(objects(owner)) == 1 + len(standing)


def test_an_upload_that_fails_as_another_has_published_is_no_error(
    bucket: ObjectStore, folder: Path, owner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = ObjectStore._upload

    def ended(self: ObjectStore, files: Mapping[str, Path]) -> None:
        monkeypatch.setattr(ObjectStore, "_upload", upload)
        self.put(folder, "jobs/1")
        owner.cat_file("screens/what another has ended", start=0, end=1)

    monkeypatch.setattr(ObjectStore, "_upload", ended)
    assert bucket.put(folder, "jobs/1") == checksum_files(folder)


def test_a_killed_upload_is_continued(bucket: ObjectStore, folder: Path, owner: Any, tmp_path: Path, calls) -> None:
    files = checksum_files(folder)
    done = f"group/store/jobs/1/{files['one.txt'].sha256}/one.txt"
    half = f"group/store/jobs/1/{files['empty'].sha256}/empty"
    owner.pipe_file(f"screens/{done}", b"one")
    owner.pipe_file(f"screens/{half}", b"not empty")
    owner.pipe_file("screens/group/store/jobs/1/0000/of another attempt", b"x")
    # Without an index there is no folder.
    assert bucket.files("jobs/1") is None
    uploaded: list[str] = []
    upload = ObjectStore._upload

    def noted(self: ObjectStore, files: Mapping[str, Path]) -> None:
        uploaded.extend(path.name for path in files.values())
        upload(self, files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectStore, "_upload", noted)
        bucket.put(folder, "jobs/1")
    assert sorted(uploaded) == ["empty", "zwei ü#?%.bin"]
    assert len(objects(owner)) == 4
    assert bucket.get("jobs/1", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda owner, path, index: owner.rm_file(path), "missing or shorter"),
        (lambda owner, path, index: owner.pipe_file(path, b"1"), "shorter than 3 bytes"),
        (lambda owner, path, index: owner.pipe_file(path, b"1234"), "longer than 3 bytes"),
        (lambda owner, path, index: owner.pipe_file(index, b"{"), "cannot be read"),
        (
            lambda owner, path, index: owner.pipe_file(
                index, b'{"schema_version": 1, "files": {"../up": {"size": 0, "sha256": ""}}}'
            ),
            "not within the folder",
        ),
    ],
)
def test_a_damaged_folder_is_not_returned(
    bucket: ObjectStore, folder: Path, owner: Any, tmp_path: Path, damage: Callable[..., None], said: str
) -> None:
    standing = bucket.put(folder, "jobs/1")
    start = "screens/group/store/jobs/1"
    damage(owner, f"{start}/{standing['one.txt'].sha256}/one.txt", f"{start}/index.json")
    with pytest.raises(DamagedFolder, match=said):
        bucket.get("jobs/1", tmp_path / "back" / "here")
    assert not (tmp_path / "back" / "up").exists()


def test_an_index_of_another_version_is_not_taken_for_damage(bucket: ObjectStore, folder: Path, owner: Any) -> None:
    bucket.put(folder, "jobs/1")
    owner.pipe_file("screens/group/store/jobs/1/index.json", b'{"schema_version": 2, "files": {}}')
    with pytest.raises(UserError, match="one version of calipert"):
        bucket.files("jobs/1")


@pytest.mark.parametrize("name", ["", ".", "..", "a/../b", "/a", "a/", "a//b", "./a"])
def test_names_that_lead_elsewhere_are_refused(bucket: ObjectStore, folder: Path, name: str) -> None:
    for use in (lambda: bucket.put(folder, name), lambda: bucket.remove(name), lambda: bucket.get(name, folder)):
        with pytest.raises(ValueError, match="no name of a folder"):
            use()


def test_only_regular_files_and_empty_folders_take_part(bucket: ObjectStore, folder: Path) -> None:
    bucket.put(folder, "jobs/1")
    with pytest.raises(ValueError, match="not empty"):
        bucket.get("jobs/1", folder)
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="regular files"):
        bucket.put(folder, "jobs/2")


def test_a_listing_of_several_pages(
    bucket: ObjectStore, folder: Path, owner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    for number in range(5):
        owner.pipe_file(f"screens/group/store/jobs/1/left{number}", b"")
    standing = bucket.put(folder, "jobs/1")
    assert len(objects(owner)) == 1 + len(standing)
    bucket.remove("jobs/1")
    assert objects(owner) == []


def test_a_full_disk_is_the_disks_error(
    bucket: ObjectStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(folder, "jobs/1")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ObjectStore, "_download", full)
    with pytest.raises(OSError, match="No space left"):
        bucket.get("jobs/1", tmp_path / "back")


def test_it_works_where_an_event_loop_runs(bucket: ObjectStore, folder: Path) -> None:
    import asyncio

    async def inside() -> None:
        bucket.put(folder, "jobs/1")

    asyncio.run(inside())
    assert bucket.files("jobs/1") is not None


# Faults of the service


@pytest.mark.parametrize("url", ["", "/data", "screens/store", "s3://", "s3://a", "s3://key:word@screens/store"])
def test_an_address_of_another_form_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="s3://bucket/prefix") as caught:
        ObjectStore(url)
    assert "word" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://screens", "s3://screens/", "s3://screens/a/b/"])
def test_prefixes(owner: Any, folder: Path, url: str) -> None:
    bucket = ObjectStore(url)
    assert bucket.url == url.rstrip("/")
    bucket.put(folder, "jobs")
    assert owner.exists(f"{url.rstrip('/')}/jobs/index.json")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ftp://127.0.0.1", "http://me:word@127.0.0.1:1"])
def test_an_endpoint_of_another_form_is_refused_and_not_repeated(endpoint: Callable[[str], None], address: str) -> None:
    endpoint(address)
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL") as caught:
        ObjectStore(URL).files("jobs/1")
    assert address not in str(caught.value)


def every_use(bucket: ObjectStore, folder: Path, tmp_path: Path) -> Iterator[pytest.ExceptionInfo[UserError]]:
    for use in (
        lambda: bucket.files("jobs/1"),
        lambda: bucket.put(folder, "jobs/1"),
        lambda: bucket.get("jobs/1", tmp_path / "back"),
        lambda: bucket.remove("jobs/1"),
    ):
        with pytest.raises(UserError) as caught:
            use()
        assert caught.value.where == URL
        assert "nothing that was made on this machine is lost" in caught.value.remedy
        yield caught


def test_a_bucket_that_is_not_there(service: str, folder: Path, tmp_path: Path) -> None:
    for caught in every_use(ObjectStore(URL), folder, tmp_path):
        assert (caught.value.field, caught.value.found) == ("bucket", f"no bucket screens at {service}")
        assert "CALIPERT_STORE" in caught.value.remedy


def test_credentials_that_are_refused(bucket: ObjectStore, service: str, folder: Path, tmp_path: Path) -> None:
    before = httpx.post(f"{service}/moto-api/reset-auth", content="0", timeout=60).json()[
        "PREVIOUS_INITIAL_NO_AUTH_ACTION_COUNT"
    ]
    try:
        for caught in every_use(bucket, folder, tmp_path):
            assert caught.value.field == "credentials"
            assert "InvalidAccessKeyId" in caught.value.found
            assert "AWS_ACCESS_KEY_ID" in caught.value.remedy
    finally:
        httpx.post(f"{service}/moto-api/reset-auth", content=before, timeout=60)


def test_no_credentials(bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    module._filesystem.cache_clear()
    for caught in every_use(bucket, folder, tmp_path):
        assert (caught.value.field, caught.value.found) == ("credentials", "none (Unable to locate credentials)")


def test_the_credentials_of_secret_blocks_come_first(bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.config.secrets.read_s3_credentials", lambda: {"key": "mine", "secret": "hidden"})
    module._filesystem.cache_clear()
    bucket.files("jobs/1")
    files = module._filesystem(os.getpid())
    assert (files.key, files.secret) == ("mine", "hidden")


def test_an_endpoint_that_refuses(endpoint: Callable[[str], None], folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        endpoint(address)
        for caught in every_use(ObjectStore(URL), folder, tmp_path):
            assert caught.value.field == "endpoint"
            assert f"no answer from {address} after 2 tries" in caught.value.found
            assert "AWS_ENDPOINT_URL" in caught.value.remedy


def test_an_endpoint_that_never_answers(
    endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "READ_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        for caught in every_use(ObjectStore(URL), folder, tmp_path):
            assert caught.value.field == "endpoint"


Answer = tuple[int, bytes, int | None]


@pytest.fixture
def scripted(endpoint: Callable[[str], None]) -> Iterator[list[Answer]]:
    """A service that gives these answers one after the other: status, body, and after how many bytes it hangs up."""
    answers: list[Answer] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body, cut = answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if status == 206:
                self.send_header("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}")
            self.end_headers()
            self.wfile.write(body[:cut])
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        endpoint(f"http://127.0.0.1:{running.server_port}")
        yield answers
        running.shutdown()


INDEX = json.dumps({"schema_version": 1, "files": {"one": {"size": 3, "sha256": ""}}}).encode()


def test_a_service_that_is_busy_and_a_connection_that_breaks_are_tried_again(
    scripted: list[Answer], tmp_path: Path
) -> None:
    scripted += [(503, b"", None), (200, INDEX, 10), (200, INDEX, None), (206, b"one", 2), (206, b"one", None)]
    assert ObjectStore(URL).get("jobs/1", tmp_path / "back")
    assert contents(tmp_path / "back") == {"one": b"one"}
    assert scripted == []


def test_a_service_that_stays_broken_is_one_error(scripted: list[Answer], tmp_path: Path) -> None:
    scripted += [(503, b"", None)] * 2
    with pytest.raises(UserError, match="503") as caught:
        ObjectStore(URL).get("jobs/1", tmp_path / "back")
    assert caught.value.field == "service"
    scripted += [(200, INDEX, 10)] * 2
    with pytest.raises(UserError) as caught:
        ObjectStore(URL).get("jobs/1", tmp_path / "back")
    assert caught.value.field == "endpoint"
    assert scripted == []


# The artifact store of several machines


@pytest.fixture
def host(tmp_path: Path, bucket: ObjectStore) -> Callable[[str], ArtifactStore]:
    """The store of a machine of that name, as a process has it that has just started there."""

    def start(name: str) -> ArtifactStore:
        store_module._shared.clear()
        return ArtifactStore(root=str(tmp_path / name / "store"), remote=URL)

    return start


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests to the bucket, by their method."""
    import s3fs

    made: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def noted(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        made.append(method)
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", noted)
    return made


def obtain(store: ArtifactStore, build: Callable[[Path], None] = write) -> Path:
    return store.obtain("cells", KEY, build, **RECIPE)


def temporaries(store: ArtifactStore) -> list[Path]:
    place = Path(store.root) / ".temporary"
    return list(place.rglob("*")) if place.exists() else []


def test_the_bucket_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CALIPERT_STORE", raising=False)
    assert ArtifactStore().remote is None
    monkeypatch.setenv("CALIPERT_STORE", "")
    assert ArtifactStore().remote is None
    monkeypatch.setenv("CALIPERT_STORE", URL)
    assert ArtifactStore().remote == URL


def test_a_second_machine_computes_nothing(host: Callable[[str], ArtifactStore], owner: Any) -> None:
    one = obtain(host("one"))
    second = host("two")
    two = obtain(second, refuse)
    assert contents(two) == contents(one)
    assert {path.stat().st_mode & 0o777 for path in two.rglob("*") if path.is_file()} == {0o444}
    assert temporaries(second) == []
    assert len(objects(owner)) == 4
    # From then on it needs no bucket.
    assert obtain(ArtifactStore(root=second.root, remote=None), refuse) == two


def test_what_is_here_and_not_in_the_bucket_is_uploaded(host: Callable[[str], ArtifactStore], tmp_path: Path) -> None:
    one = obtain(ArtifactStore(root=str(tmp_path / "one" / "store"), remote=None))
    assert obtain(host("one"), refuse) == one
    assert contents(obtain(host("two"), refuse)) == contents(one)


def test_a_bucket_costs_one_request_per_artifact_and_process(
    host: Callable[[str], ArtifactStore], calls: list[str]
) -> None:
    store = host("one")
    obtain(store)
    assert sorted(set(calls)) == ["get_object", "list_objects_v2", "put_object"]
    calls.clear()
    obtain(store, refuse)
    assert calls == []
    obtain(host("one"), refuse)
    assert calls == ["get_object"]
    host("two").find("cells", KEY)
    obtain(ArtifactStore(root=store.root, remote=URL), refuse)
    assert calls.count("list_objects_v2") == 0


def test_find_fetches_and_never_builds(host: Callable[[str], ArtifactStore], tmp_path: Path) -> None:
    two = host("two")
    assert two.find("cells", KEY) is None
    assert not Path(two.root).exists()
    one = obtain(host("one"))
    two = host("two")
    assert two.find("cells", KEY) == Path(two.root) / "cells" / KEY
    assert contents(Path(two.root) / "cells" / KEY) == contents(one)
    alone = ArtifactStore(root=two.root, remote=None)
    assert alone.find("cells", KEY) == Path(two.root) / "cells" / KEY
    assert alone.find("cells", artifact_key("cells", {}, {"a": 1}, "c0de")) is None
    with pytest.raises(ValueError, match="not a key"):
        alone.find("cells", "short")


def test_find_does_not_return_what_is_damaged(
    host: Callable[[str], ArtifactStore], tmp_path: Path, owner: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole = contents(obtain(host("one")))
    two = host("two")
    table = (two.find("cells", KEY) or tmp_path) / "table.txt"
    table.chmod(0o644)
    table.write_text("x")
    assert ArtifactStore(root=two.root, remote=None).find("cells", KEY) is None
    found = host("two").find("cells", KEY)
    assert found is not None
    assert contents(found) == whole
    table.chmod(0o644)
    table.write_text("x")
    damage_there(owner)
    assert host("two").find("cells", KEY) is None
    assert "has changed" in caplog.text
    assert temporaries(two) == []


def damage_there(owner: Any, name: str = "table.txt", content: bytes = b"012345678X") -> None:
    (path,) = (path for path in owner.find("screens/group/store") if path.endswith(name))
    owner.pipe_file(path, content)


def lose_there(owner: Any) -> None:
    (path,) = (path for path in owner.find("screens/group/store") if path.endswith("layer.bin"))
    owner.rm_file(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_there, "table.txt has changed"),
        (lambda owner: damage_there(owner, content=b"short"), "table.txt is shorter than 10 bytes"),
        (lambda owner: damage_there(owner, "manifest.json", b"{}"), "manifest.json is shorter than"),
        (lambda owner: damage_there(owner, "index.json", b"{}"), "index.json cannot be read"),
        (lose_there, "missing or shorter"),
    ],
)
def test_what_is_damaged_in_the_bucket_is_built_again_and_replaced(
    host: Callable[[str], ArtifactStore],
    owner: Any,
    damage: Callable[[Any], None],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = contents(obtain(host("one")))
    damage(owner)
    two = host("two")
    with caplog.at_level(logging.WARNING, "calipert.store"):
        folder = obtain(two)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert said in warning
    assert URL in warning
    assert contents(folder).keys() == whole.keys()
    assert temporaries(two) == []
    assert contents(obtain(host("three"), refuse)) == contents(folder)
    assert len(objects(owner)) == 4


def test_what_was_found_damaged_is_uploaded_when_it_is_built_again(
    host: Callable[[str], ArtifactStore], owner: Any
) -> None:
    obtain(host("one"))
    damage_there(owner)
    two = host("two")
    assert two.find("cells", KEY) is None
    folder = obtain(two)
    assert contents(obtain(host("three"), refuse)) == contents(folder)


def test_an_index_that_cannot_be_read_is_replaced_by_who_has_the_artifact(
    host: Callable[[str], ArtifactStore], owner: Any, caplog: pytest.LogCaptureFixture
) -> None:
    obtain(host("one"))
    damage_there(owner, "index.json", b"{}")
    obtain(host("one"), refuse)
    assert "cannot be read" in caplog.text
    assert obtain(host("two"), refuse)


def test_another_artifact_under_a_name_is_damage(
    host: Callable[[str], ArtifactStore], bucket: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = artifact_key("cells", {}, {"a": 1}, "c0de")
    store = host("one")
    folder = store.obtain("cells", other, write, inputs={}, parameters={"a": 1}, code="c0de")
    bucket.put(folder, f"cells/{KEY}")
    obtain(host("two"))
    assert "belongs to another artifact" in caplog.text
    obtain(host("three"), refuse)


def test_other_values_of_another_machine_are_said(
    host: Callable[[str], ArtifactStore], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    obtain(host("one"))

    def other(folder: Path) -> None:
        write(folder)
        (folder / "table.txt").write_text("other bits", encoding="utf-8")

    alone = obtain(ArtifactStore(root=str(tmp_path / "two" / "store"), remote=None), other)
    before = contents(alone)
    assert obtain(host("two"), refuse) == alone
    assert "another machine has uploaded" in caplog.text
    assert contents(alone) == before
    assert contents(obtain(host("three"), refuse))["table.txt"] == b"0123456789"


def test_a_bucket_that_is_missing_is_said_before_anything_is_built(
    host: Callable[[str], ArtifactStore], owner: Any
) -> None:
    owner.rmdir("screens")
    with pytest.raises(UserError, match="no bucket screens"):
        obtain(host("one"), refuse)


def test_a_bucket_that_vanishes_while_an_artifact_is_built(
    host: Callable[[str], ArtifactStore], owner: Any, calls: list[str]
) -> None:
    def build(folder: Path) -> None:
        write(folder)
        owner.rmdir("screens")

    store = host("one")
    with pytest.raises(UserError, match="no bucket screens") as caught:
        obtain(store, build)
    assert caught.value.where == URL
    assert temporaries(store) == []
    # It stays, and so does the error until the bucket is back.
    with pytest.raises(UserError, match="no bucket screens"):
        obtain(store, refuse)
    owner.mkdir("screens")
    folder = obtain(store, refuse)
    assert contents(obtain(host("two"), refuse)) == contents(folder)


def test_an_endpoint_that_vanishes_while_an_artifact_is_built(
    host: Callable[[str], ArtifactStore], endpoint: Callable[[str], None], service: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))

        def build(folder: Path) -> None:
            write(folder)
            endpoint(f"http://127.0.0.1:{free.getsockname()[1]}")

        store = host("one")
        with pytest.raises(UserError, match="no answer from"):
            obtain(store, build)
    endpoint(service)
    obtain(store, refuse)
    obtain(host("two"), refuse)


def test_a_store_that_cannot_be_written_still_uploads(
    host: Callable[[str], ArtifactStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = obtain(ArtifactStore(root=str(tmp_path / "one" / "store"), remote=None))
    with monkeypatch.context() as locked:
        locked.setattr(os, "access", lambda path, mode: False)
        locked.setattr(filelock, "FileLock", refuse)
        assert obtain(host("one"), refuse) == folder
    obtain(host("two"), refuse)


BUILDER = """
import os, random, sys, time
from pathlib import Path
import s3fs
from blocks.config.secrets import read_s3_credentials
from blocks.store.artifacts import ArtifactStore, artifact_key

def build(folder, number, seconds):
    with (Path(os.environ["BUILT"])).open("a") as log:
        log.write(f"{number}\\n")
    own = random.Random(number if seconds < 1 else os.getpid())
    for part in range(8):
        (folder / f"part{part}").write_bytes(own.randbytes(1000))
        time.sleep(seconds / 8)
    (folder / "large.bin").write_bytes(own.randbytes(17 << 20))

def obtain(root, remote, number, seconds):
    recipe = dict(inputs={}, parameters={"number": number}, code="c0de")
    key = artifact_key("slow", **recipe)
    store = ArtifactStore(root=root, remote=remote)
    return store.obtain("slow", key, lambda folder: build(folder, number, seconds), **recipe)
"""

# Everything is imported once; each line on stdin then starts one builder, which can be killed.
FORKING = f"""{BUILDER}
for line in sys.stdin:
    root, remote, number, seconds = line.split()
    child = os.fork()
    if child == 0:
        obtain(root, remote, int(number), float(seconds))
        os._exit(0)
    print(child, flush=True)
    # Until then its id is nobody else's.
    sys.stdin.readline()
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of what was built."""
    monkeypatch.setenv("BUILT", str(tmp_path / "built"))
    (tmp_path / "built").touch()
    return tmp_path / "built"


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    tmp_path: Path, owner: Any, built: Path, host: Callable[[str], ArtifactStore]
) -> None:
    names: dict[str, Any] = {}
    exec(BUILDER, names)  # noqa: S102 - the same functions here as in the builders
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING], cwd=PROJECT_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    answers = process.stdout
    assert answers is not None

    def start(root: str, number: int) -> int:
        print(root, URL, number, 0.8, file=process.stdin, flush=True)
        return int(answers.readline())

    def wait() -> None:
        print("wait", file=process.stdin, flush=True)
        assert answers.readline() == "ended\n"

    try:
        whole = float("inf")
        for number in (98, 99):
            began = time.monotonic()
            start(str(tmp_path / "undisturbed" / "store"), number)
            wait()
            whole = min(whole, time.monotonic() - began)
        chance = random.Random(0)
        store = host("one")
        states = set()
        for number in range(12):
            key = artifact_key("slow", {}, {"number": number}, "c0de")
            child = start(store.root, number)
            time.sleep(chance.uniform(0, 1.2 * whole))
            os.kill(child, signal.SIGKILL)
            wait()
            here, there = Path(store.root) / "slow" / key, objects(owner, f"slow/{key}")
            states.add((here.exists(), bool(there), f"slow/{key}/index.json" in there))
            # Whatever is to be had is whole.
            found = host("two").find("slow", key)
            assert (found is None) == (f"slow/{key}/index.json" not in there)
            times = built.read_text().splitlines().count(str(number))
            finished = here.exists()
            folder = names["obtain"](store.root, URL, number, 0)
            if finished:
                assert built.read_text().splitlines().count(str(number)) == times
            expected = tmp_path / f"expected{number}"
            expected.mkdir()
            names["build"](expected, number, 0)
            made = {name: data for name, data in contents(folder).items() if name != "manifest.json"}
            assert made == contents(expected)
            assert temporaries(store) == []
            standing = ObjectStore(URL).files(f"slow/{key}") or {}
            assert objects(owner, f"slow/{key}") == sorted(
                [f"slow/{key}/index.json", *(f"slow/{key}/{file.sha256}/{path}" for path, file in standing.items())]
            )
            assert unfinished(owner) == []
            if found is None:
                found = host("two").find("slow", key)
            assert found is not None
            assert contents(found) == contents(folder)
    finally:
        process.kill()
        process.communicate()
    # The kills met it in more than one state, or the loop would show little.
    assert len(states) > 1


def test_machines_that_race_for_one_key_leave_one_artifact(
    tmp_path: Path, owner: Any, built: Path, host: Callable[[str], ArtifactStore]
) -> None:
    """Two processes on each of two machines, whose builds differ in their bits."""
    script = f"{BUILDER}\nprint(obtain(sys.argv[1], {URL!r}, 7, 1.5))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / name / "store")],
            cwd=PROJECT_ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two", "one", "two")
    ]
    folders = [Path(process.communicate(timeout=120)[0].strip()) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(folders)) == 2
    assert len(built.read_text().splitlines()) <= 2
    key = artifact_key("slow", {}, {"number": 7}, "c0de")
    third = host("three").find("slow", key)
    assert third is not None
    assert contents(third) in [contents(folder) for folder in folders[:2]]
    assert len(objects(owner, f"slow/{key}")) == 11
    assert unfinished(owner) == []
