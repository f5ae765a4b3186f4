"""What a container prints, while it prints it, and no faster than it is read."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Generator
from contextlib import closing, suppress
from typing import Any

from docker.errors import DockerException
from docker.models.containers import Container
from docker.utils.socket import STDOUT, frames_iter_no_tty
from requests.exceptions import RequestException

from blocks.engines.base import WAIT_S

LOG = logging.getLogger("calipert.engines")

# Chunks that are kept for a busy reader, each of at most 32 KB.
KEPT_CHUNKS = 64


def start(container: Container) -> Generator[tuple[bool, bytes], None, None]:
    """Start a container, and yield (whether on stdout, bytes) as it prints them, no bytes after a moment without any.

    The end comes when the container has closed its streams, or when the connection broke. Only a few chunks are kept
    in between: then the engine waits for a busy reader, and then the model does. Close this generator in any case: the
    engine cannot remove a container while its output is not read.
    """
    socket = container.attach_socket(params={"stdout": 1, "stderr": 1, "stream": 1})
    try:
        container.start()
    except BaseException:
        socket._response.close()
        raise
    chunks: queue.Queue[tuple[bool, bytes] | None] = queue.Queue(KEPT_CHUNKS)
    left = threading.Event()
    # In a thread, since a read can be neither limited nor interrupted: it waits for the socket, although a TLS
    # connection may hold bytes that it has received before.
    reader = threading.Thread(target=_read, args=(socket, chunks, left), name=f"log of {container.name}", daemon=True)
    reader.start()
    try:
        while True:
            try:
                chunk = chunks.get(timeout=WAIT_S)
            except queue.Empty:
                yield False, b""
                continue
            if chunk is None:
                return
            yield chunk
    finally:
        left.set()


def _read(socket: Any, chunks: queue.Queue[tuple[bool, bytes] | None], left: threading.Event) -> None:
    """Put what comes into the queue, then None; once the stage has left, read on to the end and keep nothing."""

    def put(chunk: tuple[bool, bytes] | None) -> None:
        while not left.is_set():
            with suppress(queue.Full):
                chunks.put(chunk, timeout=WAIT_S)
                return

    # The answer that the socket belongs to: closing the socket alone leaves the connection open.
    with closing(socket._response):
        try:
            for stream, chunk in frames_iter_no_tty(socket):
                put((stream == STDOUT, chunk))
        except (DockerException, RequestException, OSError, ValueError) as error:
            # Next the container's end is asked for, which shows what is wrong with the engine, too.
            LOG.debug("the %s broke off: %s", threading.current_thread().name, error)
        finally:
            put(None)
