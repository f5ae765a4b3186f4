"""Slight servers stand for any process that outlives its starter: how they are found again and ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from blocks.services import daemons
from blocks.services import stack as services
from tests.helpers.slight_servers import FAKE, fake, recorded, running, serve_with


def test_stop_ends_the_whole_tree_even_without_its_root_and_nothing_else(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        serve_with(monkeypatch, lambda port: fake(port, "--helper"))
        services.ensure_servers()
        roots = recorded(data)
        helpers = [child for root in roots.values() for child in root.children()]
        assert len(helpers) == 2
        roots["mlflow"].kill()
        roots["mlflow"].wait(10)
        services.stop()
        assert running([*roots.values(), *helpers]) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_process_that_ignores_the_request_to_end_is_killed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{FAKE}"
    serve_with(monkeypatch, lambda port: ["-c", stubborn, str(port)])
    monkeypatch.setattr(daemons, "STOP_TIMEOUT", 0.1)
    monkeypatch.setattr(daemons, "LAST_TIMEOUT", 0.5)
    services.ensure_servers()
    processes = list(recorded(data).values())
    services.stop()
    assert running(processes) == []


def test_a_recycled_pid_is_not_taken_for_the_service(data: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        created = psutil.Process(bystander.pid).create_time()
        row = {"name": "prefect", "pid": bystander.pid, "created": created - 100, "port": 1, "command": []}
        data.mkdir()
        (data / "services.json").write_text(json.dumps([row]), encoding="utf-8")
        assert {one.state for one in services.status()} == {"stopped"}
        assert services.stop() == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_process_that_may_not_be_looked_at_is_not_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    this = psutil.Process()
    record = daemons.Record("prefect", this.pid, this.create_time(), 1, [])
    assert daemons.is_alive(record)

    def refuse(process: psutil.Process) -> str:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "status", refuse)
    assert not daemons.is_alive(record)
    assert not daemons.is_listening(record)


@pytest.mark.parametrize("lose", [lambda path: path.unlink(), lambda path: path.write_text('[{"name": "prefect"}]')])
def test_services_are_known_without_their_record_too(
    fakes: Path, lose: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    services.ensure_servers()
    first = list(recorded(fakes).values())
    lose(fakes / "services.json")
    services.ensure_servers()
    second = list(recorded(fakes).values())
    assert running(first) == []
    assert len(running(second)) == 2
    lose(fakes / "services.json")
    assert sorted(services.stop()) == ["mlflow", "prefect"]
    assert running(second) == []
    assert all("is unreadable" in record.getMessage() for record in caplog.records)


def test_services_of_another_data_folder_are_left_alone(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = services.ensure_servers()
    with monkeypatch.context() as patch:
        patch.setenv("CALIPERT_DATA", str(tmp_path / "other"))
        other = services.ensure_servers()
        assert {other.prefect, other.mlflow}.isdisjoint({found.prefect, found.mlflow})
        assert sorted(services.stop()) == ["mlflow", "prefect"]
    assert services.ensure_servers() == found
    assert len(running(list(recorded(fakes).values()))) == 2
