"""The policy of all requests: which failures are tried again, after which pauses, for how long, and who is told."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from blocks import http
from blocks.http import is_transient, open_client, read_retry_after, retry


class Clock:
    """A clock that only pauses move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(http.time, "monotonic", clock.monotonic)
    return clock


def answer_with(*answers: tuple[int, dict[str, str]]) -> Callable[[], str]:
    """Work that asks a server with these answers, of which the last stays."""
    left = list(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        status, headers = left.pop(0) if len(left) > 1 else left[0]
        return httpx.Response(status, headers=headers, text="told")

    client = open_client("http://example.org", transport=httpx.MockTransport(answer))
    return lambda: client.get("/").raise_for_status().text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *((code, True) for code in (408, 425, 429, 500, 502, 503, 504, 529)),
        *((code, False) for code in (400, 401, 403, 404, 409, 422)),
        (httpx.ConnectError("refused"), True),
        (httpx.ReadTimeout("late"), True),
        (ConnectionResetError(), True),
        (httpx.TooManyRedirects("round"), False),
        (FileNotFoundError(), False),
        (ValueError(), False),
    ],
)
def test_what_may_pass(error: int | Exception, expected: bool) -> None:
    if isinstance(error, int):
        answer = httpx.Response(error, request=httpx.Request("GET", "http://example.org"))
        error = httpx.HTTPStatusError("", request=answer.request, response=answer)
    assert is_transient(error) == expected


def test_pauses_grow_to_a_fifteenth_of_the_time_and_end_with_it(clock: Clock) -> None:
    reported: list[BaseException] = []
    with pytest.raises(httpx.HTTPStatusError) as error:
        retry(answer_with((503, {})), 30.0, report=reported.append, sleep=clock.sleep)
    assert clock.pauses[:5] == [0.2, 0.4, 0.8, 1.6, 2.0]
    assert set(clock.pauses[4:]) == {2.0}
    assert 26 < clock.now < 30
    assert [str(one) for one in reported] == [str(error.value)]


def test_a_short_failure_is_not_reported(clock: Clock) -> None:
    reported: list[BaseException] = []
    work = answer_with((502, {}), (429, {}), (200, {}))
    assert retry(work, 30.0, report=reported.append, sleep=clock.sleep) == "told"
    assert clock.pauses == [0.2, 0.4]
    assert not reported


def test_as_long_as_the_server_asks(clock: Clock) -> None:
    assert retry(answer_with((429, {"Retry-After": "7"}), (200, {})), 30.0, sleep=clock.sleep) == "told"
    assert clock.pauses == [7.0]
    with pytest.raises(httpx.HTTPStatusError):
        retry(answer_with((429, {"Retry-After": "9999"})), 30.0, sleep=clock.sleep)
    assert clock.pauses == [7.0]


@pytest.mark.parametrize(("status", "seconds"), [(404, 30.0), (503, 0.0)])
def test_one_try_where_another_cannot_help_or_is_not_wanted(clock: Clock, status: int, seconds: float) -> None:
    with pytest.raises(httpx.HTTPStatusError):
        retry(answer_with((status, {}), (200, {})), seconds, sleep=clock.sleep)
    assert clock.pauses == []


def test_a_wait_can_be_ended() -> None:
    class Stopped(Exception):
        pass

    def stop(seconds: float) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        retry(answer_with((503, {})), 30.0, sleep=stop)


@pytest.mark.parametrize(("text", "seconds"), [("", 0), ("7.5", 7.5), ("-1", 0), ("soon", 0), ("nan", 0)])
def test_how_long_a_server_asks_to_wait(text: str, seconds: float) -> None:
    assert read_retry_after(httpx.Response(429, headers={"Retry-After": text})) == seconds


def test_a_date_to_wait_for() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 50 < read_retry_after(httpx.Response(429, headers={"Retry-After": later})) <= 60
    past = httpx.Response(429, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
    assert read_retry_after(past) == 0
