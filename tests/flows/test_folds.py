"""What a benchmark does when one of its parts fails or is gone, without servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock
from uuid import UUID

import pytest

from flows import benchmark, remote_folds


def test_a_failure_of_the_quality_ends_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    @contextmanager
    def end_on_error(*run_ids: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            ended.append(str(error))
            raise

    for name in ("check_run", "fetch_inputs", "list_inputs", "prepare_screen"):
        monkeypatch.setattr(benchmark, name, MagicMock())
    monkeypatch.setattr(benchmark, "plan_folds", lambda *_: (MagicMock(), MagicMock()))
    monkeypatch.setattr(benchmark, "calibrate_screen", lambda screen: (MagicMock(), MagicMock()))
    monkeypatch.setattr(benchmark, "train_folds", lambda *_: {})
    monkeypatch.setattr(benchmark, "end_runs_on_error", end_on_error)
    quality = MagicMock()
    quality.submit.return_value.result.side_effect = RuntimeError("no memory")
    monkeypatch.setattr(benchmark, "measure_quality", quality)
    with pytest.raises(RuntimeError, match="no memory"):
        benchmark.benchmark.fn("demo")
    assert ended == ["no memory"]


def test_a_deleted_flow_run_counts_as_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    progress: list[Any] = []
    counted: list[str] = []
    monkeypatch.setattr(remote_folds, "POLL_S", 0.0)
    monkeypatch.setattr(remote_folds, "get_client", lambda **_: nullcontext())
    monkeypatch.setattr(remote_folds, "_send", lambda job, left: UUID(int=1))
    monkeypatch.setattr(remote_folds, "_read", lambda client, ids: [])
    monkeypatch.setattr(remote_folds, "make_progress_reporter", lambda what: progress.append)
    jobs: list[Any] = [SimpleNamespace(name="fold 0", dataset="demo")]
    assert remote_folds.train_remotely(jobs, counted.append) == {"fold 0": "its flow run was deleted"}
    assert counted == ["fold 0"]
    assert [event["done"] for event in progress] == [1]
