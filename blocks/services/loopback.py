"""Ports of this machine's own loopback, and what answers there."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from http import HTTPStatus
from http.client import HTTPException
from urllib.error import HTTPError

from blocks.config.child_environment import HOST

# Seconds between questions to a server that says it is busy: half a minute in all.
BUSY = (0.2, 0.5, 1, 2, 4, 8, 16)


def free_port(wanted: int) -> int:
    """`wanted` if it is free, else any free port."""
    if wanted and bindable(wanted):
        return wanted
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def bindable(port: int) -> bool:
    """Whether a server could listen on this port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def answers(url: str) -> bool:
    """Whether GET is answered well."""
    try:
        ask_once(url)
    except OSError:
        return False
    return True


def ask(url: str, body: object = None) -> bytes:
    """As `ask_once`, but a server that says it is busy (503: Prefect's, while something else writes to its database) is
    asked again.
    """
    for pause in BUSY:
        try:
            return ask_once(url, body)
        except HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                raise
        time.sleep(pause)
    return ask_once(url, body)


def ask_once(url: str, body: object = None) -> bytes:
    """The answer to GET, or to POST with a JSON body. Never through a proxy. Raises OSError if it is no good."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with opener.open(request, timeout=30) as answer:
            return bytes(answer.read())
    except HTTPException as error:
        raise ConnectionError(f"{url}: {error!r}") from error
