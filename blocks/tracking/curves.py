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
from typing import TYPE_CHECKING

from blocks.tracking.client import Server
from blocks.tracking.runs import Points, Shown, fit_name, read_points, write_points
from core.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities import Run

# Seconds between two writings of a curve, and after one that failed.
LIVE_SECONDS = 5.0
LOST_SECONDS = 30.0

# The tag that holds the hash of the training.jsonl that a fold's run shows.
_CURVE = "calipert.curve"

_log = logging.getLogger("calipert.tracking")


def follow_curve(server: Server, run_id: str) -> Callable[[Mapping[str, object]], None]:
    """Return a function that takes the events of a training while it runs and writes its metrics, some at a time.

    Events other than {"event": "metric", "name", "step", "value"} are ignored. When the server is lost, which a
    warning says once, training goes on, and what was not written is tried again every half a minute, and by
    `log_curve`, which also writes the last seconds.
    """
    run: Run | None = None
    waiting: Points = {}
    shown: Shown = {}
    due = time.monotonic() + LIVE_SECONDS
    warned = False

    def take(event: Mapping[str, object]) -> None:
        nonlocal run, due, warned
        if event.get("event") != "metric":
            return
        name, step, value = _read_point(event, "training event")
        waiting[name, step] = value
        if time.monotonic() < due:
            return
        try:
            if run is None:
                run = server.get_run(run_id)
                if run.info.status != "RUNNING":
                    server.ask(lambda client: client.update_run(run_id, "RUNNING"))
            shown.update(read_points(server, run, {name for name, _ in waiting} - {name for name, _ in shown}))
            write_points(server, run, waiting, {_CURVE: "growing"}, shown)
        except UserError as error:
            due = time.monotonic() + LOST_SECONDS
            if not warned:
                _log.warning("Training goes on while its curve in MLflow does not: %s", error)
            warned = True
        else:
            waiting.clear()
            due = time.monotonic() + LIVE_SECONDS

    return take


def log_curve(server: Server, run_id: str, training: Path) -> None:
    """Make a fold's run show exactly the curve of its training.jsonl.

    Points that were already written are not repeated; of two values at one step the last counts. NaN and infinite
    values are left out, and counted per metric in the tag `not_finite`. Raises UserError for a line of the file that
    is a metric without name, step or value; lines that are no metric are skipped.
    """
    text = training.read_text(encoding="utf-8")
    points: Points = {}
    for number, line in enumerate(text.splitlines(), start=1):
        event = json.loads(line) if line.strip() else {}
        if event.get("event") == "metric":
            name, step, value = _read_point(event, f"{training}, line {number}")
            points[name, step] = value
    identity = sha256(text.encode()).hexdigest()
    run = server.get_run(run_id)
    if run.data.tags.get(_CURVE) == identity:
        return
    bad = Counter(name for (name, _), value in points.items() if not math.isfinite(value))
    counts = ", ".join(f"{name} ({count})" for name, count in sorted(bad.items()))
    write_points(server, run, points, {"not_finite": counts or "none", _CURVE: identity})


def _read_point(event: Mapping[str, object], where: str) -> tuple[str, int, float]:
    """Name, step and value of a metric event; value may be NaN or infinite."""
    try:
        return fit_name(str(event["name"])), int(str(event["step"])), float(str(event["value"]))
    except (KeyError, ValueError) as error:
        raise UserError(
            where,
            "metric event",
            json.dumps(dict(event), default=str),
            f"write name, step (a whole number) and value (a number): {error!r}",
        ) from error
