"""What a container prints, while it prints it, and no faster than it is read."""

from __future__ import annotations

import logging
import selectors
from collections.abc import Generator
from contextlib import closing

from docker.errors import DockerException
from docker.models.containers import Container
from docker.utils.socket import STDOUT, frames_iter_no_tty
from requests.exceptions import RequestException

from blocks.engines.base import WAIT_S

LOG = logging.getLogger("calipert.engines")


def start(container: Container) -> Generator[tuple[bool, bytes], None, None]:
    """Start a container, and yield (whether on stdout, bytes) as it prints them, no bytes after a moment without any.

    The end comes when the container has closed its streams, or when the connection broke. Nothing in between keeps
    what is printed: the engine waits for a busy reader, and then the model does. Close this generator in any case: the
    engine cannot remove a container while its output is not read.
    """
    socket = container.attach_socket(params={"stdout": 1, "stderr": 1, "stream": 1})
    # The answer that the socket belongs to: closing the socket alone leaves the connection open.
    with closing(socket._response), selectors.DefaultSelector() as selector:
        selector.register(socket, selectors.EVENT_READ)
        container.start()
        frames = frames_iter_no_tty(socket)
        try:
            while True:
                if not selector.select(WAIT_S):
                    yield False, b""
                    continue
                stream, chunk = next(frames, (None, b""))
                if stream is None:
                    return
                yield stream == STDOUT, chunk
        except (DockerException, RequestException, OSError, ValueError) as error:
            # Next the container's end is asked for, which shows what is wrong with the engine, too.
            LOG.debug("the log of %s broke off: %s", container.name, error)
