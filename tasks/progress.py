"""Progress of long steps while they run: as Prefect artifacts on the page of the flow run, and lines of the log."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from tasks.artifacts import LOG

COUNTS_S = 10.0  # between two lines that count trainings
PAUSE_S = 2.0  # between two updates: each is a request to the server
LINES_S = 30.0  # between two lines of the log


def artifact_name(text: str) -> str:
    """Return the text as Prefect takes it for an artifact's key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def log_message(what: str, event: Mapping[str, Any]) -> None:
    """Log what a model says, if that is what an event is. what: the work that it does."""
    if event.get("event") == "log":
        LOG.info("%s: %s", what, event["message"])


def make_progress_reporter(what: str) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that takes a model's events and reports those of progress.

    At most one in two seconds becomes an artifact of the flow run, if there is one, and one in thirty a line of the
    log. what: the step that progresses. A step that ends earlier reports nothing. A lost server only costs the
    artifact.
    """
    artifact: UUID | None = None
    shown = logged = time.monotonic()
    lost = runtime.flow_run.id is None

    def take(event: Mapping[str, Any]) -> None:
        nonlocal artifact, shown, logged, lost
        if event.get("event") != "progress" or not event["total"]:
            return
        now, whole = time.monotonic(), event["done"] >= event["total"]
        said = f"{what}: {event['done']} of {event['total']} {event['unit']}s"
        if now - logged >= LINES_S:
            LOG.info("%s", said)
            logged = now
        if lost or (now - shown < PAUSE_S and not (whole and artifact)):
            return
        percent = min(100.0, 100.0 * event["done"] / event["total"])
        try:
            if artifact is None:
                # A coroutine it is only for callers that are coroutines themselves.
                created = create_progress_artifact(progress=percent, key=artifact_name(what), description=said)
                artifact = cast(UUID, created)
            else:
                update_progress_artifact(artifact_id=artifact, progress=percent, description=said)
        except (httpx.HTTPError, PrefectException) as error:
            lost = True
            LOG.warning("%s goes on, but its page no longer shows its progress: %s", what, error)
        shown = time.monotonic()

    return take


def make_training_counter(total: int) -> Callable[[str], None]:
    """Return a function that takes the name of each training that has ended, and logs how many are left.

    total: how many there are. It logs at most one line in ten seconds, and the last: "ended 12 of 50 trainings
    (norman19, fmlp_reactome, fold 3), about 4 minutes left". The time left follows from the pace so far.
    """
    start = logged = time.monotonic()
    done = 0

    def count(name: str) -> None:
        nonlocal done, logged
        done += 1
        now = time.monotonic()
        if done < total and now - logged < COUNTS_S:
            return
        logged = now
        left = f", about {_in_words((now - start) / done * (total - done))} left" if done < total else ""
        LOG.info("ended %d of %d trainings (%s)%s", done, total, name, left)

    return count


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
