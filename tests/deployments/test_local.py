"""How many trainings run at the same time on one machine."""

from __future__ import annotations

import pytest

from deployments import local


@pytest.mark.parametrize(("cores", "trainings"), [(1, 1), (2, 2), (3, 2), (4, 2), (8, 4), (None, 1)])
def test_without_a_gpu_half_of_the_cores_train(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, trainings: int
) -> None:
    monkeypatch.setattr(local, "list_gpus", list)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert local.count_trainings_at_once() == trainings


def test_each_gpu_trains_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "list_gpus", lambda: [f"GPU-{number}" for number in range(3)])
    monkeypatch.setattr("os.cpu_count", lambda: 96)
    assert local.count_trainings_at_once() == 3
