from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from blocks import gpus, services, settings
from blocks.paths import PROJECT_ROOT
from blocks.settings import Services
from core.catalog import registry
from core.errors import UserError
from tasks import inputs

# A server as slight as can be: the machinery around it is what most tests are about.
FAKE = """
import subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[1]")
    do_POST = do_GET

print("fake server starts", flush=True)
if "--helper" in sys.argv:
    # In a session of its own, as Prefect's worker runs its flows.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def fake(port: int, *extra: str) -> list[str]:
    return ["-c", FAKE, str(port), *extra]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data folder of its own; whatever a test starts there is ended with it."""
    folder = tmp_path / "data"
    monkeypatch.setenv("CALIPERT_DATA", str(folder))
    yield folder
    services.stop()


@pytest.fixture
def fakes(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slight servers on any free port in place of Prefect's and MLflow's."""
    serve_with(monkeypatch, fake)
    return data


def serve_with(monkeypatch: pytest.MonkeyPatch, command: Callable[[int], list[str]]) -> None:
    rows = tuple(replace(server, port=0, command=command) for server in services.SERVERS)
    monkeypatch.setattr(services, "SERVERS", rows)


def recorded(data: Path) -> dict[str, psutil.Process]:
    rows = json.loads((data / "services.json").read_text(encoding="utf-8"))
    return {row["name"]: psutil.Process(row["pid"]) for row in rows}


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def python(script: str, addresses: Services) -> str:
    """What a child process prints that uses the servers."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=PROJECT_ROOT,
        env=settings.child_environment(addresses),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
        wait_for(lambda: not services._bindable(port))
        chosen = services._free_port
        ports = iter([port, port])
        monkeypatch.setattr(services, "_free_port", lambda wanted: next(ports, None) or chosen(wanted))
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
    launch = services._launch

    def spied(*arguments: object) -> object:
        record = launch(*arguments)  # type: ignore[arg-type]
        started.append(psutil.Process(record.pid))
        return record

    monkeypatch.setattr(services, "_launch", spied)
    serve_with(monkeypatch, lambda port: ["-c", "import time; time.sleep(600)"])
    with pytest.raises(UserError, match="no answer within 1 s"):
        services.ensure_servers(timeout=1)
    assert len(started) == 2
    assert running(started) == []
    assert recorded(data) == {}


def test_simultaneous_starters_start_nothing_twice(fakes: Path) -> None:
    script = f"""
from dataclasses import replace
from blocks import gpus, services, settings
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


# The workers

IDLE = "import time; time.sleep(600)"


@pytest.fixture
def workers(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, psutil.Process]]:
    """Ensures workers that do nothing, of all pools or of those given, and gives their processes."""
    launch = services._launch

    def idle(name: str, arguments: list[str], *rest: object) -> object:
        script = ["-c", IDLE] if name.startswith("worker") else []
        return launch(name, [*script, *arguments], *rest)  # type: ignore[arg-type]

    def ensure(*pools: str, **options: float) -> dict[str, psutil.Process]:
        services.ensure_workers(services.ensure_servers(), *([pools] if pools else []), **options)
        return {name: process for name, process in recorded(fakes).items() if name.startswith("worker")}

    monkeypatch.setattr(services, "_launch", idle)
    monkeypatch.setattr(services, "_heard_of", lambda *_: True)
    monkeypatch.setattr(services, "_end_lost_runs", lambda *_: None)
    return ensure


@pytest.mark.parametrize(
    ("others", "ended"),
    [
        ([], {"a": "CRASHED", "b": "CRASHED", "c": "CANCELLED"}),
        ([{"name": "local-gpu-1234abcd", "status": "ONLINE"}], {"a": "CRASHED", "b": "CRASHED", "c": "CANCELLED"}),
        ([{"name": "elsewhere", "status": "OFFLINE"}], {"a": "CRASHED", "b": "CRASHED", "c": "CANCELLED"}),
        ([{"name": "elsewhere", "status": "ONLINE"}], {}),
    ],
)
def test_runs_of_a_killed_worker_are_ended_unless_they_may_be_of_another_one(
    monkeypatch: pytest.MonkeyPatch, others: list[dict[str, str]], ended: dict[str, str]
) -> None:
    runs = [
        {"id": "a", "state_type": "RUNNING"},
        {"id": "b", "state_type": "PENDING"},
        {"id": "c", "state_type": "CANCELLING"},
    ]
    said: dict[str, str] = {}

    def ask(url: str, body: dict[str, Any]) -> bytes:
        if url.endswith("/work_pools/gpu/workers/filter"):
            return json.dumps(others).encode()
        if url.endswith("/flow_runs/filter"):
            assert body["work_pools"] == {"name": {"any_": ["gpu"]}}
            return json.dumps(runs[body["offset"] :]).encode()
        assert body["force"] is True
        said[url.split("/")[-2]] = body["state"]["type"]
        return b"{}"

    monkeypatch.setattr(services, "_ask", ask)
    services._end_lost_runs(Services("http://a", "http://b"), "gpu")
    assert said == ended


def test_every_pool_has_one_worker(workers: Callable[..., dict[str, psutil.Process]]) -> None:
    cpu = workers("cpu")
    assert set(cpu) == {"worker-cpu"}
    both = workers()
    assert set(both) == {"worker-cpu", "worker-gpu"}
    assert both["worker-cpu"] == cpu["worker-cpu"]
    assert workers() == both
    for name, process in both.items():
        command = process.cmdline()
        assert name == f"worker-{command[command.index('--pool') + 1]}"
    assert [(one.name, one.state) for one in services.status()][2:] == [
        ("worker-cpu", "running"),
        ("worker-gpu", "running"),
    ]
    assert sorted(services.stop()) == ["mlflow", "prefect", "worker-cpu", "worker-gpu"]
    assert running(list(both.values())) == []


def test_only_the_worker_that_died_is_replaced(workers: Callable[..., dict[str, psutil.Process]]) -> None:
    before = workers()
    before["worker-gpu"].kill()
    before["worker-gpu"].wait(10)
    after = workers()
    assert after["worker-cpu"] == before["worker-cpu"]
    assert after["worker-gpu"] != before["worker-gpu"]


def test_a_worker_that_the_server_does_not_hear_of_is_ended_and_the_others_go_on(
    workers: Callable[..., dict[str, psutil.Process]], fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "_heard_of", lambda addresses, pool, name: pool == "cpu")
    with pytest.raises(UserError, match="worker-gpu service"):
        workers(timeout=1)
    assert set(recorded(fakes)) == {"prefect", "mlflow", "worker-cpu"}
    assert running([recorded(fakes)["worker-cpu"]])


def test_a_worker_of_a_pool_that_is_no_more_is_stopped_too(
    workers: Callable[..., dict[str, psutil.Process]],
) -> None:
    process = workers("former")["worker-former"]
    assert sorted(services.stop()) == ["mlflow", "prefect", "worker-former"]
    assert running([process]) == []


@pytest.mark.parametrize(
    "variable", [registry.VARIABLE, f"{inputs.VARIABLE}NORMAN19", "CALIPERT_STORE", gpus.GPUS, gpus.LOCKS, gpus.VISIBLE]
)
def test_a_worker_is_replaced_when_the_users_files_are_named_otherwise(
    workers: Callable[..., dict[str, psutil.Process]], fakes: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    def worker() -> psutil.Process:
        return workers("cpu")["worker-cpu"]

    monkeypatch.delenv(variable, raising=False)
    first = worker()
    servers = [recorded(fakes)[name] for name in ("prefect", "mlflow")]
    monkeypatch.setenv("UNRELATED", "changed")
    assert worker() == first
    seen = [first]
    for value in ("/private/one", "/private/two"):
        monkeypatch.setenv(variable, value)
        seen.append(worker())
        assert worker() == seen[-1]
        assert seen[-1].environ()[variable] == value
        assert running(seen) == seen[-1:]
    assert "private" not in (fakes / "services.json").read_text(encoding="utf-8")
    monkeypatch.delenv(variable)
    last = worker()
    assert running(seen) == []
    assert variable not in last.environ()
    assert running(servers) == servers


# Stopping


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
    monkeypatch.setattr(services, "STOP_TIMEOUT", 0.1)
    monkeypatch.setattr(services, "LAST_TIMEOUT", 0.5)
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


# Settings

ADDRESSES = Services("http://127.0.0.1:4321", "http://127.0.0.1:5432")


def test_importing_services_is_quick() -> None:
    script = "import sys, blocks.services; print({'prefect', 'mlflow', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_a_childs_environment_has_none_of_the_users_settings(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    monkeypatch.setenv("NO_PROXY", "intranet,localhost")
    monkeypatch.setenv("KEPT", "yes")
    child = settings.child_environment(ADDRESSES)
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
    script = f"eval {shlex.quote(settings.exports(ADDRESSES))}; env -0"
    done = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    shell = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    assert "PREFECT_API_KEY" not in shell
    assert settings.environment(ADDRESSES).items() <= shell.items()
    assert shell["PREFECT_HOME"] == str(awkward / "prefect")


ADOPT = """
from blocks import settings
addresses = settings.Services("http://127.0.0.1:4321", "http://127.0.0.1:5432")
{before}
settings.adopt(addresses)
import prefect.settings
current = prefect.settings.get_current_settings()
print(current.api.url, current.api.key, current.server.ephemeral.enabled, current.worker.query_seconds, current.home)
settings.adopt(addresses)
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
    monkeypatch.setattr(settings, "PREFECT_TOML", toml)
    services.ensure_servers()
    assert not toml.exists()
    monkeypatch.setattr(settings, "DEFAULT_DATA", fakes)
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
    monkeypatch.setattr(settings, "PREFECT_TOML", toml)
    monkeypatch.setattr(settings, "DEFAULT_DATA", fakes)
    with pytest.raises(UserError, match="that calipert did not write"):
        services.ensure_servers()
    assert toml.read_text(encoding="utf-8") == "home = '/mine'\n"
    assert not (fakes / "services.json").exists()


# The real servers


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


@pytest.mark.server
@pytest.mark.slow
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


@pytest.mark.server
@pytest.mark.slow
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


@pytest.mark.server
@pytest.mark.slow
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
