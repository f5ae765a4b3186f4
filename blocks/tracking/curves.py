"""The curve of a training in a run of MLflow: while it grows, and whole once the training has ended."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from blocks.tracking.api import Refused, Run, Server
from blocks.tracking.runs import Points, Standing, allowed, whole_curves, write
from core.errors import UserError

# Between two writings of a curve, and after one that failed, in seconds.
LIVE_SECONDS = 5.0
LOST_SECONDS = 30.0

# The hash of the training.jsonl that a fold's run shows.
_CURVE = "calipert.curve"

_log = logging.getLogger("calipert.tracking")


def live_curve(server: Server, run_id: str) -> Callable[[Mapping[str, object]], None]:
    """A function that takes the events of a training while it runs and writes its metrics, some at a time.

    Events other than {"event": "metric", "name", "step", "value"} are ignored. When the server is lost, which a
    warning says once, training goes on, and what was not written is tried again every half a minute, and by
    `log_curve`, which also writes the last seconds.
    """
    run: Run | None = None
    waiting: Points = {}
    standing: Standing = {}
    known: set[str] = set()
    due = time.monotonic() + LIVE_SECONDS
    told = False

    def take(event: Mapping[str, object]) -> None:
        nonlocal run, due, told
        if event.get("event") != "metric":
            return
        name, step, value = _point(event, "training event")
        waiting[name, step] = value
        if time.monotonic() < due:
            return
        try:
            if run is None:
                run = server.run(run_id)
                if run.status != "RUNNING":
                    server.set_status(run_id, "RUNNING")
            new = {name for name, _ in waiting} - known
            standing.update(whole_curves(server, run, new))
            known.update(new)
            write(server, run, waiting, {_CURVE: "growing"}, standing)
        except (UserError, Refused) as error:
            due = time.monotonic() + LOST_SECONDS
            if not told:
                _log.warning("Training goes on while its curve in MLflow does not: %s", error)
            told = True
        else:
            waiting.clear()
            due = time.monotonic() + LIVE_SECONDS

    return take


def log_curve(server: Server, run_id: str, training: Path) -> None:
    """Make a fold's run show exactly the curve of its training.jsonl (JSON lines; those that are no metric are
    skipped). Points that were already written live are not repeated; of two values at one step the last counts.

    NaN and infinite values are left out, and counted per metric in the tag `not_finite`.
    """
    text = training.read_text(encoding="utf-8")
    points: Points = {}
    for number, line in enumerate(text.splitlines(), start=1):
        event = json.loads(line) if line.strip() else {}
        if event.get("event") == "metric":
            name, step, value = _point(event, f"{training}, line {number}")
            points[name, step] = value
    identity = sha256(text.encode()).hexdigest()
    run = server.run(run_id)
    if run.tags.get(_CURVE) == identity:
        return
    bad = Counter(name for (name, _), value in points.items() if not math.isfinite(value))
    told = ", ".join(f"{name} ({count})" for name, count in sorted(bad.items()))
    write(server, run, points, {"not_finite": told or "none", _CURVE: identity})


def _point(event: Mapping[str, object], where: str) -> tuple[str, int, float]:
    """Name, step and value of a metric event; value may be NaN or infinite."""
    try:
        return allowed(str(event["name"])), int(str(event["step"])), float(str(event["value"]))
    except (KeyError, ValueError) as error:
        raise UserError(
            where,
            "metric event",
            json.dumps(dict(event), default=str),
            f"Write name, step (a whole number) and value (a number): {error!r}.",
        ) from error
