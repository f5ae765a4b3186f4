"""What a container prints, while it prints it, and no faster than it is read."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

from docker.errors import DockerException
from docker.models.containers import Container
from requests.exceptions import RequestException

LOG = logging.getLogger("calipert.engines")

# Chunks that are kept for a busy reader, each of at most 32 KB. Then the engine waits, and then the model: nothing
# in between keeps what it prints.
KEPT_CHUNKS = 64
WAIT_S = 0.5


class Chunk(NamedTuple):
    """Bytes as they were printed, not cut at lines."""

    stdout: bool
    data: bytes


class LogReader(threading.Thread):
    """Reads what a container prints, in a thread, since a read cannot be interrupted.

    Create it before the container starts, so that nothing is missed. `chunks` ends with None when the container has
    ended, or when the connection broke. After `leave` it reads on and keeps nothing: the engine cannot remove a
    container while its output is not read.
    """

    def __init__(self, container: Container) -> None:
        super().__init__(name=f"log of {container.name}", daemon=True)
        self.chunks: queue.Queue[Chunk | None] = queue.Queue(KEPT_CHUNKS)
        self._left = threading.Event()
        self._stream: Iterator[tuple[bytes | None, bytes | None]] = container.attach(
            stdout=True, stderr=True, stream=True, logs=False, demux=True
        )

    def run(self) -> None:
        """Read until the container ends."""
        try:
            for out, err in self._stream:
                if out:
                    self._put(Chunk(True, out))
                if err:
                    self._put(Chunk(False, err))
        except (DockerException, RequestException, OSError, ValueError) as error:
            # Next the container's end is asked for, which shows what is wrong with the engine, too.
            LOG.debug("%s broke off: %s", self.name, error)
        finally:
            self._put(None)

    def leave(self) -> None:
        """Keep nothing of what comes from now on."""
        self._left.set()

    def _put(self, chunk: Chunk | None) -> None:
        while not self._left.is_set():
            try:
                self.chunks.put(chunk, timeout=WAIT_S)
            except queue.Full:
                continue
            return
