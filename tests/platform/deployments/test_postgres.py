"""The servers of a group as compose.yaml starts them, on a real PostgreSQL, with passwords, and a benchmark on them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from blocks.config.paths import PROJECT_ROOT
from tests.helpers.leftovers import SESSION
from tests.helpers.tiny_screen import ENTRY, SETTINGS

START_LIMIT_S = 180
HEALTH = {"prefect": "/api/health", "mlflow": "/health"}
MODELS = ["ridge_coexpression"]
FOLDS = ENTRY["folds"]
BENCHMARK = """
import json, sys
from flows.benchmark import benchmark
print("RESULT", benchmark(**json.loads(sys.argv[1])))
"""


@dataclass(frozen=True)
class Group:
    """The running servers. ports: of the services, by name. services: of compose.yaml, with the passwords."""

    folder: Path
    ports: dict[str, int]
    services: dict[str, Any]
    passwords: dict[str, str]

    def url(self, service: str, path: str = "") -> str:
        return f"http://127.0.0.1:{self.ports[service]}{path}"

    def log(self, service: str) -> Path:
        return self.folder / f"{service}.log"

    def command(self, service: str) -> list[str]:
        """The command of a service of compose.yaml, for this machine."""
        program, *arguments = [self._here(part) for part in self.services[service]["command"]]
        return [str(Path(sys.executable).with_name(program)), *arguments]

    def environment(self, service: str, data: str = "home") -> dict[str, str]:
        """The environment of a service of compose.yaml, for this machine, with a data folder of this name."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "CALIPERT_SHARED", SESSION) if name in os.environ}
        place = self.folder / service / data
        place.mkdir(parents=True, exist_ok=True)
        named = {name: value for name, value in self.services[service]["environment"].items() if value}
        own = {name: self._here(value).replace("/data/", f"{place}/") for name, value in named.items()}
        # As the image has them.
        image = {"CALIPERT_DATA": str(place), "PREFECT_HOME": str(place / "prefect"), "HOME": str(place)}
        return kept | image | {"PYTHONPATH": str(PROJECT_ROOT), "NO_PROXY": "127.0.0.1"} | own

    def run(self, service: str, command: list[str], data: str = "home") -> str:
        """What a command prints that ends well in the environment of a service."""
        done = subprocess.run(
            command,
            env=self.environment(service, data),
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout

    def sql(self, user: str, database: str, query: str) -> subprocess.CompletedProcess[str]:
        """A query as one of the servers' roles, over TCP with its password."""
        password = self.passwords[f"{user.upper()}_DATABASE_PASSWORD"]
        address = f"postgresql://{user}@127.0.0.1:{self.ports['postgres']}/{database}"
        return subprocess.run(
            ["psql", address, "--no-psqlrc", "--tuples-only", "--no-align", "--command", query],
            env={"PATH": os.environ["PATH"], "PGPASSWORD": password},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    @property
    def prefect_auth(self) -> tuple[str, str]:
        return "calipert", self.passwords["PREFECT_PASSWORD"]

    @property
    def worker_auth(self) -> tuple[str, str]:
        return "worker", self.passwords["MLFLOW_WORKER_PASSWORD"]

    def flow_runs(self) -> list[dict[str, Any]]:
        answer = httpx.post(self.url("prefect", "/api/flow_runs/filter"), json={}, auth=self.prefect_auth, timeout=60)
        return list(answer.raise_for_status().json())

    def mlflow_runs(self) -> list[dict[str, Any]]:
        api = self.url("mlflow", "/api/2.0/mlflow")
        found = httpx.post(f"{api}/experiments/search", json={"max_results": 100}, auth=self.worker_auth, timeout=60)
        ids = [one["experiment_id"] for one in found.raise_for_status().json()["experiments"]]
        runs = httpx.post(f"{api}/runs/search", json={"experiment_ids": ids}, auth=self.worker_auth, timeout=60)
        return list(runs.raise_for_status().json().get("runs", []))

    def _here(self, text: str) -> str:
        """A text of compose.yaml with the addresses and folders of this machine."""
        here = {"0.0.0.0": "127.0.0.1", "postgres": "127.0.0.1", "/app/": f"{PROJECT_ROOT}/"}  # noqa: S104
        if text in here:
            return here[text]
        inside = {"postgres": "5432", "s3": "7070", "prefect": "4200", "mlflow": "5000"}
        for service, port in inside.items():
            text = re.sub(rf"(?<![\w:/.]){service}(?=:{port}\b)|(?<=//){service}(?=:{port}\b)", "127.0.0.1", text)
        ports = {port: str(self.ports[service]) for service, port in inside.items()}
        text = re.sub(r"(?<!\d)(5432|7070|4200|5000)(?!\d)", lambda found: ports[found[1]], text)
        return text.replace("=0.0.0.0", "=127.0.0.1").replace("/app/", f"{PROJECT_ROOT}/")


@pytest.fixture(scope="module")
def group(
    compose: Callable[[Mapping[str, str]], dict[str, Any]],
    passwords: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Group]:
    """PostgreSQL, an S3 store and both servers, prepared as the service `setup` does."""
    from moto.server import ThreadedMotoServer

    programs = _programs()
    ports = {name: _free_port() for name in ("postgres", "prefect", "mlflow")}
    with ExitStack() as stack:
        store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        store.start()
        stack.callback(store.stop)
        ports["s3"] = store.get_host_and_port()[1]
        folder = tmp_path_factory.mktemp("group")
        made = Group(folder, ports, compose(passwords)["services"], passwords)
        stack.enter_context(_postgres(programs, made))
        servers = [(service, stack.enter_context(_server(made, service))) for service in HEALTH]
        for service, process in servers:
            _wait(partial(_answers, made.url(service, HEALTH[service])), process, made.log(service))
        made.run("setup", made.command("setup"))
        yield made


@pytest.fixture(scope="module")
def benchmarked(group: Group) -> list[dict[str, Any]]:
    """Two benchmarks of a small screen on two machines (data folders), by a worker's environment: for each, the folder
    of its results and MLflow's runs after it."""
    from core.simulate import SimulationSettings, simulate

    raw, entry = group.folder / "screen.h5ad", group.folder / "tiny.yaml"
    simulate(SimulationSettings(**SETTINGS)).cells.write_h5ad(raw)
    entry.write_text(yaml.safe_dump(ENTRY), encoding="utf-8")
    parameters = json.dumps({"dataset": str(entry), "models": MODELS, "sources": {"tiny": str(raw)}})
    found = []
    for machine in ("first", "second"):
        printed = group.run("cpu-worker", [sys.executable, "-c", BENCHMARK, parameters], machine)
        results = Path(printed.rpartition("RESULT ")[2].strip())
        found.append({"results": results, "runs": group.mlflow_runs()})
    return found


@pytest.mark.parametrize(
    ("service", "method", "path"),
    [
        ("prefect", "POST", "/api/flow_runs/filter"),
        ("prefect", "POST", "/api/block_documents/filter"),
        ("prefect", "GET", "/api/admin/settings"),
        ("mlflow", "GET", "/"),
        ("mlflow", "POST", "/api/2.0/mlflow/experiments/search"),
        ("mlflow", "POST", "/ajax-api/2.0/mlflow/runs/search"),
        ("mlflow", "GET", "/api/2.0/mlflow-artifacts/artifacts"),
        ("mlflow", "POST", "/graphql"),
    ],
)
def test_who_has_no_password_is_refused(group: Group, service: str, method: str, path: str) -> None:
    for auth in (None, ("calipert", "guessed"), ("admin", "password1234")):
        assert httpx.request(method, group.url(service, path), auth=auth, json={}, timeout=60).status_code == 401, auth


def test_who_has_the_password_is_let_in(group: Group) -> None:
    answer = httpx.get(group.url("prefect", "/api/admin/version"), auth=group.prefect_auth, timeout=60)
    assert answer.status_code == 200
    page = httpx.get(group.url("prefect", "/ui-settings"), timeout=60).json()
    # The page asks for the password, and finds the API under whatever name it was reached.
    assert page["auth"] == "BASIC"
    assert page["api_url"] == "/api"
    assert httpx.get(group.url("mlflow"), auth=group.worker_auth, timeout=60).status_code == 200


def test_mlflow_answers_to_its_own_names_only(group: Group) -> None:
    for host, status in (("127.0.0.1:1", 200), ("evil.example", 403)):
        answer = httpx.get(group.url("mlflow"), auth=group.worker_auth, headers={"Host": host}, timeout=60)
        assert answer.status_code == status, host


def test_the_workers_account_administers_nothing(group: Group) -> None:
    users = group.url("mlflow", "/api/2.0/mlflow/users")
    made = httpx.post(
        f"{users}/create", json={"username": "x", "password": "y" * 12}, auth=group.worker_auth, timeout=60
    )
    assert made.status_code == 403
    risen = httpx.patch(
        f"{users}/update-admin", json={"username": "worker", "is_admin": True}, auth=group.worker_auth, timeout=60
    )
    assert risen.status_code == 403
    admin = ("admin", group.passwords["MLFLOW_ADMIN_PASSWORD"])
    told = httpx.get(f"{users}/list", auth=admin, timeout=60).raise_for_status().json()["users"]
    assert {one["username"]: one["is_admin"] for one in told} == {"admin": True, "worker": False}


def test_preparing_again_changes_nothing(group: Group) -> None:
    def there() -> dict[str, Any]:
        kinds = ("deployments", "work_pools", "automations")
        answers = {
            kind: httpx.post(
                group.url("prefect", f"/api/{kind}/filter"), json={}, auth=group.prefect_auth, timeout=60
            ).json()
            for kind in kinds
        }
        assert {one["name"] for one in answers["work_pools"]} == {"cpu", "gpu"}
        return {kind: sorted(one["id"] for one in answer) for kind, answer in answers.items()}

    before = there()
    assert len(before["deployments"]) > 10
    assert len(before["automations"]) == 1
    group.run("setup", group.command("setup"))
    assert there() == before


def test_each_server_reaches_its_own_database_only(group: Group) -> None:
    assert int(group.sql("prefect", "prefect", "SELECT count(*) FROM deployment").stdout) > 10
    assert "worker" in group.sql("mlflow", "mlflow", "SELECT username FROM users").stdout.split()
    for user, other in (("prefect", "mlflow"), ("mlflow", "prefect")):
        refused = group.sql(user, other, "SELECT 1")
        assert refused.returncode != 0
        assert "permission denied for database" in refused.stderr


def test_a_benchmark_is_recorded_once(group: Group, benchmarked: list[dict[str, Any]]) -> None:
    states = [one["state"]["type"] for one in group.flow_runs() if one["parameters"].get("models") == MODELS]
    assert states == ["COMPLETED", "COMPLETED"]
    first, second = (found["runs"] for found in benchmarked)
    tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in second]
    assert len({one["calipert.key"] for one in tags}) == len(second)
    assert sum("mlflow.parentRunId" in one for one in tags) == FOLDS * len(MODELS)
    assert {run["info"]["status"] for run in second} == {"FINISHED"}
    assert {run["info"]["run_id"] for run in first} == {run["info"]["run_id"] for run in second}
    assert int(group.sql("mlflow", "mlflow", "SELECT count(*) FROM runs").stdout) == len(second)
    assert int(group.sql("prefect", "prefect", "SELECT count(*) FROM flow_run").stdout) == len(group.flow_runs())


def test_files_lie_in_the_s3_store_and_are_handed_out_by_mlflow(
    group: Group, benchmarked: list[dict[str, Any]]
) -> None:
    from mlflow.artifacts import list_artifacts

    environment = group.environment("cpu-worker")
    run = next(run for run in benchmarked[1]["runs"] if run["info"]["run_name"] == "calibration")
    assert run["info"]["artifact_uri"].startswith("mlflow-artifacts:")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(name, environment[name])
        files = list_artifacts(run_id=run["info"]["run_id"], tracking_uri=group.url("mlflow"))
    assert [file.path for file in files] == ["calibration.parquet"]
    assert any(key.endswith(files[0].path) for key in _keys(group, "mlflow"))


def test_a_second_machine_takes_the_artifacts_from_the_s3_store(
    group: Group, benchmarked: list[dict[str, Any]]
) -> None:
    assert any(key.startswith("store/") for key in _keys(group, "calipert"))
    first, second = (found["results"] for found in benchmarked)
    assert first != second
    assert first.name == second.name
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def _keys(group: Group, bucket: str) -> list[str]:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=group.url("s3"),
        region_name="us-east-1",
        aws_access_key_id=group.passwords["S3_ACCESS_KEY"],
        aws_secret_access_key=group.passwords["S3_SECRET_KEY"],
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [one["Key"] for page in pages for one in page.get("Contents", [])]


def _programs() -> Path:
    """The folder of Debian's PostgreSQL, the newest of several."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found or shutil.which("psql") is None:
        pytest.skip("no PostgreSQL in /usr/lib/postgresql (apt-get install postgresql)")
    return found[-1].parent


@contextmanager
def _postgres(programs: Path, group: Group) -> Iterator[None]:
    """A server in a folder of its own, with the databases of compose.yaml, on a free port of 127.0.0.1."""
    # Not among pytest's folders, which no other user may enter; and PostgreSQL does not run as root.
    folder = Path(tempfile.mkdtemp(prefix="calipert-postgres-"))
    owner = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    settings = group.services["postgres"]["environment"]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **settings}
    environment["PGPASSWORD"] = settings["POSTGRES_PASSWORD"]
    secret, data = folder / "password", folder / "data"
    secret.write_text(settings["POSTGRES_PASSWORD"], encoding="ascii")
    if owner:
        for path in (folder, secret):
            shutil.chown(path, "postgres", "postgres")
    port = str(group.ports["postgres"])

    def run(*command: object) -> None:
        done = subprocess.run(
            [str(part) for part in command],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            **owner,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        first = settings["POSTGRES_INITDB_ARGS"].split()
        run(programs / "initdb", *first, "--pgdata", data, "--username=postgres", "--pwfile", secret, "--no-sync")
        listening = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [str(programs / "postgres"), "-D", str(data), "-p", port, *listening],
                env=environment,
                cwd="/",
                stdout=log,
                stderr=log,
                start_new_session=True,
                **owner,  # type: ignore[call-overload]
            )
        try:
            address = f"postgresql://postgres@127.0.0.1:{port}/postgres"
            _wait(lambda: _ready(programs, port), server, folder / "log")
            run("psql", address, "--no-psqlrc", "--file", PROJECT_ROOT / "deployments" / "postgres" / "databases.sql")
            yield
        finally:
            _end(server, signal.SIGINT)
    finally:
        shutil.rmtree(folder)


@contextmanager
def _server(group: Group, service: str) -> Iterator[subprocess.Popen[bytes]]:
    with group.log(service).open("wb") as output:
        process = subprocess.Popen(
            group.command(service),
            env=group.environment(service),
            cwd=group.folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process, signal.SIGTERM)


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not ready():
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes], kind: signal.Signals) -> None:
    """End a process in order, and what is left of its session in any case."""
    process.send_signal(kind)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _ready(programs: Path, port: str) -> bool:
    asked = subprocess.run([str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", port], check=False)
    return asked.returncode == 0


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
