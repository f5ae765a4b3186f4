"""What a container prints is read while the stage looks after it. A pair of sockets stands for the engine."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from blocks.engines.docker import logs
from tests.helpers.waiting import wait_for

FRAME = struct.pack(">BxxxL", 1, 6) + b"hello\n"


class Connection:
    """The near end of a connection over TLS: it takes all that has come, and hands it out in small pieces.

    Who waits for its file descriptor thus waits although there is more to read.
    """

    def __init__(self, own: socket.socket) -> None:
        self.own = own
        self.held = b""
        self.closed = threading.Event()
        self._response = SimpleNamespace(close=self.closed.set)

    def fileno(self) -> int:
        """Return what to wait for."""
        return self.own.fileno()

    def recv(self, most: int) -> bytes:
        """Return at most so many bytes."""
        self.held = self.held or self.own.recv(2**16)
        piece, self.held = self.held[:most], self.held[most:]
        return piece


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Connection, socket.socket]]:
    """The near end and the engine's, which is closed after some seconds: what waits for it fails and does not hang."""
    monkeypatch.setattr(logs, "WAIT_S", 0.01)
    own, engine = socket.socketpair()
    hang_up = threading.Timer(20, engine.shutdown, [socket.SHUT_RDWR])
    hang_up.start()
    with own, engine:
        yield Connection(own), engine
        hang_up.cancel()


def container(connection: Connection, start: Any) -> Any:
    return SimpleNamespace(attach_socket=lambda params: connection, start=start, name="toy")


def test_the_stage_is_looked_after_while_a_read_waits(ends: tuple[Connection, socket.socket]) -> None:
    connection, engine = ends
    printed = logs.start(container(connection, lambda: engine.sendall(FRAME)))
    assert [next(printed) for _ in range(5)] == [(False, b"")] * 5
    engine.shutdown(socket.SHUT_RDWR)
    assert [chunk for chunk in printed if chunk[1]] == [(True, b"hello\n")]
    assert connection.closed.wait(10)


def test_the_rest_is_read_and_dropped_once_the_stage_has_left(ends: tuple[Connection, socket.socket]) -> None:
    connection, engine = ends

    def send_twice() -> None:
        # The first frame is held until the second comes.
        engine.sendall(FRAME)
        engine.sendall(FRAME)

    printed = logs.start(container(connection, send_twice))
    next(printed)
    printed.close()
    engine.settimeout(10)
    engine.sendall(FRAME * 100_000)
    engine.shutdown(socket.SHUT_RDWR)
    assert connection.closed.wait(10)
    assert connection.held == b""


def test_a_container_that_does_not_start_leaves_no_connection(ends: tuple[Connection, socket.socket]) -> None:
    def refuse() -> None:
        raise OSError("no such image")

    threads = threading.active_count()
    with pytest.raises(OSError, match="no such image"):
        next(logs.start(container(ends[0], refuse)))
    assert ends[0].closed.is_set()
    assert wait_for(lambda: threading.active_count() <= threads)
