"""What a model prints: lines, and the events among them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

Event = Mapping[str, Any]

LONGEST_LINE = 2**20


def split_lines(rest: bytes, chunk: bytes) -> tuple[list[str], bytes]:
    """Return (whole lines, new rest) after one more chunk of a stream; an empty chunk is its end.

    A carriage return ends a line too: progress bars write many on one line. A line longer than LONGEST_LINE comes in
    pieces; an empty one is left out. The end of the stream ends the last line.
    """
    *lines, rest = re.split(rb"[\r\n]", rest + chunk)
    if not chunk or len(rest) > LONGEST_LINE:
        lines.append(rest)
        rest = b""
    return [line.decode("utf-8", errors="replace") for line in lines if line], rest


def read_event(line: str) -> Event:
    """Return an event of the contract as it is; anything else that a model prints, as a log event."""
    as_log: Event = {"event": "log", "message": line}
    try:
        event: Event = json.loads(line)
    except (ValueError, RecursionError):
        return as_log
    match event:
        case (
            {"event": "progress", "done": int(), "total": int(), "unit": str()}
            | {"event": "metric", "name": str(), "step": int(), "value": int() | float()}
            | {"event": "log", "message": str()}
        ):
            return event
    return as_log
