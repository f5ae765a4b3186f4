"""What `calipert status` says: with servers and without, of every state, on one screen."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from blocks.config import child_environment
from blocks.services.stack import ServiceStatus
from flows.cli import status as module
from flows.cli.status import FlowRun, Pool, Snapshot, one_line, snapshot
from flows.cli.status_screen import MOST, screen

Run = Callable[..., subprocess.CompletedProcess[str]]

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
LOG = Path("/data/logs/x.log")
UP = [
    ServiceStatus("prefect", "running", "http://127.0.0.1:4200", 1, LOG),
    ServiceStatus("mlflow", "running", "http://127.0.0.1:5000", 2, LOG),
    ServiceStatus("worker-cpu", "running", None, 3, LOG),
]
REASON = (
    "Flow run encountered an exception: UserError: catalog entry tiny\n  field:  labels.column\n"
    "  found:  no such\ncolumn\n  remedy: name the column"
)


def printed(shown: Snapshot, width: int = 100) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(screen(shown, NOW))
    return console.export_text()


def flow_run(kind: str, name: str = "benchmark-demo", **changes: Any) -> FlowRun:
    given: dict[str, Any] = {
        "id": name,
        "name": name,
        "kind": kind,
        "state": kind.capitalize(),
        "due": NOW - timedelta(minutes=30),
        "begun": NOW - timedelta(minutes=30),
        "ended": None,
        "seconds": 0.0,
        "reason": "",
        "doing": [],
        "folds": None,
        "models": [],
    }
    return FlowRun(**{**given, **changes})


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (REASON, "catalog entry tiny, labels.column: no such column → name the column"),
        ("Flow run encountered an exception: ValueError: all\n\nwrong", "ValueError: all wrong"),
        ("Flow run was cancelled.", "Flow run was cancelled."),
        ("No sign of life for five minutes: its process was killed.", None),
        ("", ""),
        ("x" * 1000, "x" * 300 + " …"),
    ],
)
def test_a_reason_is_one_line(message: str, line: str | None) -> None:
    assert one_line(message) == (message if line is None else line)


def test_every_state_says_what_matters() -> None:
    runs = {
        "active": [
            flow_run(
                "RUNNING", folds=(3, 1, 10), doing=["ridge fold 4", "knn fold 1", "a", "b"], models=["ridge", "knn"]
            )
        ],
        "waiting": [flow_run("SCHEDULED", "prepare-norman19", due=NOW + timedelta(days=1), begun=None)],
        "failed": [flow_run("CRASHED", "calibrate-tiny", ended=NOW, seconds=7500, reason="its process [was] killed")],
        "done": [flow_run("COMPLETED", "embed-esm2", ended=NOW - timedelta(days=2), seconds=12.4)],
    }
    pools = [Pool("cpu", ["local-1"], 2, paused=False), Pool("gpu", [], 0, paused=True)]
    gpus = [("GPU-1", "demo, ridge, fold 1 (process 7)"), ("GPU-2", "free")]
    shown = Snapshot(UP, pools, runs, ["ridge seed 42"], gpus, (12, 3_400_000, 5 * 10**12), ["Prefect: slow"])
    lines = [" ".join(line.split()) for line in printed(shown, 140).splitlines()]
    text = "\n".join(lines)
    assert "prefect running http://127.0.0.1:4200" in lines
    assert "cpu local-1 (2 offline)" in lines
    assert "gpu paused; none: what is sent here waits" in lines
    since = NOW - timedelta(minutes=30)
    place = lines.index(f"benchmark-demo running since {since.astimezone():%H:%M}, 30 min")
    assert lines[place + 1] == (
        "benchmark-demo · ridge, knn · 3 of 10 folds done, 1 failed; ridge fold 4; knn fold 1; a and 1 more"
    )
    assert f"prepare-norman19 scheduled due {(NOW + timedelta(days=1)).astimezone():%b %d %H:%M}" in text
    place = lines.index(f"calibrate-tiny crashed {NOW.astimezone():%H:%M}, 2 h 5 min")
    assert lines[place + 1] == "calibrate-tiny · its process [was] killed"
    assert f"embed-esm2 completed {(NOW - timedelta(days=2)).astimezone():%b %d %H:%M}, 12 s" in lines
    assert "GPU GPU-1 demo, ridge, fold 1 (process 7)" in lines
    assert "store 12 artifacts, 3.4 MB; 5 TB free" in text
    assert "nobody goes on with them: ridge seed 42." in text
    assert "Prefect: slow" in lines
    assert "make up" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_busy_week_fits_on_one_screen(width: int) -> None:
    reason = one_line("where, what: " + "found " * 30)
    runs = {
        kind: [flow_run(state, f"benchmark-{state.lower()}-{i}", reason=reason, ended=NOW) for i in range(200)]
        for kind, state in zip(MOST, ("RUNNING", "SCHEDULED", "FAILED", "COMPLETED"), strict=True)
    }
    text = printed(Snapshot(UP, [Pool("cpu", ["a"], 0, False)] * 2, runs, ["run"] * 50), width)
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= width
    assert text.count("benchmark-failed-") == 2 * MOST["failed"], "each by its name and its id"
    assert "and 195+ more failed" in text
    assert "and 45 more" in " ".join(text.split())


def test_without_servers_it_says_how_to_start_and_starts_nothing(calipert: Run, tmp_path: Path) -> None:
    done = calipert("status")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["prefect", "stopped"] in lines
    assert ["mlflow", "stopped"] in lines
    assert "make up" in done.stdout
    assert "0 artifacts" in done.stdout
    assert not (tmp_path / "data").exists()


def test_neither_prefect_nor_mlflow_is_imported() -> None:
    code = (
        "import sys; from datetime import UTC, datetime; import flows.cli.main; from flows.cli.status import snapshot;"
        "from flows.cli.status_screen import screen; now = datetime.now(UTC); screen(snapshot(now), now);"
        "sys.exit(str({'prefect', 'mlflow', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a server that answers everything with an error, named in the environment for both."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(500)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", f"{url}/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    yield url
    server.shutdown()
    server.server_close()
    thread.join()


def test_servers_that_fail_are_troubles_not_errors(broken: str) -> None:
    shown = snapshot(NOW)
    prefect, mlflow = shown.troubles
    assert prefect.startswith(f"Prefect: {broken}/api")
    assert "500" in prefect
    assert mlflow.startswith(f"MLflow: {broken}")
    assert "Server error" in " ".join(printed(shown, 200).split())


def test_the_store_is_measured_and_scratch_is_not(tmp_path: Path) -> None:
    for place, size in {"cells/a": 1000, "cells/b/figures": 2000, "scores/c": 500, ".temporary/d": 9000}.items():
        folder = tmp_path / "store" / place
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * size)
    count, size, free = module._size(tmp_path / "store")
    assert (count, size) == (3, 3500)
    assert free > 0
    assert module._size(tmp_path / "nothing" / "here")[:2] == (0, 0)


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.xdist_group("servers")
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
        for flow_run_id, model in ((running, "ridge"), (crashed, "knn")):
            one = ModelRun(model, 42, key=f"status-{model}", kind="model", params={}, folds=(0, 1, 2))
            runs = tracking.open_runs(
                "status", f"status-{model}", [one], digest="d", source="s", flow_run_id=flow_run_id
            )
            tracking.finish(runs[model].folds[0])

        shown = snapshot(datetime.now(UTC))
        assert shown.troubles == []
        found = {run.name: run for kind in shown.runs.values() for run in kind}
        assert "a fold of its own" not in found
        assert found["benchmark-a"].folds == (1, 0, 3)
        assert found["benchmark-a"].doing == ["prepare-cells"]
        assert found["benchmark-b"].reason == "No sign of life"
        assert found["prepare-c"].reason == "catalog entry tiny, labels.column: no such column → name the column"
        assert found["calibrate-norman19"].state == "Scheduled"
        assert shown.stale == ["knn seed 42"]

        began = time.monotonic()
        done = calipert("status", data=data_folder())
        assert time.monotonic() - began < 60  # a hang, not a measurement
        assert done.returncode == 0, done.stderr
        flat = " ".join(done.stdout.split())
        assert "1 of 3 folds done; prepare-cells" in flat
        assert servers.prefect in flat
        assert "knn seed 42" in flat
        tracking.end_stale("status", lambda ids: {running})
        assert snapshot(datetime.now(UTC)).stale == []
        tracking.finish(*(run.run_id for run in runs.values()))
        tracking.end_interrupted(running, "the test is over")
