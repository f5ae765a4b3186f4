"""Long passes hand on what they get, and say now and then how far they are."""

from __future__ import annotations

import logging

import pytest

from core import progress as module
from core.progress import log_progress

PARTS = [(slice(0, 40), "a"), (slice(40, 75), "b")]


def test_parts_go_through_in_order(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "calipert"):
        assert list(log_progress("reading", iter(PARTS), 75)) == PARTS
    assert not caplog.records  # nothing to say of a short pass


def test_long_passes_say_how_far_they_are(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", -1.0)
    with caplog.at_level(logging.INFO, "calipert"):
        list(log_progress("reading", iter(PARTS), 1_075, "genes"))
    assert caplog.messages == ["reading: 40 of 1,075 genes", "reading: 75 of 1,075 genes"]
