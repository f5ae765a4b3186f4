"""A container's log, line by line while it grows, each line once however often the connection breaks."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import NamedTuple

from urllib3.exceptions import HTTPError

from blocks.engines.kubernetes.api import PAUSE_S, Api, LogStream, RequestRefused
from blocks.engines.lines import LONGEST_LINE

# After a break the log is read again from a little before the last line that came, and what is known is left out.
OVERLAP_S = 10
REMEMBERED = 20_000


class _Piece(NamedTuple):
    """A line, or a piece of one that is longer than LONGEST_LINE.

    stamp: when the line was written (nanoseconds, as the API writes it); number: which piece of it. The three together
    identify it.
    """

    stamp: bytes
    number: int
    text: bytes


class Follower(threading.Thread):
    """Reads the log of a container that has started, in a thread, since a read cannot be interrupted.

    `lines` are what it wrote to stdout and stderr, which Kubernetes keeps as one stream, in order. Call `finish` when
    the container has ended: the thread then reads to the end of the log and ends. `stop` ends it at once.
    """

    def __init__(self, api: Api, pod: str, container: str) -> None:
        super().__init__(name=f"log of {pod}", daemon=True)
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.problem: str | None = None
        self._api = api
        self._pod = pod
        self._container = container
        self._over = threading.Event()
        self._stopped = threading.Event()
        self._stream: LogStream | None = None
        self._known: set[_Piece] = set()
        self._order: deque[_Piece] = deque()
        self._last_came: float | None = None

    def finish(self) -> None:
        """Read on to the end of the log, which the container ended, and end the thread."""
        self._over.set()

    def stop(self) -> None:
        """End the thread at once."""
        self._stopped.set()
        stream = self._stream
        if stream is not None:
            stream.close()

    def run(self) -> None:
        """Read the log until it ends, and connect again where the connection breaks."""
        last_read = monotonic()
        while not self._stopped.is_set():
            # Checked first: what was written before the end is then in this reading.
            over = self._over.is_set()
            try:
                self._read(over)
                last_read = monotonic()
            except (HTTPError, RequestRefused) as error:
                self.problem = str(error)
                # Without a pod there will never be a log.
                gone = over and isinstance(error, RequestRefused) and error.status == 404
                if gone or monotonic() - last_read > self._api.patience_s:
                    return
            else:
                self.problem = None
                if over:
                    return
            self._stopped.wait(PAUSE_S)

    def _read(self, over: bool) -> None:
        since = None if self._last_came is None else int(monotonic() - self._last_came) + OVERLAP_S
        with self._api.log(self._pod, self._container, since) as stream:
            self._stream = stream
            if self._stopped.is_set():
                return
            for piece in _read_pieces(stream.chunks(), over):
                self._take(piece)

    def _take(self, piece: _Piece) -> None:
        self._last_came = monotonic()
        if piece in self._known:
            return
        self._known.add(piece)
        self._order.append(piece)
        if len(self._order) > REMEMBERED:
            self._known.discard(self._order.popleft())
        # A progress bar writes many lines as one.
        for line in piece.text.split(b"\r"):
            if line:
                self.lines.put(line.decode("utf-8", errors="replace"))


def _read_pieces(chunks: Iterable[bytes], over: bool) -> Iterator[_Piece]:
    """Yield the lines of a log with timestamps.

    over: the container has ended, so that a last line without a newline is one; before, it is the beginning of one and
    comes with the next reading.
    """
    rest = b""
    stamp: bytes | None = None
    number = 0
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            piece = _parse_piece(line, stamp, number)
            stamp, number = None, 0
            yield piece
        if len(rest) > LONGEST_LINE:
            piece = _parse_piece(rest, stamp, number)
            stamp, number, rest = piece.stamp, number + 1, b""
            yield piece
    if rest and over:
        yield _parse_piece(rest, stamp, number)


def _parse_piece(line: bytes, stamp: bytes | None, number: int) -> _Piece:
    """Parse a line. stamp: of the line that this continues, None where it begins one."""
    if stamp is not None:
        return _Piece(stamp, number, line)
    stamp, _, text = line.partition(b" ")
    return _Piece(stamp, number, text)
