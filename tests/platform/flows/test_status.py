"""What `calipert status` says of the flow runs and MLflow runs that there are."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from blocks.config import child_environment
from flows.cli.status import take_snapshot

Run = Callable[..., subprocess.CompletedProcess[str]]


REASON = (
    "Flow run encountered an exception: UserError: catalog entry tiny\n  field:  labels.column\n"
    "  found:  no such\ncolumn\n  remedy: name the column"
)


class TestWithServers:
    """Flow runs and MLflow runs as they are found, and the command on them."""

    @pytest.fixture
    def api(self, servers: child_environment.Services) -> Iterator[httpx.Client]:
        # A busy server is asked again, as by Prefect's own commands.
        from prefect.client.base import PrefectHttpxSyncClient

        with PrefectHttpxSyncClient(base_url=servers.prefect_api, timeout=60) as client:
            yield client

    def run(self, api: httpx.Client, flow: str, name: str, state: dict[str, Any], **more: Any) -> str:
        flow_id = api.post("/flows/", json={"name": flow}).raise_for_status().json()["id"]
        made = api.post("/flow_runs/", json={"flow_id": flow_id, "name": name, "state": {"type": "PENDING"}, **more})
        id = str(made.raise_for_status().json()["id"])
        api.post(f"/flow_runs/{id}/set_state", json={"state": state, "force": True}).raise_for_status()
        return id

    def test_what_ran_runs_waits_and_failed(
        self, api: httpx.Client, servers: child_environment.Services, calipert: Run, tmp_path: Path
    ) -> None:
        from blocks.config.paths import data_folder
        from blocks.tracking.tracker import MLflowTracking, ModelRun
        from tasks.record import list_active_flow_runs

        running = self.run(api, "benchmark", "benchmark-a", {"type": "RUNNING"})
        crashed = self.run(api, "benchmark", "benchmark-b", {"type": "RUNNING"})
        api.post(
            f"/flow_runs/{crashed}/set_state",
            json={"state": {"type": "CRASHED", "name": "Crashed", "message": "No sign of life"}, "force": True},
        ).raise_for_status()
        failed = {"type": "FAILED", "message": REASON}
        self.run(api, "prepare", "prepare-c", failed)
        later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
        waiting = {"type": "SCHEDULED", "state_details": {"scheduled_time": later}}
        self.run(api, "calibrate", "wild-fox", waiting, parameters={"dataset": "norman19"})
        self.run(api, "train-fold", "a fold of its own", {"type": "RUNNING"})
        task = {"flow_run_id": running, "task_key": "prepare-cells", "dynamic_key": "0", "name": "prepare-cells-a1f"}
        api.post("/task_runs/", json={**task, "state": {"type": "RUNNING"}}).raise_for_status()

        tracking = MLflowTracking(tracking_uri=servers.mlflow)
        # Others write to this server too: their runs, and tags that are no ids, are not to be in the way.
        for flow_run_id, model in ((running, "ridge"), (crashed, "knn"), ("by hand", "linear")):
            one = ModelRun(model, 4217, key=f"status-{model}", kind="model", params={}, folds=(0, 1, 2))
            runs = tracking.open_runs(
                "status", f"status-{model}", [one], digest="d", source="s", flow_run_id=flow_run_id
            )
            tracking.finish(runs[model].folds[0])

        with temporary_settings({PREFECT_API_URL: servers.prefect_api}):
            assert list_active_flow_runs([running, crashed, "by hand"]) == {running, "by hand"}
            assert list_active_flow_runs(["by hand"]) == {"by hand"}

        shown = take_snapshot(datetime.now(UTC))
        assert shown.troubles == []
        found = {run.name: run for kind in shown.runs.values() for run in kind}
        assert "a fold of its own" not in found
        assert found["benchmark-a"].folds == (1, 0, 3)
        assert found["benchmark-a"].doing == ["prepare-cells"]
        assert found["benchmark-b"].reason == "No sign of life"
        assert found["prepare-c"].reason == "catalog entry tiny, labels.column: no such column → name the column"
        assert found["calibrate-norman19"].state == "Scheduled"
        assert "knn seed 4217" in shown.stale
        assert not {"ridge seed 4217", "linear seed 4217"} & set(shown.stale)

        began = time.monotonic()
        done = calipert("status", data=data_folder())
        assert time.monotonic() - began < 60  # a hang, not a measurement
        assert done.returncode == 0, done.stderr
        flat = " ".join(done.stdout.split())
        assert "1 of 3 folds done; prepare-cells" in flat
        assert servers.prefect in flat
        assert "knn seed 4217" in flat
        tracking.end_stale("status", lambda ids: {running})
        assert "knn seed 4217" not in take_snapshot(datetime.now(UTC)).stale
        tracking.finish(*(run.run_id for run in runs.values()))
        tracking.end_interrupted(running, "the test is over")
