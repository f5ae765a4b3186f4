"""Pieces of work in threads."""

from __future__ import annotations

from contextvars import ContextVar

import pytest

from blocks.tracking.runs import map_threads

FLOW_RUN: ContextVar[str] = ContextVar("flow_run", default="none")


@pytest.mark.parametrize("many", [[], [1], list(range(20))])
def test_each_piece_of_work_sees_the_context_of_its_caller(many: list[int]) -> None:
    token = FLOW_RUN.set("this")
    try:
        assert map_threads(lambda each: (each, FLOW_RUN.get()), many) == [(each, "this") for each in many]
    finally:
        FLOW_RUN.reset(token)
