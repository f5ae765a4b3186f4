"""The local stack as a user types it, in a data folder of its own."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from blocks.config import child_environment
from blocks.config.paths import PROJECT_ROOT
from blocks.services import stack as services
from deployments.local import count_trainings_at_once
from deployments.table import build_table

FLOW = """
import os, time
from pathlib import Path
from prefect import flow

@flow(name="probe")
def probe(dataset: str, seconds: float = 0):
    Path(os.environ["PROBE"]).write_text(f"{os.getcwd()} {dataset} {os.environ['MLFLOW_TRACKING_URI']}")
    time.sleep(seconds)
"""

REGISTER = """
from deployments.register import register
from deployments.table import Deployment

class Probe(Deployment):
    entrypoint = "probe_flow.probe"

register([Probe("probe", "demo", {"dataset": "demo"}, ("probe",), "A probe.", "cpu")])
"""

READ = """
import json
from prefect import get_client
with get_client(sync_client=True) as client:
    found = {
        "deployments": [one.model_dump(mode="json") for one in client.read_deployments()],
        "flows": {str(one.id): one.name for one in client.read_flows()},
        "pools": {one.name: [one.type, one.concurrency_limit] for one in client.read_work_pools()},
    }
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Stack:
    """folder: holds the data folder and what the probe writes. first: what the first `up` printed."""

    folder: Path
    first: str

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], cwd=PROJECT_ROOT, env=os.environ, capture_output=True, text=True
        )

    def local(self, command: str) -> str:
        done = self.call("-m", "deployments.local", command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def python(self, script: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=PROJECT_ROOT,
            env=child_environment.build_child_environment(services.ensure_servers()),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def read(self) -> dict[str, Any]:
        return json.loads(self.python(READ).splitlines()[-1])

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=PROJECT_ROOT,
            env=child_environment.build_child_environment(services.ensure_servers()),
            capture_output=True,
            text=True,
        )

    def processes(self) -> dict[str, psutil.Process]:
        rows = json.loads((self.folder / "data" / "services.json").read_text(encoding="utf-8"))
        return {row["name"]: psutil.Process(row["pid"]) for row in rows}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    (folder / "probe_flow.py").write_text(FLOW, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALIPERT_DATA", str(folder / "data"))
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("PROBE", str(folder / "probe.txt"))
        patch.setenv("COLUMNS", "120")
        try:
            yield Stack(folder, Stack(folder, "").local("up"))
        finally:
            services.stop()


def test_up_prints_both_addresses_and_what_to_type(stack: Stack) -> None:
    addresses = services.ensure_servers()
    for text in (addresses.prefect, addresses.mlflow, "Model training", "prefect deployment run benchmark/demo"):
        assert text in stack.first
    # The project's prefect.toml is about its own data folder only.
    assert 'eval "$(calipert env)"' in stack.first


def test_up_registers_the_whole_table(stack: Stack) -> None:
    found = stack.read()
    registered = {
        f"{found['flows'][one['flow_id']]}/{one['name']}": one
        for one in found["deployments"]
        if "calipert" in one["tags"]
    }
    assert set(registered) == {row.full_name for row in build_table()}
    one = registered["benchmark/demo"]
    assert one["entrypoint"] == "flows.benchmark.benchmark"
    assert one["parameters"] == {"dataset": "demo"}
    assert "dataset" in one["parameter_openapi_schema"]["properties"]
    assert one["enforce_parameter_schema"] is True
    assert one["work_pool_name"] == "cpu"
    assert found["pools"] == {"cpu": ["process", None], "gpu": ["process", count_trainings_at_once()]}
    assert f"{len(build_table())} deployments: {len(build_table())} new, 0 changed" in stack.first


def test_a_second_up_starts_nothing_twice_and_keeps_schedules(stack: Stack) -> None:
    before = stack.processes()
    assert set(before) == {"prefect", "mlflow", "worker-cpu", "worker-gpu"}
    made = stack.prefect("deployment", "schedule", "create", "benchmark/demo", "--cron", "0 4 * * *")
    assert made.returncode == 0, made.stdout
    # `updated` changes with every change of a deployment.
    stamps = {one["id"]: one["updated"] for one in stack.read()["deployments"]}
    assert f"{len(build_table())} deployments: 0 new, 0 changed" in stack.local("up")
    assert stack.processes() == before
    after = stack.read()["deployments"]
    assert {one["id"]: one["updated"] for one in after} == stamps
    crons = {schedule["schedule"]["cron"]: schedule["active"] for one in after for schedule in one["schedules"]}
    assert crons == {"0 4 * * *": True, "0 3 * * 0": False}


@pytest.mark.parametrize("pool", ["cpu", "gpu"])
def test_the_workers_run_deployments_in_the_projects_folder(stack: Stack, pool: str) -> None:
    stack.python(REGISTER.replace('"cpu"', f'"{pool}"'))
    (stack.folder / "probe.txt").unlink(missing_ok=True)
    done = stack.prefect("deployment", "run", "probe/demo", "--watch")
    assert done.returncode == 0, done.stdout
    found = (stack.folder / "probe.txt").read_text(encoding="utf-8")
    assert found == f"{PROJECT_ROOT} demo {services.ensure_servers().mlflow}"


def test_parameters_of_a_wrong_type_are_refused_at_submission(stack: Stack) -> None:
    stack.python(REGISTER)
    done = stack.prefect("deployment", "run", "probe/demo", "--param", "seconds=soon")
    assert done.returncode == 1
    assert re.search(r"seconds.*'soon' is not of type 'number'", " ".join(done.stdout.split()))


def test_models_are_given_as_json_and_a_wrong_name_is_refused(stack: Stack) -> None:
    # Far ahead: this is about what is taken, not about running it.
    later = ("deployment", "run", "benchmark/demo", "--start-in", "10 hours", "--param")
    assert stack.prefect(*later, 'models=["fmlp_coexpression","ridge_coexpression"]').returncode == 0
    done = stack.prefect(*later, 'models=["fmlp_coexpression","ridge_coexpresion"]')
    assert done.returncode == 1
    assert "'ridge_coexpresion' is not one of ['base', 'demo', 'simple'," in " ".join(done.stdout.split())
    assert "Traceback" not in done.stdout + done.stderr


def test_down_ends_running_flows_as_crashed_and_leaves_no_process(stack: Stack) -> None:
    stack.python(REGISTER)
    probe = stack.folder / "probe.txt"
    probe.unlink(missing_ok=True)
    assert (
        stack.prefect("deployment", "run", "probe/demo", "--param", "seconds=600", "--flow-run-name", "long").returncode
        == 0
    )
    deadline = time.monotonic() + 120
    while not probe.exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    tree = [one for root in stack.processes().values() for one in (root, *root.children(recursive=True))]
    assert len(tree) >= 6
    printed = stack.local("down")
    assert set(re.findall(r"[\w-]+", printed.partition(":")[2])) == {"prefect", "mlflow", "worker-cpu", "worker-gpu"}
    assert [one for one in tree if one.is_running()] == []
    assert "nothing was running" in stack.local("down")
    assert stack.local("status").count("stopped") == 4
    with closing(sqlite3.connect(stack.folder / "data" / "prefect" / "prefect.db")) as database:
        states = database.execute("SELECT state_name FROM flow_run WHERE name = 'long'").fetchall()
    assert states == [("Crashed",)]


def test_an_error_that_the_user_can_mend_is_shown_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path / "nowhere"))
    command = [sys.executable, "-m", "deployments.local", "up"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "remedy" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()
