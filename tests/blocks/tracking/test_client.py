"""Requests to MLflow: what is repeated, for how long, and what a refusal says. Against stand-ins, without MLflow."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from blocks.tracking import client as module
from blocks.tracking.client import Refused, Server, ServerLost, load_mlflow
from blocks.tracking.running import find_running_runs
from blocks.tracking.runs import fit_name
from core.errors import UserError

Answer = tuple[int, object]

# By the URL of a stand-in: the headers of the requests that came, and their paths.
HEADERS: dict[str, list[dict[str, str]]] = defaultdict(list)
LOCKED = "(sqlite3.OperationalError) database is locked\n[SQL: SELECT runs.run_uuid]"
RUN = {
    "info": {
        "run_id": "r1",
        "run_name": "ridge",
        "experiment_id": "1",
        "status": "RUNNING",
        "start_time": 1000,
        "artifact_uri": "mlflow-artifacts:/1/r1/artifacts",
    },
    "data": {"metrics": [{"key": "loss", "value": "NaN", "timestamp": 5, "step": 1}]},
}


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def standing_in(answer: Callable[[str, Any], Answer], port: int = 0) -> Iterator[str]:
    """The URL of a server that answers so. answer: takes the path and the JSON or bytes that came."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            HEADERS[f"http://127.0.0.1:{server.server_port}"].append({**self.headers, "Path": path})
            is_json = self.headers.get("Content-Type") == "application/json"
            code, told = (200, "") if path == "/health" else answer(path, json.loads(raw) if is_json else raw)
            text = (told if isinstance(told, str) else json.dumps(told)).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_answered", set())
    monkeypatch.setattr(module, "FIRST_PATIENCE", 1.0)


def test_a_locked_database_is_asked_again_until_it_is_free() -> None:
    answers = iter([(500, {"error_code": "INTERNAL_ERROR", "message": LOCKED})] * 3)
    with standing_in(lambda path, sent: next(answers, (200, {"run": RUN}))) as uri:
        run = Server(uri).get_run("r1")
    assert (run.info.run_id, run.info.run_name, run.info.end_time) == ("r1", "ridge", None)
    assert run.data.metrics["loss"] != run.data.metrics["loss"]
    assert next(answers, None) is None


def test_a_server_that_restarts_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    written: list[Any] = []

    def answer(path: str, sent: Any) -> Answer:
        written.append(sent)
        return 200, {}

    with standing_in(answer) as uri:
        Server(uri).log("r1", tags={"before": "yes"})
    port = int(uri.rpartition(":")[2])

    def come_back() -> None:
        time.sleep(5)
        with standing_in(answer, port):
            done.wait(30)

    done = threading.Event()
    restart = threading.Thread(target=come_back)
    restart.start()
    try:
        Server(uri).log("r1", tags={"after": "yes"})
    finally:
        done.set()
        restart.join()
    assert [sent["tags"][0]["key"] for sent in written] == ["before", "after"]
    assert [record.levelname for record in caplog.records if "waiting for" in record.message] == ["WARNING"]


@pytest.mark.parametrize(("code", "told"), [(503, LOCKED), (500, LOCKED)])
def test_one_that_stays_locked_is_one_clear_error(code: int, told: str) -> None:
    with (
        standing_in(lambda path, sent: (code, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": told})) as uri,
        pytest.raises(ServerLost, match=f"too many {code} error responses") as raised,
    ):
        Server(uri, patience=0.5).get_run("r1")
    assert raised.value.where == uri
    assert "SELECT" not in raised.value.found
    assert "where its database is locked, another program writes to it" in raised.value.remedy


def test_one_that_was_lost_and_stays_away_is_one_clear_error() -> None:
    with standing_in(lambda path, sent: (200, {})) as uri:
        Server(uri).log("r1", tags={"a": "b"})
    with pytest.raises(UserError, match="no answer") as raised:
        Server(uri, patience=0.5).log("r1", tags={"a": "b"})
    assert raised.value.where == uri
    assert "start the MLflow server" in raised.value.remedy
    assert "refused" in raised.value.found


def test_one_that_never_was_there_is_given_up_soon() -> None:
    uri = f"http://127.0.0.1:{find_free_port()}"
    with pytest.raises(UserError) as raised:
        Server(uri).get_run("r1")
    assert "refused" in raised.value.found
    assert "MLFLOW_TRACKING_URI" in raised.value.remedy


def test_one_that_does_not_answer_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match="ReadTimeout"):
            Server(f"http://127.0.0.1:{silent.getsockname()[1]}").get_run("r1")


def test_without_patience_a_request_has_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HASTE_SECONDS", 0.2)
    done = threading.Event()

    def answer(path: str, sent: Any) -> Answer:
        done.wait(10)
        return 200, {"run": RUN}

    with standing_in(answer) as uri:
        try:
            began = time.monotonic()
            with pytest.raises(ServerLost, match="TimeoutError"):
                Server(uri, patience=0).get_run("r1")
            assert time.monotonic() - began < 9
        finally:
            done.set()
        assert Server(uri, patience=1).get_run("r1").info.run_id == "r1"


def test_an_upload_has_minutes() -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

    load_mlflow()
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() >= 300


def test_other_certificates_are_taken_as_by_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH", raising=False)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(FileNotFoundError):
        find_running_runs("https://127.0.0.1:1", "calipert/")


def test_a_tag_that_is_no_flow_run_id_is_asked_of_nobody() -> None:
    known, asked = "0d2e8c52-6f5b-4cf0-9c35-0a7a3a1f2b11", []

    def answer(path: str, sent: Any) -> Answer:
        if "experiments" in path:
            return 200, {"experiments": [{"experiment_id": "1"}]}
        asked.append(sent["filter"])
        tags = ("flow-1", "x' OR 'a' = 'a", "", known)
        runs = [
            {"info": {"run_name": tag, "status": "RUNNING"}, "data": {"tags": [{"key": "flow_run_id", "value": tag}]}}
            for tag in tags
        ]
        return 200, {"runs": runs if "status" in sent["filter"] else runs[-1:]}

    with standing_in(answer) as uri:
        found = find_running_runs(uri, "calipert/")
    assert {flow_run: len(runs) for flow_run, runs in found.items()} == {"": 3, known: 1}
    assert asked == ["attributes.status = 'RUNNING'", f"tags.flow_run_id = '{known}'"]


@pytest.mark.parametrize(
    ("code", "told", "remedy"),
    [
        (401, "You are not authenticated.", "MLFLOW_TRACKING_USERNAME"),
        (403, "Invalid Host header - possible DNS rebinding attack detected", "--allowed-hosts"),
        (404, "<html>no such page</html>", "check that this is the URL of an MLflow server"),
        (200, "<html>another program</html>", "check that this is the URL of an MLflow server"),
    ],
)
def test_a_refusal_names_its_remedy(code: int, told: str, remedy: str) -> None:
    with standing_in(lambda path, sent: (code, told)) as uri, pytest.raises(UserError) as raised:
        Server(uri).get_run("r1")
    assert told in raised.value.found
    assert raised.value.where == uri
    assert remedy in raised.value.remedy


def test_other_errors_stay_what_they_are_and_are_not_repeated() -> None:
    asked = []

    def answer(path: str, sent: Any) -> Answer:
        asked.append(path)
        return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "Changing param values is not allowed."}

    with standing_in(answer) as uri, pytest.raises(Refused, match="Changing param values") as raised:
        Server(uri).log("r1", params={"a": "b"})
    assert raised.value.code == "INVALID_PARAMETER_VALUE"
    assert len(asked) == 1


def test_much_is_written_in_few_requests_and_the_tags_last() -> None:
    sizes = []

    def answer(path: str, sent: Any) -> Answer:
        sizes.append(tuple(len(sent.get(part, ())) for part in ("metrics", "params", "tags")))
        return 200, {}

    metrics = [load_mlflow().entities.Metric(f"m{i}", float(i), 1, 0) for i in range(1950)]
    with standing_in(answer) as uri:
        server = Server(uri)
        server.log("r1", metrics, {f"p{i}": "x" for i in range(120)}, {f"t{i}": "x" for i in range(105)})
        server.log("r1", metrics[:5], {"p": "x"}, {"t": "x"})
        server.log("r1")
    assert [sum(part) for part in zip(*sizes[:-1], strict=True)] == [1950, 120, 105]
    assert len(sizes) == 5 + 1
    assert sizes[-3:] == [(0, 0, 100), (0, 0, 5), (5, 1, 1)]
    assert all(sum(size) <= 1000 for size in sizes)


def test_a_file_is_sent_whole_at_each_attempt(tmp_path: Path) -> None:
    received = []

    def answer(path: str, sent: Any) -> Answer:
        if path.endswith("runs/get"):
            return 200, {"run": RUN}
        received.append((path, sent))
        return (503, "") if len(received) == 1 else (200, {})

    file = tmp_path / "a b.txt"
    file.write_bytes(b"x" * 300_000)
    with standing_in(answer) as uri:
        Server(uri).log_file("r1", file)
    place = "/api/2.0/mlflow-artifacts/artifacts/1/r1/artifacts/a%20b.txt"
    assert received == [(place, file.read_bytes())] * 2


@pytest.mark.parametrize(
    ("environment", "header"),
    [
        ({"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": "x"}, "Basic YWRhOng="),
        ({"MLFLOW_TRACKING_TOKEN": "abc"}, "Bearer abc"),
    ],
)
def test_credentials_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], header: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with standing_in(lambda path, sent: (200, {"run": RUN, "experiments": []})) as uri:
        standing = HEADERS[uri]
        Server(uri).get_run("r1")
        find_running_runs(uri, "calipert/")
    assert [headers["Authorization"] for headers in standing if headers["Path"] != "/health"] == [header] * 2


def test_names_that_mlflow_refuses_are_changed_and_stay_distinct() -> None:
    assert fit_name("val/loss-1.0 a:b") == "val/loss-1.0 a:b"
    changed = {fit_name(name) for name in ("loss (train)", "loss [train]", "a" * 300, "a" * 301)}
    assert len(changed) == 4
    assert all(len(name) <= 250 for name in changed)
    assert all(fit_name(name) == name for name in changed)
