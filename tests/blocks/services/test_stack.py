from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from blocks.config import child_environment
from blocks.config.child_environment import Services
from blocks.config.paths import PROJECT_ROOT
from blocks.services import daemons
from blocks.services import stack as services
from blocks.services.loopback import find_free_port, is_free_port
from core.errors import UserError
from tests.helpers.slight_servers import FAKE, fake, recorded, running, serve_with

# Starting, with slight servers


def test_servers_start_once_and_stop(fakes: Path) -> None:
    found = services.ensure_servers()
    assert found.prefect.startswith("http://127.0.0.1:")
    assert found.prefect_api == f"{found.prefect}/api"
    assert found.prefect != found.mlflow
    processes = recorded(fakes)
    assert services.ensure_servers() == found
    assert recorded(fakes) == processes
    assert [(one.name, one.state, one.url) for one in services.status()] == [
        ("prefect", "running", found.prefect),
        ("mlflow", "running", found.mlflow),
        ("worker-cpu", "stopped", None),
        ("worker-gpu", "stopped", None),
    ]
    assert "fake server starts" in (fakes / "logs" / "prefect.log").read_text(encoding="utf-8")
    assert sorted(services.stop()) == ["mlflow", "prefect"]
    assert running(list(processes.values())) == []
    assert json.loads((fakes / "services.json").read_text(encoding="utf-8")) == []
    assert [one.state for one in services.status()] == ["stopped"] * 4
    assert services.stop() == []


def test_a_server_lives_in_a_session_of_its_own_and_listens_on_the_loopback_only(fakes: Path) -> None:
    services.ensure_servers()
    for process in recorded(fakes).values():
        assert os.getsid(process.pid) == process.pid
        addresses = {connection.laddr.ip for connection in process.net_connections() if not connection.raddr}
        assert addresses == {"127.0.0.1"}


def test_the_preferred_port_is_taken_if_free_else_another(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other, socket.socket() as free:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        free.bind(("127.0.0.1", 0))
        wanted = free.getsockname()[1]
        free.close()
        rows = (replace(services.SERVERS[0], port=wanted), replace(services.SERVERS[1], port=taken))
        monkeypatch.setattr(services, "SERVERS", rows)
        found = services.ensure_servers()
    assert found.prefect == f"http://127.0.0.1:{wanted}"
    assert found.mlflow != f"http://127.0.0.1:{taken}"


def test_another_programs_answer_on_the_port_is_not_taken_for_the_servers(
    fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    other = subprocess.Popen([sys.executable, *fake(port)])
    try:
        wait_for(lambda: not is_free_port(port))
        ports = iter([port, port])
        monkeypatch.setattr(services, "find_free_port", lambda wanted: next(ports, None) or find_free_port(wanted))
        found = services.ensure_servers()
        assert str(port) not in found.prefect + found.mlflow
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_killed_server_is_replaced_at_its_port_and_the_other_left_alone(fakes: Path) -> None:
    found = services.ensure_servers()
    before = recorded(fakes)
    before["prefect"].kill()
    before["prefect"].wait(10)
    assert services.ensure_servers() == found
    after = recorded(fakes)
    assert after["mlflow"] == before["mlflow"]
    assert after["prefect"] != before["prefect"]
    assert (fakes / "logs" / "prefect.previous.log").exists()


def test_one_being_started_by_a_process_that_died_is_waited_for(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = f"import time; time.sleep(1)\n{FAKE}"
    serve_with(monkeypatch, lambda port: ["-c", slow, str(port)])
    with monkeypatch.context() as patch:
        patch.setattr(services, "_healthy", interrupted_when_started(fakes))
        with pytest.raises(KeyboardInterrupt):
            services.ensure_servers()
    before = recorded(fakes)
    assert set(before) == {"prefect", "mlflow"}
    services.ensure_servers()
    assert recorded(fakes) == before


def interrupted_when_started(data: Path) -> Callable[..., bool]:
    def check(record: object, server: object) -> bool:
        if (data / "services.json").exists() and len(recorded(data)) == 2:
            raise KeyboardInterrupt
        return False

    return check


def test_a_server_that_ends_at_once_is_an_error_with_its_last_words(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "\n".join(f"line {number}" for number in range(30))
    serve_with(monkeypatch, lambda port: ["-c", f"import sys; sys.exit('''{words}''')"])
    with pytest.raises(UserError, match=r"has ended[\s\S]*line 29") as caught:
        services.ensure_servers()
    assert caught.value.where in {str(data / "logs" / "prefect.log"), str(data / "logs" / "mlflow.log")}
    assert "line 9\n" not in str(caught.value)
    assert recorded(data) == {}


def test_a_server_that_never_answers_is_an_error_and_is_ended(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[psutil.Process] = []
    launch = daemons.start_service

    def spied(*arguments: object) -> object:
        record = launch(*arguments)  # type: ignore[arg-type]
        started.append(psutil.Process(record.pid))
        return record

    monkeypatch.setattr(daemons, "start_service", spied)
    serve_with(monkeypatch, lambda port: ["-c", "import time; time.sleep(600)"])
    with pytest.raises(UserError, match="no answer within 1 s"):
        services.ensure_servers(timeout=1)
    assert len(started) == 2
    assert running(started) == []
    assert recorded(data) == {}


def test_a_server_that_is_busy_when_the_other_fails_is_left_alone(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services.ensure_servers()
    processes = recorded(fakes)
    processes["mlflow"].kill()
    processes["mlflow"].wait(10)
    launched: list[str] = []
    launch, healthy = services._launch_server, services._healthy

    def launch_idle(records: daemons.Records, server: services._Server, port: int) -> None:
        launched.append(server.name)
        launch(records, replace(server, command=lambda port: ["-c", "import time; time.sleep(600)"]), port)

    monkeypatch.setattr(services, "_launch_server", launch_idle)
    monkeypatch.setattr(services, "_healthy", lambda *of: not launched and healthy(*of))
    with pytest.raises(UserError, match="mlflow"):
        services.ensure_servers(timeout=0.2)
    assert launched == ["mlflow"]
    assert recorded(fakes) == {"prefect": processes["prefect"]}
    assert running([processes["prefect"]])


def test_simultaneous_starters_start_nothing_twice(fakes: Path) -> None:
    script = f"""
from dataclasses import replace
from blocks.services import stack as services
rows = tuple(replace(row, port=0, command=lambda port: ["-c", {FAKE!r}, str(port)]) for row in services.SERVERS)
services.SERVERS = rows
print(services.ensure_servers())
"""
    command = [sys.executable, "-c", script]
    starters = [subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {starter.communicate(timeout=120)[0] for starter in starters}
    assert answers == {f"{services.ensure_servers()}\n"}


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Settings

ADDRESSES = Services("http://127.0.0.1:4321", "http://127.0.0.1:5432")


def test_importing_services_is_quick() -> None:
    script = "import sys, blocks.services.stack; print({'prefect', 'mlflow', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_a_childs_environment_has_none_of_the_users_settings(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    monkeypatch.setenv("NO_PROXY", "intranet,localhost")
    monkeypatch.setenv("KEPT", "yes")
    child = child_environment.build_child_environment(ADDRESSES)
    assert "secret" not in child.values()
    assert child["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert child["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5432"
    assert child["PREFECT_HOME"] == str(data / "prefect")
    assert child["NO_PROXY"] == "intranet,localhost,127.0.0.1"
    assert child["KEPT"] == "yes"


def test_exports_make_a_shell_use_the_servers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    awkward = data.parent / "it's a folder"
    monkeypatch.setenv("CALIPERT_DATA", str(awkward))
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    script = f"eval {shlex.quote(child_environment.format_exports(ADDRESSES))}; env -0"
    done = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    shell = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    assert "PREFECT_API_KEY" not in shell
    assert child_environment.build_environment(ADDRESSES).items() <= shell.items()
    assert shell["PREFECT_HOME"] == str(awkward / "prefect")


ADOPT = """
from blocks.config import child_environment
addresses = child_environment.Services("http://127.0.0.1:4321", "http://127.0.0.1:5432")
{before}
child_environment.use_servers(addresses)
import prefect.settings
current = prefect.settings.get_current_settings()
print(current.api.url, current.api.key, current.server.ephemeral.enabled, current.worker.query_seconds, current.home)
child_environment.use_servers(addresses)
"""


def test_adopt_sets_the_process_up_before_prefect_is_imported(data: Path) -> None:
    environment = os.environ | {"PREFECT_API_KEY": "secret"}
    command = [sys.executable, "-c", ADOPT.format(before="")]
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["http://127.0.0.1:4321/api", "None", "False", "2.0", str(data / "prefect")]
    late = [sys.executable, "-c", ADOPT.format(before="import prefect")]
    done = subprocess.run(late, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: prefect was imported before" in done.stderr


def test_prefect_toml_is_written_for_the_projects_own_data_folder_only(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toml = tmp_path / "prefect.toml"
    monkeypatch.setattr(child_environment, "PREFECT_TOML", toml)
    services.ensure_servers()
    assert not toml.exists()
    monkeypatch.setattr(child_environment, "DEFAULT_DATA", fakes)
    found = services.ensure_servers()
    script = """
import prefect.settings
settings = prefect.settings.get_current_settings()
print(settings.home, settings.profiles_path, settings.api.url)
print(settings.api.key, settings.server.analytics_enabled, settings.server.ephemeral.enabled)
"""
    home = tmp_path / "home"
    (home / ".prefect").mkdir(parents=True)
    profile = 'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://elsewhere/api"\nPREFECT_API_KEY = "k"\n'
    (home / ".prefect" / "profiles.toml").write_text(profile, encoding="utf-8")
    bare = {"HOME": str(home), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=bare, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [
        *(str(fakes / "prefect"), str(fakes / "prefect" / "profiles.toml"), found.prefect_api),
        *("None", "False", "False"),
    ]
    assert [path.name for path in home.rglob("*")] == [".prefect", "profiles.toml"]
    assert (home / ".prefect" / "profiles.toml").read_text(encoding="utf-8") == profile


def test_a_prefect_toml_of_the_users_own_is_not_overwritten(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toml = tmp_path / "prefect.toml"
    toml.write_text("home = '/mine'\n", encoding="utf-8")
    monkeypatch.setattr(child_environment, "PREFECT_TOML", toml)
    monkeypatch.setattr(child_environment, "DEFAULT_DATA", fakes)
    with pytest.raises(UserError, match="that calipert did not write"):
        services.ensure_servers()
    assert toml.read_text(encoding="utf-8") == "home = '/mine'\n"
    assert not (fakes / "services.json").exists()


# The real servers
