"""What a network is needed for comes before what takes long."""

from __future__ import annotations

from typing import Any

import pytest

from blocks.http import ConnectionLost
from flows import benchmark, steps, train


@pytest.mark.parametrize("module", [benchmark, train])
def test_what_models_need_is_fetched_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    asked: list[str] = []

    def unreachable(needed: list[Any], sources: dict[str, str]) -> None:
        asked.extend(one.name for one in needed)
        raise ConnectionLost("https://example.org", "connection", "no route", "try again")

    def too_late(*_: object) -> None:
        raise AssertionError("work was done before all files were there")

    monkeypatch.setenv("CALIPERT_ENGINE", "process")
    monkeypatch.setattr(module, "fetch_inputs", unreachable)
    for name in ("fetch_source", "prepare_cells"):
        monkeypatch.setattr(steps, name, too_late)
    flow = getattr(module, module.__name__.rpartition(".")[2])
    with pytest.raises(ConnectionLost, match="no route"):
        flow.fn("demo", ["ridge_reactome", "knn_reactome", "ridge_coexpression"])
    assert asked == ["reactome"]
