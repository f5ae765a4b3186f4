"""The benchmark flow end to end: what it writes and records, that it repeats nothing, always the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import httpx
import numpy as np
import pandas as pd
import pytest

from blocks.config.child_environment import Services

MODELS = ["ridge_coexpression", "knn_coexpression"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def results(run_benchmark: Callable[..., Path], screen: Path, data: Path) -> Path:
    return run_benchmark(screen, data, MODELS)


def artifacts(data: Path) -> dict[str, int]:
    return {str(p.relative_to(data)): p.stat().st_mtime_ns for p in (data / "store").glob("*/*/manifest.json")}


def mlflow_runs(servers: Services) -> pd.DataFrame:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=servers.mlflow)
    experiment = client.get_experiment_by_name("calipert/tiny")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return pd.DataFrame(
        {
            "name": [run.info.run_name for run in runs],
            "status": [run.info.status for run in runs],
            "kind": [run.data.tags.get("kind") for run in runs],
            "parent": [run.data.tags.get("mlflow.parentRunId") for run in runs],
            "benchmark": [run.data.tags.get("benchmark_id") for run in runs],
            "metrics": [run.data.metrics for run in runs],
            "key": [run.data.tags.get("calipert.key") for run in runs],
        }
    )


def test_results_hold_every_model_control_and_condition(results: Path) -> None:
    scores = pd.read_parquet(results / "scores.parquet")
    assert set(MODELS) < set(scores["model"])
    assert {"technical_duplicate", "dataset_mean", "control_mean"} < set(scores["model"])
    conditions = scores.groupby("model")["condition"].nunique()
    assert (conditions[MODELS] == 12).all()
    assert sorted(scores["half_seed"].unique()) == [42, 43]
    assert not scores.duplicated(["model", "covariate", "condition", "half_seed", "metric"]).any()
    assert (results / "report.html").stat().st_size > 10_000
    board = pd.read_parquet(results / "leaderboard.parquet")
    assert board.loc[~board["calibrated"], "rank"].isna().all()


def test_a_second_run_computes_nothing_and_duplicates_no_run(
    results: Path, run_benchmark: Callable[..., Path], screen: Path, data: Path, servers: Services
) -> None:
    before, runs = artifacts(data), mlflow_runs(servers)
    run_benchmark(screen, data, MODELS)
    assert artifacts(data) == before
    again = mlflow_runs(servers)
    assert len(again) == len(runs)
    assert set(again["status"]) == {"FINISHED"}


def test_mlflow_has_one_run_per_model_control_fold_and_calibration(results: Path, servers: Services) -> None:
    runs = mlflow_runs(servers)
    # Other benchmarks of this data set, with other models, may stand in the same experiment, and other calibrations.
    calibrations = runs.loc[runs["kind"] == "calibration", "key"]
    assert len(calibrations) > 0
    assert calibrations.is_unique
    (benchmark,) = runs.loc[runs["name"] == "knn_coexpression seed 42", "benchmark"]
    runs = runs[runs["benchmark"] == benchmark]
    top = runs[runs["parent"].isna()]
    for model in MODELS:
        row = top[top["name"].str.startswith(model)]
        assert len(row) == 1
        assert np.isfinite(row["metrics"].iloc[0]["wmse.mean"])
    assert {"baseline", "negative control", "positive control"} <= set(top["kind"])
    assert runs["parent"].notna().sum() == 2 * len(MODELS)


def test_prefect_has_the_flow_run_and_its_tasks(results: Path, servers: Services) -> None:
    query = {"flows": {"name": {"any_": ["benchmark"]}}, "limit": 20}
    runs = httpx.post(f"{servers.prefect_api}/flow_runs/filter", json=query, timeout=60).json()
    finished = [run for run in runs if run["state_type"] == "COMPLETED"]
    assert finished
    query = {"flow_runs": {"id": {"any_": [finished[0]["id"]]}}, "limit": 200}
    tasks = httpx.post(f"{servers.prefect_api}/task_runs/filter", json=query, timeout=60).json()
    assert {task["state_type"] for task in tasks} == {"COMPLETED"}
    names = " ".join(task["name"] for task in tasks)
    for step in ("prepare-cells", "build-reference", "ridge_coexpression fold 1", "make-results"):
        assert step in names


def test_scores_are_the_same_bytes_with_another_hash_seed_and_one_thread(
    results: Path, run_benchmark: Callable[..., Path], screen: Path, tmp_path: Path
) -> None:
    environment = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    other = run_benchmark(screen, tmp_path / "data", MODELS, **environment)
    assert (other / "scores.parquet").read_bytes() == (results / "scores.parquet").read_bytes()


def test_scores_are_the_same_bytes_for_shuffled_rows_and_genes_with_two_threads(
    results: Path, run_benchmark: Callable[..., Path], screen: Path, tmp_path: Path
) -> None:
    raw = ad.read_h5ad(screen)
    rng = np.random.default_rng(0)
    shuffled = raw[rng.permutation(raw.n_obs)][:, rng.permutation(raw.n_vars)].copy()
    shuffled.write_h5ad(tmp_path / "shuffled.h5ad")
    environment = {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    other = run_benchmark(tmp_path / "shuffled.h5ad", tmp_path / "data", MODELS, **environment)
    assert (other / "scores.parquet").read_bytes() == (results / "scores.parquet").read_bytes()
