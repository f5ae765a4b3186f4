"""A container's log, line by line while it grows, each line once however often the connection breaks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from blocks.engines.kubernetes.api import Api, RequestFailed
from blocks.engines.lines import LONGEST_LINE, split_lines

if TYPE_CHECKING:
    from urllib3 import HTTPResponse

PAUSE_S = 0.5
CHUNK = 2**16
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

    lines: gets what it wrote to stdout and stderr, which Kubernetes keeps as one stream, in order. Set `over` when the
    container has ended: the thread then reads to the end of the log and ends. `stop` ends it at once. problem: why the
    log cannot be read.
    """

    def __init__(self, api: Api, pod: str, container: str, lines: queue.SimpleQueue[str]) -> None:
        super().__init__(name=f"log of {pod}", daemon=True)
        self.over = threading.Event()
        self.problem: str | None = None
        self._api = api
        self._pod = pod
        self._container = container
        self._lines = lines
        self._stopped = threading.Event()
        self._answer: HTTPResponse | None = None
        # In the order in which they came.
        self._known: dict[_Piece, None] = {}
        self._last_came: float | None = None

    def stop(self) -> None:
        """End the thread, from whichever other one."""
        self._stopped.set()
        if self._answer is not None:
            # It may be closed already.
            with suppress(OSError, RuntimeError, ValueError):
                self._answer.shutdown()

    def run(self) -> None:
        """Read the log until it ends, and connect again where the connection breaks."""
        last_read = monotonic()
        while not self._stopped.is_set():
            # Checked first: what was written before the end is then in this reading.
            ends = over = self.over.is_set()
            try:
                self._read(over)
                last_read, self.problem = monotonic(), None
            except RequestFailed as error:
                self.problem = str(error)
                # Without a pod there will never be a log.
                ends = (over and error.status == 404) or monotonic() - last_read > self._api.patience_s
            if ends:
                return
            self._stopped.wait(PAUSE_S)

    def _read(self, over: bool) -> None:
        since = None if self._last_came is None else int(monotonic() - self._last_came) + OVERLAP_S
        with self._api.log(self._pod, self._container, since) as self._answer:
            if self._stopped.is_set():
                return
            for piece in _read_pieces(self._answer.stream(CHUNK), over):
                self._take(piece)

    def _take(self, piece: _Piece) -> None:
        self._last_came = monotonic()
        if piece in self._known:
            return
        self._known[piece] = None
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        for line in split_lines(piece.text, b"")[0]:
            self._lines.put(line)


def _read_pieces(chunks: Iterable[bytes], over: bool) -> Iterator[_Piece]:
    """Yield the lines of a log with timestamps.

    over: the container has ended, so that a last line without a newline is one; before, it is the beginning of one and
    comes with the next reading.
    """
    rest = b""
    before: _Piece | None = None
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield _parse_piece(line, before)
            before = None
        if len(rest) > LONGEST_LINE:
            before, rest = _parse_piece(rest, before), b""
            yield before
    if rest and over:
        yield _parse_piece(rest, before)


def _parse_piece(text: bytes, before: _Piece | None) -> _Piece:
    """Parse a line. before: the piece of it that came before, None where it begins one."""
    if before is not None:
        return _Piece(before.stamp, before.number + 1, text)
    stamp, _, text = text.partition(b" ")
    return _Piece(stamp, 0, text)
