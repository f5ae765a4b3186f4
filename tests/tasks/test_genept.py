"""Vectors of texts by a service: each is paid for once, only a whole answer counts, and nobody sees the key."""

from __future__ import annotations

import logging
import pickle
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from prefect.states import Failed

from blocks.config.catalog import open_catalog
from blocks.http import ConnectionLost
from blocks.services import text_service
from blocks.services.vectors import Vector, read_vector
from core.errors import UserError
from flows.benchmark import benchmark
from flows.embed import embed as flow
from flows.reproduce import reproduce
from tasks import embed, embed_texts, sources
from tasks.embed_texts import check_services
from tasks.inputs import list_embedding_inputs
from tasks.sources import fetch_inputs, is_worth_a_retry
from tests.helpers import text_service_stand_in as stand_in

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-planted0123456789abcdef"
OTHER_SECRET = "calipert-other-key"  # noqa: S105 - the name of a block
TEXTS = {f"G{number}": f"What gene {number} does." for number in range(7)} | {"H": "What gene 0 does."}


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A data folder of the test's own; tasks as plain functions, three texts at once, and no waits."""
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))
    for module, name in ((embed, "embed"), (embed_texts, "ask_for_vectors"), (sources, "fetch_pretrained")):
        monkeypatch.setattr(module, name, getattr(module, name).fn)
    monkeypatch.setattr(embed_texts, "TEXTS_AT_ONCE", 3)
    monkeypatch.setattr(embed_texts, "sleep", lambda _: None)
    return tmp_path / "data"


@pytest.fixture
def service(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The service, and an entry `mine` that names it."""
    with stand_in.serving() as running:
        monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path / "catalog"))
        stand_in.write_entry(tmp_path / "catalog", running.url)
        yield running


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Puts a key, or none, into the place of both Secret blocks; at first KEY."""
    blocks = (stand_in.SECRET, OTHER_SECRET)

    def put(value: str | None) -> None:
        for module in (text_service, embed_texts):
            monkeypatch.setattr(module, "read_secret", lambda name: value if name in blocks else None)

    put(KEY)
    return put


@pytest.fixture
def make(service: Any, key: object, tmp_path: Path) -> Callable[..., Path]:
    """Makes the embedding of genes with these texts; the artifact's folder."""

    def call(texts: dict[str, str] = TEXTS, backwards: bool = False) -> Path:
        genes = stand_in.write_genes(tmp_path / "genes", texts, backwards)
        spec = open_catalog().embedding("mine")
        return embed.make_shared_embedding(spec, fetch_inputs(list_embedding_inputs(spec), {"ncbi_genes": genes}))

    return call


def test_every_gene_has_the_vector_of_its_text(service: Any, make: Callable[..., Path]) -> None:
    table = pd.read_parquet(make() / "embedding.parquet")
    assert {gene: list(row) for gene, row in zip(table.index, table.to_numpy(), strict=True)} == {
        gene: stand_in.vector(text) for gene, text in TEXTS.items()
    }
    # A text of two genes is asked for once.
    assert service.texts == sorted(set(TEXTS.values()))
    assert [len(request["input"]) for request in service.asked] == [3, 3, 1]
    assert {(request["model"], request["dimensions"]) for request in service.asked} == {("a-model", 4)}
    assert {headers["Authorization"] for headers in service.headers} == {f"Bearer {KEY}"}


def test_only_texts_that_are_new_are_asked_for(
    service: Any, make: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    assert f"7 of 7 texts are asked of {service.url} (model a-model), about 29 tokens" in caplog.text
    service.asked.clear()
    assert make() == first
    assert not service.asked
    more = make(TEXTS | {"NEW": "What the new gene does."})
    assert service.texts == ["What the new gene does."]
    assert "1 of 8 texts are asked" in caplog.text
    assert list(pd.read_parquet(more / "embedding.parquet").index) == sorted([*TEXTS, "NEW"])


def test_the_order_of_the_files_changes_no_byte(
    service: Any, make: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    first = make()
    (data / "vectors").rename(tmp_path / "away")
    second = make(backwards=True)
    assert second != first
    assert (second / "embedding.parquet").read_bytes() == (first / "embedding.parquet").read_bytes()
    assert service.texts == 2 * sorted(set(TEXTS.values()))


def test_another_service_or_model_or_length_is_asked_anew(
    service: Any, make: Callable[..., Path], tmp_path: Path
) -> None:
    found = {make()}
    for change in ({"url": service.url.replace("127.0.0.1", "localhost")}, {"model": "another"}):
        write_service(tmp_path, service, change)
        found.add(make())
    assert len(found) == 3
    assert len(service.texts) == 3 * 7
    # Without `dimensions` the service gives what it gives.
    stand_in.write_entry(tmp_path / "catalog", service.url, dimensions=None)
    found.add(make())
    assert len(found) == 4
    assert len(service.texts) == 4 * 7
    assert "dimensions" not in service.asked[-1]
    stand_in.write_entry(tmp_path / "catalog", service.url, dimensions=3)
    service.next = 3 * [lambda request: (200, {}, {"data": good(request, 3)})]
    shorter = make()
    assert shorter not in found
    assert len(service.texts) == 5 * 7
    assert service.asked[-1]["dimensions"] == 3
    assert list(pd.read_parquet(shorter / "embedding.parquet").columns) == ["d0", "d1", "d2"]


def write_service(tmp_path: Path, service: Any, change: dict[str, str]) -> None:
    """The entry `mine` with another `service`."""
    about = {"url": service.url, "model": "a-model", "secret": stand_in.SECRET} | change
    stand_in.write_entry(tmp_path / "catalog", service.url, service=about)


@pytest.mark.parametrize("change", [{"secret": OTHER_SECRET}, {"url": "{url}/"}, {"url": "{url}//"}])
def test_another_key_or_a_slash_at_the_end_is_no_other_service(
    service: Any, make: Callable[..., Path], tmp_path: Path, change: dict[str, str]
) -> None:
    first = make()
    write_service(tmp_path, service, {field: value.format(url=service.url) for field, value in change.items()})
    assert make() == first
    # Nor where the artifact is not there yet.
    assert make(backwards=True) != first
    assert len(service.texts) == 7
    make(TEXTS | {"NEW": "What the new gene does."})
    assert len(service.texts) == 8


# The key


@pytest.mark.parametrize(
    "run",
    [
        lambda: flow.fn("mine"),
        lambda: benchmark.fn("demo", ["fmlp_mine"]),
        lambda: reproduce.fn(["demo"], ["fmlp_mine"]),
    ],
)
def test_a_missing_key_is_named_before_any_download_or_call(
    service: Any, key: Callable[[str | None], None], data: Path, run: Callable[[], object]
) -> None:
    key(None)
    with pytest.raises(UserError, match="no such block") as error:
        run()
    assert error.value.field == stand_in.SECRET
    assert "make the Secret block calipert-text-key" in error.value.remedy
    assert not service.asked
    assert not data.exists()


def test_without_a_key_what_is_made_or_kept_can_be_used(
    make: Callable[..., Path], key: Callable[[str | None], None], tmp_path: Path, service: Any
) -> None:
    folder = make()
    key(None)
    spec, named = open_catalog().embedding("mine"), {"ncbi_genes": tmp_path / "genes"}
    check_services([spec], named)
    # Other files with the same texts: the embedding is not made yet, its vectors are kept.
    stand_in.write_genes(tmp_path / "genes", TEXTS, backwards=True)
    check_services([spec], named)
    assert make(backwards=True) != folder
    stand_in.write_genes(tmp_path / "genes", TEXTS | {"NEW": "What the new gene does."})
    with pytest.raises(UserError, match="no such block"):
        check_services([spec], named)
    with pytest.raises(UserError, match="no such block"):
        make(TEXTS | {"NEW": "What the new gene does."})
    assert len(service.texts) == 7


def test_downloaded_files_count_as_there(
    key: Callable[[str | None], None], make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    monkeypatch.setattr(
        sources, "download", lambda source, target: target.write_bytes((tmp_path / "genes" / target.name).read_bytes())
    )
    key(None)
    with pytest.raises(UserError, match="no such block"):
        check_services([open_catalog().embedding("mine")], {})
    sources.fetch_pretrained(open_catalog().pretrained("ncbi_genes"))
    check_services([open_catalog().embedding("mine")], {})


@pytest.mark.parametrize("value", [f"{KEY}\n", f" {KEY}", f"{KEY}é"])
def test_what_can_be_no_key_is_refused_and_not_shown(
    service: Any, make: Callable[..., Path], key: Callable[[str | None], None], value: str
) -> None:
    key(value)
    with pytest.raises(UserError, match="a blank, a line end or a letter that no key has") as error:
        make()
    assert KEY not in "".join(traceback.format_exception(error.value))
    assert not service.asked


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_asked_with_once_and_its_block_named(
    service: Any, make: Callable[..., Path], status: int
) -> None:
    service.next = [lambda _: (status, {}, {"error": {"message": f"Incorrect API key provided: {KEY}"}})]
    with pytest.raises(UserError) as error:
        make()
    assert (error.value.where, error.value.field) == (f"{service.url}/embeddings", "key")
    assert f"HTTP {status}" in error.value.found
    assert stand_in.SECRET in error.value.remedy
    assert not is_worth_a_retry(None, None, Failed(data=error.value))
    assert len(service.asked) == 1
    assert KEY not in "".join(traceback.format_exception(error.value))


def test_the_key_is_in_no_file_log_or_error(
    service: Any, make: Callable[..., Path], data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "calipert"):
        caplog.set_level(logging.DEBUG, logger=name)
    errors = []
    for status in (400, 500, 429):
        service.next = [lambda _, status=status: (status, {}, {"error": {"message": f"not with {KEY}"}})]
        with pytest.raises(UserError) as error:
            make()
        assert f"HTTP {status}" in error.value.found
        assert "not with ..." in error.value.found
        errors += ["".join(traceback.format_exception(error.value)), repr(pickle.dumps(error.value))]
    make()
    assert service.headers[-1]["Authorization"] == f"Bearer {KEY}"
    assert "httpcore" in {record.name.split(".")[0] for record in caplog.records}
    assert KEY not in caplog.text
    assert not [error for error in errors if KEY in error]
    files = [path for path in data.rglob("*") if path.is_file()]
    assert "manifest.json" in {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


# What the service answers


@pytest.mark.parametrize(
    ("status", "headers", "waited"),
    [(429, {"Retry-After": "7"}, 7), (429, {"Retry-After": "9999"}, 120), (503, {}, 0), (408, {}, 0), (500, {}, 0)],
)
def test_what_may_pass_is_worth_another_try_after_the_wait_that_is_asked_for(
    service: Any,
    make: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    headers: dict[str, str],
    waited: float,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(embed_texts, "sleep", waits.append)
    service.next = [service.answer, lambda _: (status, headers, b"busy")]
    with pytest.raises(ConnectionLost, match=f"HTTP {status}") as error:
        make()
    assert waits == [waited]
    assert is_worth_a_retry(None, None, Failed(data=error.value))
    service.asked.clear()
    make()
    assert service.texts == sorted(set(TEXTS.values()))[3:]


@pytest.mark.parametrize(("try_", "waits"), [(1, [7]), (6, [7]), (7, [])])
def test_after_the_last_try_nothing_waits(
    service: Any, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, try_: int, waits: list[float]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(embed_texts, "sleep", waited.append)
    monkeypatch.setenv("PREFECT__RUNTIME__TASK_RUN__RUN_COUNT", str(try_))
    service.next = [lambda _: (429, {"Retry-After": "7"}, b"busy")]
    with pytest.raises(ConnectionLost, match="HTTP 429"):
        make()
    assert waited == waits


@pytest.mark.parametrize("url", ["https://a:b", "https://xn--"])
def test_what_can_be_no_address_is_named_and_not_tried_again(service: Any, key: object, url: str) -> None:
    # Such as the catalog may let pass.
    known = open_catalog().embedding("mine").service
    assert known is not None
    about = known.model_copy(update={"url": url})
    with pytest.raises(UserError, match="no address that can be asked") as error:
        text_service.request_vectors(about, 4, ["a text"])
    assert (error.value.where, error.value.field) == (f"{url}/embeddings", "service.url")
    assert not is_worth_a_retry(None, None, Failed(data=error.value))
    assert KEY not in "".join(traceback.format_exception(error.value))


def test_a_service_out_of_reach_is_worth_another_try(service: Any, make: Callable[..., Path], tmp_path: Path) -> None:
    stand_in.write_entry(tmp_path / "catalog", "http://127.0.0.1:9/v1")
    with pytest.raises(ConnectionLost, match="ConnectError") as error:
        make()
    assert is_worth_a_retry(None, None, Failed(data=error.value))


def test_a_used_up_account_is_no_matter_of_waiting(service: Any, make: Callable[..., Path]) -> None:
    content = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    service.next = [lambda _: (429, {}, content)]
    with pytest.raises(UserError, match="You exceeded your quota") as error:
        make()
    assert error.value.field == "quota"
    assert not is_worth_a_retry(None, None, Failed(data=error.value))


def good(request: dict[str, Any], dimensions: int = 4) -> list[dict[str, Any]]:
    texts = enumerate(request["input"])
    return [{"index": place, "embedding": stand_in.vector(text, dimensions)} for place, text in texts]


def with_last(*numbers: object) -> Callable[[dict[str, Any]], Any]:
    return lambda request: {"data": [*good(request)[:-1], {"index": 2, "embedding": list(numbers)}]}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (lambda request: {"data": good(request)[:-1]}, "not one vector for each of the 3 texts"),
        (lambda request: {"data": good(request) + good(request)[:1]}, "not one vector for each"),
        (lambda request: {"data": [*good(request)[:2], good(request)[1]]}, "not one vector for each"),
        (lambda request: {"data": [good(request)[0] | {"index": place} for place in (1, 2, 3)]}, "not one vector"),
        (lambda request: {"data": [row["embedding"] for row in good(request)]}, "not one vector for each"),
        (lambda _: {"data": None}, "not one vector for each"),
        (lambda _: ["data"], "not one vector for each"),
        (lambda _: b"<html>welcome</html>", "not one vector for each"),
        (with_last("AAAA"), "not one vector for each"),
        (with_last(0.1, [0.2], 0.3, 0.4), "not one vector for each"),
        (with_last(0.1, 10**400, 0.3, 0.4), "not one vector for each"),
        (with_last(0.1, float("nan"), 0.3, 0.4), "not finite"),
        (with_last(0.1, None, 0.3, 0.4), "not finite"),
        (with_last(0.1, float("inf"), 0.3, 0.4), "not finite"),
        (with_last(0, 0, 0, 0), "nothing but zeros"),
        (with_last(0.1, 0.2, 0.3), r"shape \(3,\) instead of 4 numbers"),
        (with_last([0.1], [0.2], [0.3], [0.4]), r"shape \(4, 1\) instead of 4 numbers"),
        (with_last(), r"shape \(0,\) instead of 4 numbers"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_failure_and_never_a_vector(
    service: Any, make: Callable[..., Path], data: Path, content: Callable[[dict[str, Any]], Any], found: str
) -> None:
    service.next = [lambda request: (200, {}, content(request))]
    with pytest.raises(UserError, match=found) as error:
        make()
    assert error.value.field == "answer"
    assert not is_worth_a_retry(None, None, Failed(data=error.value))
    assert len(service.asked) == 1
    assert not kept(data)
    assert not list(data.glob("store/embedding/*"))


def test_a_redirection_is_not_followed_with_the_key(service: Any, make: Callable[..., Path]) -> None:
    service.next = [lambda _: (307, {"Location": f"{service.url}/embeddings"}, b"")]
    with pytest.raises(UserError, match="HTTP 307"):
        make()
    assert len(service.asked) == 1


# What is kept


def kept(data: Path) -> list[Path]:
    return sorted(data.glob("vectors/??/*"))


def flipped(content: bytes, place: int) -> bytes:
    """Another number, and a good one: the bit is the lowest of a byte."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def checked(numbers: bytes) -> bytes:
    return sha256(numbers).digest() + numbers


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"no array",
        lambda _: b"PK\x03\x04",
        lambda content: content[:-3],
        lambda content: content[:-4],
        lambda content: content + b"\0\0\0\0",
        lambda content: flipped(content, 0),
        lambda content: flipped(content, 32),
        lambda content: flipped(content, 47),
        lambda content: content[:32] + np.frombuffer(content[32:], np.float32).astype(np.float64).tobytes(),
        lambda content: checked(content[32:-4]),
        lambda content: checked(content[32:-3]),
        lambda content: checked(np.array([1, np.nan, 1, 1], np.float32).tobytes()),
    ],
)
def test_a_damaged_vector_is_asked_for_again(
    service: Any,
    make: Callable[..., Path],
    data: Path,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = make()
    assert len(kept(data)) == 7
    path = kept(data)[0]
    path.write_bytes(damage(path.read_bytes()))
    service.asked.clear()
    again = make(backwards=True)
    assert len(service.texts) == 1
    assert f"{path} is damaged" in caplog.text
    assert (again / "embedding.parquet").read_bytes() == (first / "embedding.parquet").read_bytes()


def test_each_kept_vector_is_read_once(
    service: Any, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    read: list[str] = []

    def counted(name: str, dimensions: int | None) -> Vector | None:
        read.append(name)
        return read_vector(name, dimensions)

    monkeypatch.setattr(embed_texts, "read_vector", counted)
    make(TEXTS | {"NEW": "What the new gene does."})
    # The one that is asked for: before, and after.
    assert (len(read), len(set(read))) == (9, 8)


def test_vectors_that_went_missing_are_said(
    service: Any, make: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = embed_texts.ask_for_vectors

    def losing(*of_batch: Any) -> None:
        shutil.rmtree(data / "vectors", ignore_errors=True)
        ask(*of_batch)

    monkeypatch.setattr(embed_texts, "ask_for_vectors", losing)
    with pytest.raises(UserError, match="6 that were answered are gone") as error:
        make()
    assert (error.value.where, error.value.field) == (str(data / "vectors"), "vectors")
    assert not list(data.glob("store/embedding/*"))
    monkeypatch.setattr(embed_texts, "ask_for_vectors", ask)
    service.asked.clear()
    make()
    assert len(service.texts) == 6


# Killed at the n-th vector that is to be put under its name, 0: at none.
RUN = """
import os, signal, sys
from pathlib import Path
from blocks.services import text_service
from tasks import embed, embed_texts, inputs, sources
text_service.read_secret = embed_texts.read_secret = lambda name: sys.argv[2]
embed.embed, embed_texts.ask_for_vectors = embed.embed.fn, embed_texts.ask_for_vectors.fn
fetch = sources.fetch_pretrained.fn
embed_texts.TEXTS_AT_ONCE = 3
replace, replaced = Path.replace, []
def dying(self, target):
    if self.parent.name.startswith("vectors."):
        replaced.append(self)
        if len(replaced) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = dying
from blocks.config.catalog import open_catalog
spec = open_catalog().embedding("mine")
needed = {one.name: fetch(one, Path(sys.argv[1])) for one in inputs.list_embedding_inputs(spec)}
print("RESULT", embed.make_shared_embedding(spec, needed))
"""


def test_killed_while_it_asks_it_goes_on_with_the_texts_that_are_missing(
    service: Any, make: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    genes = stand_in.write_genes(tmp_path / "genes", TEXTS)
    service.stalls_at = 2
    with subprocess.Popen([sys.executable, "-c", RUN, str(genes), KEY, "0"], cwd=ROOT) as running:
        deadline = time.monotonic() + 120
        while len(service.asked) < 2:
            assert running.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline, "nothing was asked"
            time.sleep(0.1)
        running.kill()
    texts = sorted(set(TEXTS.values()))
    assert service.texts == texts[:6]
    assert not list(data.glob("store/embedding/*"))
    service.asked.clear()
    service.stalls_at = None
    folder = make()
    assert service.texts == texts[3:]
    (data / "vectors").rename(tmp_path / "away")
    undisturbed = make(backwards=True)
    assert (folder / "embedding.parquet").read_bytes() == (undisturbed / "embedding.parquet").read_bytes()


def test_killed_while_it_keeps_vectors_it_leaves_whole_ones_and_nothing_else_for_long(
    service: Any, make: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    genes = stand_in.write_genes(tmp_path / "genes", TEXTS)
    command = [sys.executable, "-c", RUN, str(genes), KEY, "5"]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=120).returncode == -signal.SIGKILL
    assert len(kept(data)) == 4
    # The folder of the one that is not whole yet, and its lock.
    assert len(list(data.glob("vectors/vectors.*"))) == 2
    service.asked.clear()
    folder = make()
    assert service.texts == sorted(set(TEXTS.values()))[4:]
    assert len(kept(data)) == 7
    assert not list(data.glob("vectors/vectors.*"))
    (data / "vectors").rename(tmp_path / "away")
    undisturbed = make(backwards=True)
    assert (folder / "embedding.parquet").read_bytes() == (undisturbed / "embedding.parquet").read_bytes()


# The entry


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"service": None}, "`kind: text` needs `service`"),
        ({"pretrained": None}, "`kind: text` needs `pretrained`"),
        ({"settings": {"a": 1}}, "`kind: text` has no `settings`"),
        ({"kind": "graph", "pretrained": None}, "`kind: graph` needs `source`"),
        ({"pretrained": "scgpt_human"}, "gene_summary.gz and Homo_sapiens.gene_info.gz"),
    ],
)
def test_an_entry_that_cannot_be_made_is_refused(
    service: Any, tmp_path: Path, change: dict[str, Any], remedy: str
) -> None:
    stand_in.write_entry(tmp_path / "catalog", service.url, **change)
    with pytest.raises(UserError) as error:
        open_catalog().embedding("mine")
    assert remedy in error.value.remedy


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/v1",
        "http://localhost.example.org/v1",
        "http://127.0.0.1@example.org/v1",
        "https://me:s3cr3t@example.org/v1",
        "ftp://example.org",
    ],
)
def test_a_key_goes_nowhere_in_the_clear_but_to_this_machine(service: Any, tmp_path: Path, url: str) -> None:
    stand_in.write_entry(tmp_path / "catalog", url)
    with pytest.raises(UserError) as error:
        open_catalog().embedding("mine")
    assert error.value.field == "service.url"
    assert "s3cr3t" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("url", ["https://example.org", "http://localhost:8000/v1", "http://127.0.0.1/v1"])
def test_addresses_of_services(service: Any, tmp_path: Path, url: str) -> None:
    stand_in.write_entry(tmp_path / "catalog", url)
    known = open_catalog().embedding("mine").service
    assert known is not None
    assert known.url == url
