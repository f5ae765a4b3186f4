"""Trainings as flow runs of their own: with a worker for each pool, as `make up` starts them."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prefect.client.base import PrefectHttpxSyncClient

from blocks.config import child_environment
from blocks.config.child_environment import Services
from blocks.config.paths import PROJECT_ROOT
from blocks.config.pools import CPU, GPU
from blocks.services import daemons
from blocks.services.workers import WORKERS, end_workers

MODELS = ["ridge_coexpression", "knn_coexpression"]
# One that trains for ever, and one that fails at once.
ENDLESS = {"name": "endless", "title": "endless", "container": "fmlp", "embedding": True}
OWN_MODELS = [
    ENDLESS | {"hyperparameters": {"epochs": 1_000_000, "validate_every": 1}},
    ENDLESS | {"name": "broken", "hyperparameters": {"epochs": -1}},
    ENDLESS | {"name": "late", "hyperparameters": {"epochs": 1_000_000}, "time_limits": {"train": 5}},
]


@pytest.fixture(scope="module")
def stack(
    servers: Services, tmp_path_factory: pytest.TempPathFactory, screen: Path, tiny: dict[str, Any]
) -> Iterator[Services]:
    """The servers and a worker for each pool, with a catalog of the test's own."""
    catalog = tmp_path_factory.mktemp("catalog")
    for kind, entries in {"datasets": [tiny | {"name": "folds"}], "models": OWN_MODELS}.items():
        (catalog / kind).mkdir()
        for entry in entries:
            (catalog / kind / f"{entry['name']}.yaml").write_text(yaml.safe_dump(entry), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALIPERT_CATALOG", str(catalog))
        patch.setenv("CALIPERT_SOURCE_FOLDS", str(screen))
        patch.setenv("CALIPERT_GPUS", "none")
        try:
            command = [sys.executable, "-m", "tests.helpers.few_deployments", "up", "benchmark/folds", "train-fold/any"]
            subprocess.run(command, cwd=PROJECT_ROOT, check=True)
            yield servers
        finally:
            with daemons.lock_services():
                end_workers(daemons.read_records(), *WORKERS)
            # Else other tests' benchmarks would wait for them for a while.
            for pool in (CPU, GPU):
                forget_workers(servers, pool)


def forget_workers(stack: Services, pool: str) -> None:
    """Make the server forget the workers of a pool, which have ended."""
    for worker in prefect(stack, "POST", f"work_pools/{pool}/workers/filter", {}):
        prefect(stack, "DELETE", f"work_pools/{pool}/workers/{worker['name']}")


def submit(stack: Services, models: list[str]) -> str:
    """A run of benchmark/folds; its id."""
    deployment = prefect(stack, "GET", "deployments/name/benchmark/folds")["id"]
    query = {"parameters": {"models": models}, "state": {"type": "SCHEDULED"}}
    # Asked again after a broken answer, the server makes no second run.
    query["idempotency_key"] = secrets.token_hex(8)
    return str(prefect(stack, "POST", f"deployments/{deployment}/create_flow_run", query)["id"])


def prefect(stack: Services, method: str, path: str, query: dict[str, Any] | None = None) -> Any:
    """What Prefect's server answers; a busy one is asked again, as by Prefect's own commands."""
    with PrefectHttpxSyncClient(timeout=30) as api:
        answer = api.request(method, f"{stack.prefect_api}/{path}", json=query)
    return answer.json() if answer.content else None


def flow_run(stack: Services, run: str) -> dict[str, Any]:
    return prefect(stack, "GET", f"flow_runs/{run}")


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.2)


def ended(stack: Services, run: str) -> dict[str, Any]:
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    wait_for(lambda: flow_run(stack, run)["state_type"] in final, 180)
    return flow_run(stack, run)


def trainings(stack: Services, run: str) -> list[dict[str, Any]]:
    """The flow runs of single folds under a benchmark."""
    query = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "flows": {"name": {"any_": ["train-fold"]}}}
    return prefect(stack, "POST", "flow_runs/filter", query)


def logs(stack: Services, run: str) -> str:
    query = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}
    return "\n".join(row["message"] for row in prefect(stack, "POST", "logs/filter", query))


def model_processes(model: str) -> list[psutil.Process]:
    """Processes that run a model's stage for this test's data folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            # Its spec lies in the data folder.
            if f"model_containers/{model}/model.py train {os.environ['CALIPERT_DATA']}" in command:
                found.append(process)
    return found


def mlflow_runs(stack: Services) -> list[dict[str, Any]]:
    api = f"{stack.mlflow}/api/2.0/mlflow"
    found = httpx.get(f"{api}/experiments/get-by-name", params={"experiment_name": "calipert/folds"}, timeout=60).json()
    query = {"experiment_ids": [found["experiment"]["experiment_id"]], "max_results": 1000}
    runs = httpx.post(f"{api}/runs/search", json=query, timeout=30).json()["runs"]
    return [
        {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        | {"status": run["info"]["status"], "name": run["info"]["run_name"]}
        for run in runs
    ]


def test_every_fold_is_a_flow_run_in_the_gpu_pool_and_the_scores_are_those_of_one_process(
    stack: Services, tmp_path: Path
) -> None:
    run = submit(stack, MODELS)
    done = ended(stack, run)
    assert done["state_type"] == "COMPLETED", logs(stack, run)
    parts = trainings(stack, run)
    names = {f"folds, {model}, fold {fold}" for model in MODELS for fold in (0, 1)}
    assert {part["name"] for part in parts} == names
    assert len(parts) == len(names)
    assert {part["state_type"] for part in parts} == {"COMPLETED"}
    assert {part["work_pool_name"] for part in parts} == {"gpu"}
    own = Path(os.environ["CALIPERT_DATA"]) / "reports" / "folds" / "scores.parquet"
    code = f"from flows.benchmark import benchmark; benchmark('folds', {MODELS})"
    environment = child_environment.build_child_environment(stack) | {"CALIPERT_DATA": str(tmp_path / "data")}
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, env=environment, check=True)
    assert own.read_bytes() == (tmp_path / "data" / "reports" / "folds" / "scores.parquet").read_bytes()
    assert {one["status"] for one in mlflow_runs(stack)} == {"FINISHED"}


def test_what_the_store_has_is_not_handed_out_again(stack: Services) -> None:
    ended(stack, submit(stack, MODELS))
    again = submit(stack, MODELS)
    assert ended(stack, again)["state_type"] == "COMPLETED"
    assert trainings(stack, again) == []


def test_the_failure_of_a_fold_fails_the_benchmark_with_its_reason_and_leaves_the_others(stack: Services) -> None:
    run = submit(stack, ["broken_coexpression", "ridge_coexpression"])
    done = ended(stack, run)
    assert done["state_type"] == "FAILED"
    assert "epochs" in done["state"]["message"] + logs(stack, run)
    failed = [one for one in mlflow_runs(stack) if one.get("model") == "broken_coexpression"]
    assert failed
    assert {one["status"] for one in failed} == {"FAILED"}


def test_a_training_beyond_its_time_limit_is_stopped(stack: Services) -> None:
    run = submit(stack, ["late_coexpression"])
    assert ended(stack, run)["state_type"] == "FAILED"
    assert "time_limits" in logs(stack, run)
    assert model_processes("fmlp") == []


def test_a_cancellation_ends_the_models_within_ten_seconds(stack: Services) -> None:
    run = submit(stack, ["endless_coexpression"])
    wait_for(lambda: model_processes("fmlp"), 90)
    prefect(stack, "POST", f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    began = time.monotonic()
    wait_for(lambda: not model_processes("fmlp"), 30)
    seconds = time.monotonic() - began
    print(f"models gone {seconds:.1f} s after the cancellation")
    assert seconds < 10
    assert ended(stack, run)["state_type"] == "CANCELLED"
    wait_for(lambda: all(part["state_type"] == "CANCELLED" for part in trainings(stack, run)), 60)
    wait_for(lambda: all(one["status"] != "RUNNING" for one in mlflow_runs(stack)), 60)
    mine = [one for one in mlflow_runs(stack) if one["flow_run_id"] == run and one["kind"] != "calibration"]
    assert {one["status"] for one in mine} == {"KILLED"}


def test_without_workers_for_trainings_the_benchmark_does_them_itself(stack: Services) -> None:
    rows = json.loads(Path(os.environ["CALIPERT_DATA"], "services.json").read_text(encoding="utf-8"))
    workers = {row["name"]: psutil.Process(row["pid"]) for row in rows if row["name"].startswith("worker")}
    workers["worker-gpu"].kill()
    forget_workers(stack, GPU)
    run = submit(stack, ["late_coexpression"])
    done = ended(stack, run)
    assert done["state_type"] == "FAILED"
    assert trainings(stack, run) == []
    assert "has no worker online" in logs(stack, run)
