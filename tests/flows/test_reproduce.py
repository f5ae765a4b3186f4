"""A reproduction without a network: only the first data set waits for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blocks.config.catalog import open_catalog
from blocks.http import ConnectionLost
from core.errors import UserError
from flows import reproduce as module
from flows.reproduce import _reproduce_dataset


class FakeFetch:
    """In place of the task: without a network. tried: with how many retries, call by call."""

    def __init__(self, error: Exception) -> None:
        self.error, self.tried = error, []

    def __call__(self, *_: object, retries: int = 4) -> Path:
        self.tried.append(retries)
        raise self.error

    def with_options(self, retries: int) -> Callable[..., Path]:
        return lambda *_: self(retries=retries)


def test_without_a_network_only_the_first_data_set_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = FakeFetch(ConnectionLost("https://a.b/c", "connection", "no\nroute", "run again"))
    monkeypatch.setattr(module, "fetch_source", fetch)
    spec, connected = open_catalog().dataset("norman19"), True
    for _ in range(2):
        outcome, connected = _reproduce_dataset("norman19", spec, [], "raw", {}, connected)
        assert outcome[:3] == (
            "norman19",
            "could not be fetched",
            "https://a.b/c, connection: no route (run again)",
        )
    # An answer of whatever kind shows that the network is there again.
    fetch.error = UserError("https://a.b/c", "address", "HTTP 404", "check the address")
    for _ in range(2):
        outcome, connected = _reproduce_dataset("norman19", spec, [], "raw", {}, connected)
        assert outcome.reason == "https://a.b/c, address: HTTP 404 (check the address)"
    assert fetch.tried == [4, 0, 0, 4]
