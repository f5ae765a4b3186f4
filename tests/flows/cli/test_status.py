"""What `calipert status` says: with servers and without, of every state, on one screen."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blocks.services.stack import ServiceStatus
from flows.cli import status as module
from flows.cli.status import FlowRun, Pool, Snapshot, shorten_reason, take_snapshot
from flows.cli.status_screen import MOST, make_screen

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
    console.print(make_screen(shown, NOW))
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
        ("x" * 500 + "y" * 500, "x" * 150 + " … " + "y" * 150),
    ],
)
def test_a_reason_is_one_line(message: str, line: str | None) -> None:
    assert shorten_reason(message) == (message if line is None else line)


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
    assert "but their flow run or process has ended: ridge seed 42." in text
    assert "Prefect: slow" in lines
    assert "make up" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_busy_week_fits_on_one_screen(width: int) -> None:
    reason = shorten_reason("where, what: " + "found " * 30)
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
        "import sys; from datetime import UTC, datetime; import flows.cli.main; now = datetime.now(UTC);"
        "from flows.cli.status import take_snapshot; from flows.cli.status_screen import make_screen;"
        "make_screen(take_snapshot(now), now);"
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
    shown = take_snapshot(NOW)
    prefect, mlflow = shown.troubles
    assert prefect.startswith(f"Prefect: {broken}/api")
    assert "500" in prefect
    assert mlflow.startswith(f"MLflow: {broken}")
    assert "Server error" in " ".join(printed(shown, 200).split())


def test_the_password_of_an_address_is_not_shown(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_password = broken.replace("//", "//ada:planted-password@")
    monkeypatch.setenv("PREFECT_API_URL", f"{with_password}/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_password)
    shown = take_snapshot(NOW)
    assert len(shown.troubles) == 2
    assert "planted" not in "".join(shown.troubles) + printed(shown, 200)


def test_the_store_is_measured_and_scratch_is_not(tmp_path: Path) -> None:
    for place, size in {"cells/a": 1000, "cells/b/figures": 2000, "scores/c": 500, ".temporary/d": 9000}.items():
        folder = tmp_path / "store" / place
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * size)
    count, size, free = module._measure_store(tmp_path / "store")
    assert (count, size) == (3, 3500)
    assert free > 0
    assert module._measure_store(tmp_path / "nothing" / "here")[:2] == (0, 0)
