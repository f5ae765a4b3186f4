"""Ports of this machine's own loopback, and what answers there."""

from __future__ import annotations

import socket
from contextlib import suppress

import httpx

from blocks.config.child_environment import HOST
from blocks.http import is_transient, open_client, retry

# Seconds for which a busy server is asked again, and until an answer counts as lost.
BUSY_SECONDS = 30.0
TIMEOUT = 30.0


def find_free_port(wanted: int) -> int:
    """`wanted` if it is free, else any free port."""
    for port in (wanted, 0):
        with suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    raise OSError(f"no free port on {HOST}")


def is_free_port(port: int) -> bool:
    """Whether a server could listen on this port."""
    return find_free_port(port) == port


def is_answering(url: str) -> bool:
    """Whether GET is answered with success."""
    try:
        ask_once(url)
    except httpx.HTTPError:
        return False
    return True


def ask(url: str, body: object = None) -> bytes:
    """Return the answer as `ask_once` does; a server that is busy (Prefect writes to its database) is asked again.

    What has a body is sent again only after a 503: after any other failure it may have been done.
    """
    return retry(lambda: ask_once(url, body), BUSY_SECONDS, transient=is_transient if body is None else _is_busy)


def ask_once(url: str, body: object = None) -> bytes:
    """Return the answer to GET, or to POST with a JSON body; never through a proxy.

    Raises httpx.HTTPError without success.
    """
    method = "GET" if body is None else "POST"
    with open_client(url, trust_env=False, timeout=TIMEOUT) as client:
        return client.request(method, url, json=body).raise_for_status().content


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 503
