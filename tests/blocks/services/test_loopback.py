"""A server of this machine that is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError

import pytest

from blocks.services import loopback

Server = Callable[[list[int]], str]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Answers with these codes, one after the other, and a good one with what was asked; the address."""
    monkeypatch.setattr(loopback, "BUSY", (0.01, 0.01))
    servers: list[ThreadingHTTPServer] = []

    def start(codes: list[int]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(codes.pop(0))
                self.end_headers()
                self.wfile.write(asked)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/"

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


def test_a_busy_server_is_asked_again(server: Server) -> None:
    codes = [503, 503, 200]
    assert json.loads(loopback.ask(server(codes), {"name": "a"})) == {"name": "a"}
    assert codes == []


@pytest.mark.parametrize("codes", [[503, 503, 503], [500], [404]])
def test_what_stays_busy_or_fails_is_an_error(server: Server, codes: list[int]) -> None:
    last = codes[-1]
    with pytest.raises(HTTPError) as error:
        loopback.ask(server(codes))
    assert error.value.code == last
    assert codes == []


def test_whether_it_answers_is_said_at_once(server: Server) -> None:
    codes = [503, 200]
    url = server(codes)
    assert not loopback.answers(url)
    assert loopback.answers(url)
