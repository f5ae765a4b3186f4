"""Progress is told at intervals, whatever the number of events, and a lost server costs nothing but its artifact."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from uuid import UUID

import httpx
import pytest

from tasks import progress

Step = Callable[[float, int], None]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[str | None], Step]:
    """A training of ten epochs in the flow run of that id; each step gives the time in seconds and the epochs done."""
    caplog.set_level(logging.INFO, logger="calipert")
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def begin(flow_run: str | None) -> Step:
        monkeypatch.setattr(progress, "runtime", SimpleNamespace(flow_run=SimpleNamespace(id=flow_run)))
        take = progress.make_progress_reporter("training x")

        def step(at: float, done: int) -> None:
            clock.now = 100.0 + at
            take({"event": "progress", "done": done, "total": 10, "unit": "epoch"})

        return step

    return begin


def test_the_log_has_a_line_every_thirty_seconds(steps, caplog: pytest.LogCaptureFixture) -> None:
    step = steps(None)
    for second in range(0, 70, 7):
        step(float(second), second // 7)
    assert caplog.messages == ["training x: 5 of 10 epochs"]


def test_the_artifact_is_brought_up_to_date_every_two_seconds_and_at_the_end(
    steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, object]] = []

    def create(**given: object) -> UUID:
        told.append(("created", given["progress"]))
        return UUID(int=1)

    monkeypatch.setattr(progress, "create_progress_artifact", create)
    monkeypatch.setattr(
        progress, "update_progress_artifact", lambda **given: told.append(("updated", given["progress"]))
    )
    step = steps("run")
    for at, done in ((0.5, 1), (2.5, 2), (3.0, 3), (5.0, 4), (5.1, 10)):
        step(at, done)
    assert told == [("created", 20.0), ("updated", 40.0), ("updated", 100.0)]


def test_a_lost_server_is_told_once_and_the_log_goes_on(
    steps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def create(**given: object) -> UUID:
        raise httpx.ConnectError("gone")

    monkeypatch.setattr(progress, "create_progress_artifact", create)
    step = steps("run")
    for at, done in ((3.0, 1), (6.0, 2), (31.0, 3)):
        step(at, done)
    assert caplog.messages == [
        "training x goes on, but its page no longer shows its progress: gone",
        "training x: 3 of 10 epochs",
    ]


def test_trainings_that_fail_count_as_ended_not_as_trained(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="calipert")
    progress.make_training_counter(1)("norman19, fmlp, fold 3")
    assert caplog.messages == ["ended 1 of 1 trainings (norman19, fmlp, fold 3)"]
