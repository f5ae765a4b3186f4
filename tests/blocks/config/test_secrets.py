"""Secret blocks are read once and as text; what stands in the way is said; without an API nothing is asked."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from blocks.config import secrets
from core.errors import UserError


class StandIn:
    """An API that holds blocks: (name, type) -> data. status: what it answers; asked: the questions it got."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str, str], object] = {}
        self.status = 200
        self.asked: list[Any] = []


@pytest.fixture
def api() -> Iterator[StandIn]:
    holds = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            holds.asked.append((self.path, question))
            wanted = question["block_documents"]["name"]["any_"]
            answer = [
                {"name": name, "block_type_name": kind, "data": data}
                for (name, kind), data in holds.blocks.items()
                if name in wanted
            ]
            body = json.dumps(answer).encode()
            self.send_response(holds.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{running.server_port}/api"}):
            yield holds
        running.shutdown()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in secrets.MLFLOW:
        monkeypatch.delenv(name, raising=False)
    secrets._read.cache_clear()
    yield
    secrets._read.cache_clear()


def put(api: StandIn, **values: object) -> None:
    api.blocks |= {(name.replace("_", "-"), "Secret"): {"value": value} for name, value in values.items()}


def test_a_secret_is_asked_for_once(api: StandIn) -> None:
    put(api, calipert_one="s3cret")
    assert [secrets.read_secret("calipert-one") for _ in range(3)] == ["s3cret"] * 3
    assert [secrets.read_secret("calipert-two") for _ in range(3)] == [None] * 3
    assert len(api.asked) == 2
    path, question = api.asked[0]
    assert path == "/api/block_documents/filter"
    assert question["include_secrets"] is True


@pytest.mark.parametrize("value", ["123456", "1e5", "true", '{"a": 1}', "0042", "ünï"])
def test_the_text_stays_as_it_was_put_in(api: StandIn, value: str) -> None:
    put(api, calipert_one=value)
    assert secrets.read_secret("calipert-one") == value


@pytest.mark.parametrize("name", ["", "a_b", "Upper", "a/b", "a b", "ä", "a\n"])
def test_a_name_that_no_block_can_have_is_refused(api: StandIn, name: str) -> None:
    with pytest.raises(ValueError, match="no name of a block"):
        secrets.read_secret(name)
    assert not api.asked


def test_a_block_of_another_type_is_refused_unless_a_secret_has_the_name_too(api: StandIn) -> None:
    api.blocks["calipert-one", "AWS Credentials"] = {"value": "no"}
    with pytest.raises(UserError, match="type AWS Credentials") as error:
        secrets.read_secret("calipert-one")
    assert error.value.field == "calipert-one"
    put(api, calipert_one="yes")
    assert secrets.read_secret("calipert-one") == "yes"


@pytest.mark.parametrize("value", ["", 12, None, {"a": "planted"}])
def test_a_secret_that_is_no_text_is_refused_without_showing_it(api: StandIn, value: object) -> None:
    put(api, calipert_one=value)
    with pytest.raises(UserError, match="without text") as error:
        secrets.read_secret("calipert-one")
    assert "planted" not in str(error.value)


@pytest.mark.parametrize(
    ("credentials", "names"),
    [
        (secrets.read_s3_credentials, {"key": "calipert-s3-key", "secret": "calipert-s3-secret"}),
        (
            secrets.read_mlflow_credentials,
            {
                "MLFLOW_TRACKING_USERNAME": "calipert-mlflow-username",
                "MLFLOW_TRACKING_PASSWORD": "calipert-mlflow-password",
            },
        ),
    ],
)
def test_a_pair_is_there_whole_or_not_at_all(
    api: StandIn, credentials: Callable[[], dict[str, str]], names: dict[str, str]
) -> None:
    assert credentials() == {}
    first, second = names.values()
    for present, absent in ((first, second), (second, first)):
        secrets._read.cache_clear()
        api.blocks = {(present, "Secret"): {"value": "planted"}}
        with pytest.raises(UserError, match=f"{present} without it") as error:
            credentials()
        assert error.value.field == absent
        assert "planted" not in str(error.value)
    secrets._read.cache_clear()
    api.blocks = {(name, "Secret"): {"value": f"value of {name}"} for name in names.values()}
    api.asked.clear()
    assert credentials() == {name: f"value of {block}" for name, block in names.items()}
    assert len(api.asked) == 1


@pytest.mark.parametrize("name", list(secrets.MLFLOW))
def test_the_environment_comes_before_the_blocks_of_mlflow(
    api: StandIn, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    put(api, **{block.replace("-", "_"): "block" for block in secrets.MLFLOW.values()})
    monkeypatch.setenv(name, "environment")
    assert secrets.read_mlflow_credentials() == {}
    assert not api.asked


def test_another_server_is_asked_anew(api: StandIn) -> None:
    put(api, calipert_one="first")
    assert secrets.read_secret("calipert-one") == "first"
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), pytest.raises(UserError, match="no answer"):
        secrets.read_secret("calipert-one")


def test_no_answer_is_not_remembered(api: StandIn) -> None:
    put(api, calipert_one="value")
    api.status = 500
    with pytest.raises(UserError, match="HTTP 500"):
        secrets.read_secret("calipert-one")
    api.status = 200
    assert secrets.read_secret("calipert-one") == "value"


def test_a_refusal_names_the_setting(api: StandIn) -> None:
    api.status = 401
    with pytest.raises(UserError, match="HTTP 401") as error:
        secrets.read_secret("calipert-one")
    assert "PREFECT_API_AUTH_STRING" in error.value.remedy


def test_a_password_in_the_address_of_the_api_is_refused_and_not_shown() -> None:
    with (
        temporary_settings({PREFECT_API_URL: "http://me:planted@127.0.0.1:9/api"}),
        pytest.raises(UserError, match="PREFECT_API_URL") as error,
    ):
        secrets.read_secret("calipert-one")
    assert "planted" not in str(error.value)


def test_without_an_address_nothing_is_asked_nor_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("a client was made")

    monkeypatch.setattr("prefect.client.orchestration.get_client", asked)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert secrets.read_secret("calipert-one") is None
        assert secrets.read_s3_credentials() == {}
        assert secrets.read_mlflow_credentials() == {}


def test_importing_it_is_cheap() -> None:
    code = "import sys, blocks.config.secrets; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
