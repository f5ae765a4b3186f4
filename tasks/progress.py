"""Progress of long steps as Prefect artifacts, which the page of the flow run shows while they run."""

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


def artifact_name(text: str) -> str:
    """A key that Prefect takes for an artifact: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def shown_progress(what: str) -> Callable[[Mapping[str, Any]], None]:
    """A function that takes a model's events and shows those of progress, at most one every two seconds.

    what: says what progresses. What ends within two seconds shows nothing. A lost server only costs the display.
    """
    artifact: UUID | None = None
    shown = time.monotonic()
    lost = runtime.flow_run.id is None

    def take(event: Mapping[str, Any]) -> None:
        nonlocal artifact, shown, lost
        if lost or event.get("event") != "progress" or not event["total"]:
            return
        whole = event["done"] >= event["total"]
        if time.monotonic() - shown < PAUSE_S and not (whole and artifact):
            return
        percent = min(100.0, 100.0 * event["done"] / event["total"])
        said = f"{what}: {event['done']} of {event['total']} {event['unit']}s"
        try:
            if artifact is None:
                artifact = _created(artifact_name(what), percent, said)
            else:
                update_progress_artifact(artifact_id=artifact, progress=percent, description=said)
        except (httpx.HTTPError, PrefectException) as error:
            lost = True
            LOG.warning("%s goes on, but its progress is shown no more: %s", what, error)
        shown = time.monotonic()

    return take


def _created(key: str, percent: float, description: str) -> UUID:
    created = create_progress_artifact(progress=percent, key=key, description=description)
    if not isinstance(created, UUID):
        raise TypeError(f"an artifact's id was awaited, not {created!r}")
    return created
