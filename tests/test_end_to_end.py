"""A benchmark as a user runs it: one command, with the servers that it starts, from raw counts to the report."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from blocks.services import stack
from tests.helpers.tiny_screen import SIMULATED

MODELS = ["ridge_coexpression", "knn_coexpression"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data folder of the test's own; the servers that are started for it are stopped."""
    folder = tmp_path / "data"
    monkeypatch.setenv("CALIPERT_DATA", str(folder))
    yield folder
    stack.stop()


def test_a_benchmark_from_raw_counts_to_the_report(
    calipert: Callable[..., subprocess.CompletedProcess[str]], data: Path, tmp_path: Path
) -> None:
    entry = tmp_path / "tiny.yaml"
    entry.write_text(yaml.safe_dump(SIMULATED), encoding="utf-8")
    done = calipert("run", entry, "--models", ",".join(MODELS), data=data)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in MODELS:
        assert name in done.stdout
    results = data / "reports" / "tiny"
    assert (results / "report.html").stat().st_size > 10_000
    scores = pd.read_parquet(results / "scores.parquet")
    assert set(MODELS) | {"technical_duplicate", "dataset_mean", "control_mean"} < set(scores["model"])
    assert not scores.duplicated(["model", "covariate", "condition", "half_seed", "metric"]).any()
    wmse = scores[scores["metric"] == "wmse"].groupby("model")["value"].agg(["mean", "count"])
    assert (wmse.loc[MODELS, "count"] == 12 * 2).all(), "12 conditions, 2 half splits"
    assert np.isfinite(wmse.loc[MODELS, "mean"]).all()
    assert wmse["mean"]["technical_duplicate"] < wmse["mean"]["dataset_mean"]
    board = pd.read_parquet(results / "leaderboard.parquet")
    assert set(MODELS) <= set(board["model"])
    running = {row["name"] for row in json.loads((data / "services.json").read_text(encoding="utf-8"))}
    assert running == {"prefect", "mlflow"}
