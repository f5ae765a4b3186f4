"""Progress of long steps while they run: as Prefect artifacts on the page of the flow run, and lines of the log."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import httpx
from prefect import runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from tasks.artifacts import LOG

PAUSE_S = 2.0  # between two updates: each is a request to the server
LINES_S = 30.0  # between two lines of the log


def artifact_name(text: str) -> str:
    """A key that Prefect takes for an artifact: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def shown_progress(what: str) -> Callable[[Mapping[str, Any]], None]:
    """A function that takes a model's events and shows those of progress: one in two seconds as an artifact of the flow
    run, where there is one, and one in thirty as a line of the log.

    what: says what progresses. What ends before has nothing shown. A lost server only costs the artifact.
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
                artifact = _created(artifact_name(what), percent, said)
            else:
                update_progress_artifact(artifact_id=artifact, progress=percent, description=said)
        except (httpx.HTTPError, PrefectException) as error:
            lost = True
            LOG.warning("%s goes on, but its page shows its progress no more: %s", what, error)
        shown = time.monotonic()

    return take


def _created(key: str, percent: float, description: str) -> UUID:
    created = create_progress_artifact(progress=percent, key=key, description=description)
    if not isinstance(created, UUID):
        raise TypeError(f"an artifact's id was awaited, not {created!r}")
    return created
