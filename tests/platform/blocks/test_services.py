"""The real servers, as they are started on one machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blocks.config import child_environment
from blocks.config.child_environment import Services
from blocks.config.paths import PROJECT_ROOT
from blocks.services import stack as services
from tests.helpers.slight_servers import recorded, running


def python(script: str, addresses: Services) -> str:
    """What a child process prints that uses the servers."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=PROJECT_ROOT,
        env=child_environment.build_child_environment(addresses),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, Path, Path]]:
    """Both servers, started by a user whose own Prefect profile and variables point elsewhere."""
    folder = tmp_path_factory.mktemp("real")
    data, home = folder / "data", folder / "home"
    (home / ".prefect").mkdir(parents=True)
    profile = 'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n'
    (home / ".prefect" / "profiles.toml").write_text(profile, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALIPERT_DATA", str(data))
        patch.setenv("HOME", str(home))
        patch.setenv("PREFECT_PROFILE", "mine")
        patch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:////nowhere/other.db")
        patch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setattr(services, "SERVERS", tuple(replace(server, port=0) for server in services.SERVERS))
        try:
            yield services.ensure_servers(), data, home
        finally:
            services.stop()


def test_prefect_uses_the_private_server_alone(real: tuple[Services, Path, Path]) -> None:
    addresses, data, home = real
    script = """
import json
from prefect import flow, get_client
from prefect.automations import Automation

@flow
def hello():
    return 1

hello()
with get_client(sync_client=True) as client:
    settings = client.request("GET", "/admin/settings").json()
    runs = client.read_flow_runs()
    automations = client.request("POST", "/automations/filter", json={}).json()
print(json.dumps([settings, [run.state.name for run in runs], automations]))
"""
    settings, states, automations = json.loads(python(script, addresses).splitlines()[-1])
    assert states == ["Completed"]
    assert settings["home"] == str(data / "prefect")
    assert settings["server"]["analytics_enabled"] is False
    assert settings["server"]["ui"]["api_url"] == addresses.prefect_api
    assert settings["server"]["concurrency"]["lease_storage"].endswith("lease_storage.filesystem")
    assert (data / "prefect" / "prefect.db").exists()
    assert [one["name"] for one in automations] == [services.SILENT_RUNS["name"]]
    assert [path.name for path in home.rglob("*")] == [".prefect", "profiles.toml"]


def test_mlflow_keeps_runs_and_artifacts_under_the_data_folder(real: tuple[Services, Path, Path]) -> None:
    addresses, data, _ = real
    script = """
import mlflow
with mlflow.start_run() as run:
    mlflow.log_metric("mse", 0.5)
    mlflow.log_text("hello", "greeting.txt")
print(run.info.run_id)
"""
    run = python(script, addresses).split()[-1]
    greetings = list((data / "mlflow" / "artifacts").rglob("greeting.txt"))
    assert [path.read_text(encoding="utf-8") for path in greetings] == ["hello"]
    assert run in str(greetings[0])
    assert (data / "mlflow" / "mlflow.db").exists()


def test_what_a_killed_server_leaves_is_ended_before_another_starts(real: tuple[Services, Path, Path]) -> None:
    addresses, data, _ = real
    roots = recorded(data)
    tree = {name: [root, *root.children(recursive=True)] for name, root in roots.items()}
    # More would be idle helpers of hundreds of megabytes.
    assert {name: len(processes) for name, processes in tree.items()} == {"prefect": 1, "mlflow": 2}
    roots["mlflow"].kill()
    roots["mlflow"].wait(10)
    assert len(running(tree["mlflow"])) == 1
    assert services.ensure_servers() == addresses
    assert running(tree["mlflow"]) == []
    assert recorded(data)["prefect"] == roots["prefect"]
