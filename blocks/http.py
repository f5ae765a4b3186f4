"""One policy for all requests over HTTP: which failures may pass, when to try again, and when to give up."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from core.errors import UserError

# Seconds between the tries of a Prefect task that fetches something over the internet.
TASK_RETRY_DELAYS = [2.0, 10.0, 30.0, 60.0, 60.0, 60.0]
_FIRST_PAUSE = 0.2  # seconds; each pause is twice the one before
_MOST_PAUSES = 15  # a pause takes at most this part of the whole time
_QUIET_SECONDS = 1.5  # shorter waits are not reported

T = TypeVar("T")


class ConnectionLost(UserError):
    """A server that is out of reach, busy, or broke off: another try may help.

    wait: seconds that the server asks to wait before it; 0 if it does not say.
    """

    wait: float = 0.0


def is_transient_status(status: int) -> bool:
    """Whether the next answer may be a better one: this one was about time, too many requests, or a server's error."""
    return status in (408, 425, 429) or status >= 500


def is_transient(error: BaseException) -> bool:
    """Whether a request that failed with this error is worth another try."""
    if isinstance(error, httpx.HTTPStatusError):
        return is_transient_status(error.response.status_code)
    return isinstance(error, httpx.TransportError | ConnectionError | TimeoutError)


def retry(
    work: Callable[[], T],
    seconds: float,
    *,
    transient: Callable[[BaseException], bool] = is_transient,
    report: Callable[[BaseException], None] = lambda error: None,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Return the result of some work, which is tried again while it fails with what may pass.

    seconds: after which the last error is raised; with 0 there is one try. The pauses grow from 0.2 s to a fifteenth of
    `seconds`, and are as long as a `Retry-After` of the answer asks for.
    report: called once with the error, when the work has not succeeded for more than a moment.
    sleep: waits between two tries; what it raises ends them.
    """
    began = time.monotonic()
    pause, reported = _FIRST_PAUSE, False
    while True:
        try:
            return work()
        except Exception as error:
            wait = min(pause, seconds / _MOST_PAUSES)
            if isinstance(error, httpx.HTTPStatusError):
                wait = max(wait, read_retry_after(error.response))
            passed = time.monotonic() - began + wait
            if not transient(error) or passed >= seconds:
                raise
            if not reported and passed > _QUIET_SECONDS:
                reported = True
                report(error)
        sleep(wait)
        pause *= 2


def read_retry_after(answer: httpx.Response) -> float:
    """Seconds that a server asks to wait before the next try; 0 if it does not say, or in no known form."""
    text = answer.headers.get("Retry-After", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def open_client(url: str = "", **options: Any) -> httpx.Client:
    """Open a client for the server at `url`; options as httpx.Client takes them.

    For plain http no certificates are read, which takes longer than ten requests.
    """
    return httpx.Client(base_url=url, **({"verify": False} if url.startswith("http:") else {}) | options)
