"""A server of this machine that is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import httpx
import pytest

from blocks.services import loopback

URL = "http://127.0.0.1:4200/api/automations/filter"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Makes a server answer with these codes, one after the other, and with what was asked."""
    monkeypatch.setattr(loopback, "BUSY_SECONDS", 1.0)

    def start(codes: list[int]) -> None:
        def answer(request: httpx.Request) -> httpx.Response:
            assert str(request.url) == URL
            return httpx.Response(codes.pop(0), content=request.content)

        def open_client(url: str, **options: Any) -> httpx.Client:
            return httpx.Client(transport=httpx.MockTransport(answer), **options)

        monkeypatch.setattr(loopback, "open_client", open_client)

    return start


def test_a_busy_server_is_asked_again(server: Callable[[list[int]], None]) -> None:
    codes = [503, 503, 200]
    server(codes)
    assert json.loads(loopback.ask(URL, {"name": "a"})) == {"name": "a"}
    assert codes == []


@pytest.mark.parametrize("codes", [[503] * 100, [404]])
def test_what_stays_busy_or_fails_is_an_error(server: Callable[[list[int]], None], codes: list[int]) -> None:
    last, asked = codes[-1], len(codes)
    server(codes)
    with pytest.raises(httpx.HTTPStatusError) as error:
        loopback.ask(URL)
    assert error.value.response.status_code == last
    assert asked - len(codes) > (1 if last == 503 else 0)


@pytest.mark.parametrize(("body", "left"), [({"name": "a"}, [200]), (None, [])])
def test_only_what_changes_nothing_is_asked_again_after_an_error(
    server: Callable[[list[int]], None], body: object, left: list[int]
) -> None:
    codes = [500, 200]
    server(codes)
    with nullcontext() if body is None else pytest.raises(httpx.HTTPStatusError):
        loopback.ask(URL, body)
    assert codes == left


def test_whether_it_answers_is_said_at_once(server: Callable[[list[int]], None]) -> None:
    server([503, 200])
    assert not loopback.is_answering(URL)
    assert loopback.is_answering(URL)
