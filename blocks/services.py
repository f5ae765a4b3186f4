"""The private local services: a Prefect server, an MLflow server and a worker per work pool, of this project alone.

They listen on 127.0.0.1, keep everything under the data folder and use none of the user's own Prefect or MLflow
settings. What runs is recorded in services.json. Imports neither prefect nor mlflow, which take seconds.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path

import filelock
import psutil

from blocks.paths import (
    PROJECT_ROOT,
    data_folder,
    logs_folder,
    mlflow_folder,
    prefect_folder,
    services_file,
    temporary_folder,
)
from blocks.pools import CPU, GPU
from blocks.settings import HOST, Services, child_environment, remove_toml, replace_text, require_own_toml, write_toml
from core.errors import UserError

# About 8 s on an idle laptop; much longer on a first start from a slow disk.
START_TIMEOUT = 180.0
# A worker first ends its flow runs, and a server the requests it serves; then they are killed.
STOP_TIMEOUT = 20.0
LAST_TIMEOUT = 5.0
# Inherited by every process that a service starts. Tells them from any other's, even where their parent or the
# record of services is gone.
MARK = "CALIPERT_SERVICE"
# Variables, by how they begin, that name the user's files, store and GPUs. A worker has those with which it was
# started.
NAMING = (
    "AWS_",
    "CALIPERT_CATALOG",
    "CALIPERT_ENGINE",
    "CALIPERT_GPUS",
    "CALIPERT_KUBERNETES",
    "CALIPERT_LOCKS",
    "CALIPERT_MEMORY_GB",
    "CALIPERT_SOURCE_",
    "CALIPERT_STORE",
    "CUDA_VISIBLE_DEVICES",
)

_LOG = logging.getLogger("calipert.services")
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class ServiceStatus:
    """state: "running", "not answering" (a process, but no answer) or "stopped"; url is None for a worker."""

    name: str
    state: str
    url: str | None
    pid: int | None
    log: Path


@dataclass(frozen=True)
class _Record:
    """One started service. A recycled pid is told by its start time (seconds since 1970).
    port: where a server listens; for a worker, where its server does.
    naming: for a worker, a hash of the variables in which it found the user's files and devices named."""

    name: str
    pid: int
    created: float
    port: int
    command: list[str]
    naming: str = ""


@dataclass(frozen=True)
class _Server:
    """name; the port to take if it is free; the path that answers 200 when all is well; the command."""

    name: str
    port: int
    health: str
    command: Callable[[int], list[str]]


def _prefect_command(port: int) -> list[str]:
    return ["-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]


def _mlflow_command(port: int) -> list[str]:
    folder = mlflow_folder()
    return [
        *("-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
        *("--serve-artifacts", "--artifacts-destination", (folder / "artifacts").as_uri()),
        "--uvicorn-opts=--no-access-log",
    ]


SERVERS = (
    _Server("prefect", 4200, "/api/health", _prefect_command),
    _Server("mlflow", 5000, "/health", _mlflow_command),
)
WORKER = "worker-"  # how the names of workers begin; the work pool follows
WORKERS = tuple(f"{WORKER}{pool}" for pool in (CPU, GPU))

# A killed run cannot say so and would be shown as running for ever. Ten heartbeats long, since a run is silent
# too while a long numerical routine holds its interpreter.
SILENT_RUNS = {
    "name": "calipert: a run without a sign of life has crashed",
    "trigger": {
        "type": "event",
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "for_each": ["prefect.resource.id"],
        "after": ["prefect.flow-run.heartbeat"],
        "expect": [
            "prefect.flow-run.heartbeat",
            "prefect.flow-run.Completed",
            "prefect.flow-run.Failed",
            "prefect.flow-run.Cancelled",
            "prefect.flow-run.Crashed",
        ],
        "posture": "Proactive",
        "threshold": 1,
        "within": 300,
    },
    "actions": [
        {
            "type": "change-flow-run-state",
            "state": "CRASHED",
            "message": "No sign of life for five minutes: its process was killed.",
        }
    ],
}


def ensure_servers(timeout: float = START_TIMEOUT) -> Services:
    """Starts what does not run yet, both at once, and returns when both answer.

    Servers outlive the process that started them. Simultaneous callers start nothing twice.
    timeout: seconds to wait for an answer. Raises UserError, with the last lines of the log, if a server ends or
    does not answer in time; it is stopped then, so that the next call starts afresh.
    """
    records = _read()
    if not all(_healthy(records.get(server.name), server) for server in SERVERS):
        with _lock():
            records = _read()
            require_own_toml()
            _start(records, timeout)
            _watch_runs(_services(records))
    services = _services(records)
    write_toml(services)
    return services


def ensure_workers(services: Services, pools: Sequence[str] = (CPU, GPU), timeout: float = START_TIMEOUT) -> None:
    """Starts a worker for each process work pool that has none here, and returns when the server has heard from all.

    One that was started with other variables of NAMING than this process has is ended first, and its flow runs with
    it. The pools must exist. Raises UserError, with the last lines of the log, if a worker ends or is not heard of
    within `timeout` seconds; those that started well go on.
    """
    port = int(services.prefect.rpartition(":")[2])
    with _lock():
        records = _read()
        _forget(records, *(f"{WORKER}{pool}" for pool in pools if _is_outdated(records.get(f"{WORKER}{pool}"), port)))
        for pool in pools:
            if f"{WORKER}{pool}" not in records:
                _end_lost_runs(services, pool)
                _launch_worker(records, services, pool, port)
        deadline = time.monotonic() + timeout
        for pool in pools:
            record = records[f"{WORKER}{pool}"]
            name = record.command[record.command.index("--name") + 1]
            while not _heard_of(services, pool, name):
                if not _alive(record) or time.monotonic() > deadline:
                    error = _failure(record, timeout)
                    _forget(records, record.name)
                    raise error
                time.sleep(0.2)


def stop() -> list[str]:
    """Ends the services of this data folder, the workers before the servers, and returns the names of those that
    ran. Nothing else is ended.

    Each gets some time to finish in order; what is left of its processes is killed.
    """
    servers = [server.name for server in SERVERS]
    with _lock():
        records = _read()
        # Whatever else is on record is a worker too, of a pool that there is no more.
        workers = list(dict.fromkeys(name for name in (*WORKERS, *records) if name not in servers))
        running = [name for name in (*workers, *servers) if _processes(name, records)]
        _forget(records, *workers)
        shutil.rmtree(temporary_folder(), ignore_errors=True)
        _forget(records, *servers)
        remove_toml()
    return running


def status() -> list[ServiceStatus]:
    """The state of both servers and of the workers."""
    records = _read()
    found = []
    for server in SERVERS:
        record = records.get(server.name)
        state = "running" if _healthy(record, server) else "not answering" if _alive(record) else "stopped"
        url = _url(record) if record and state == "running" else None
        found.append(ServiceStatus(server.name, state, url, _pid(record), _log(server.name)))
    for worker in WORKERS:
        state = "running" if _alive(records.get(worker)) else "stopped"
        found.append(ServiceStatus(worker, state, None, _pid(records.get(worker)), _log(worker)))
    return found


# Starting


def _start(records: dict[str, _Record], timeout: float) -> None:
    for folder in (logs_folder(), prefect_folder(), mlflow_folder()):
        folder.mkdir(parents=True, exist_ok=True)
    waiting = [server for server in SERVERS if not _healthy(records.get(server.name), server)]
    deadline = time.monotonic() + timeout
    for server in waiting:
        # One that another process was starting when it was killed may be on its way.
        if not _alive(records.get(server.name)):
            before = records.get(server.name)
            _forget(records, server.name)
            _launch_server(records, server, _free_port(before.port if before else server.port))
    while waiting:
        for server in list(waiting):
            record = records[server.name]
            if _healthy(record, server):
                waiting.remove(server)
            elif not _alive(record) and not _bindable(record.port):
                # Another program took the port in the meantime.
                _forget(records, server.name)
                _launch_server(records, server, _free_port(0))
            elif not _alive(record) or time.monotonic() > deadline:
                error = _failure(record, timeout)
                _forget(records, *(one.name for one in waiting))
                raise error
        time.sleep(0.1)


def _watch_runs(services: Services) -> None:
    url = f"{services.prefect_api}/automations"
    wanted = {"automations": {"name": {"any_": [SILENT_RUNS["name"]]}}}
    if not json.loads(_ask(f"{url}/filter", wanted)):
        _ask(f"{url}/", SILENT_RUNS)


def _launch_server(records: dict[str, _Record], server: _Server, port: int) -> None:
    ports = {one.name: records[one.name].port if one.name in records else 0 for one in SERVERS}
    addresses = {name: f"http://{HOST}:{number}" for name, number in (ports | {server.name: port}).items()}
    environment = child_environment(Services(**addresses))
    # Each server is told of itself only: the other's port may not be known yet, and MLflow's must not call itself.
    del environment["MLFLOW_TRACKING_URI"]
    if server.name != "prefect":
        del environment["PREFECT_API_URL"]
    # In a folder where no prefect.toml, .env or module of the user's is picked up.
    _remember(records, _launch(server.name, server.command(port), port, environment, logs_folder()))


def _launch_worker(records: dict[str, _Record], services: Services, pool: str, port: int) -> None:
    name = _worker_names(pool) + secrets.token_hex(4)
    command = ["-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", name]
    command += ["--install-policy", "never"]
    # Prefect leaves files of a killed flow run among the temporary ones: they go with the next start.
    temporary = temporary_folder() / f"{WORKER}{pool}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    environment = child_environment(services) | {"TMPDIR": str(temporary)}
    started = _launch(f"{WORKER}{pool}", command, port, environment, PROJECT_ROOT)
    _remember(records, replace(started, naming=_naming()))


def _end_lost_runs(services: Services, pool: str) -> None:
    """Tells the server that the flow runs of a worker which was killed have ended: they would hold the pool's slots
    until their silence is noticed, and those that were about to start for ever.

    Called while this data folder has no worker for the pool. Where workers of others are online, the runs may be theirs
    and are left alone.
    """
    api = services.prefect_api
    try:
        workers = json.loads(_ask(f"{api}/work_pools/{pool}/workers/filter", {}))
        if any(one["status"] == "ONLINE" and not one["name"].startswith(_worker_names(pool)) for one in workers):
            return
        ends = {"PENDING": "CRASHED", "RUNNING": "CRASHED", "CANCELLING": "CANCELLED"}
        query = {"work_pools": {"name": {"any_": [pool]}}, "flow_runs": {"state": {"type": {"any_": list(ends)}}}}
        lost: list[dict[str, str]] = []
        while page := json.loads(_ask(f"{api}/flow_runs/filter", {**query, "offset": len(lost)})):
            lost += page
        for run in lost:
            state = {"type": ends[run["state_type"]], "message": "Its worker was killed."}
            _ask(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    except OSError as error:
        _LOG.warning("flow runs of a killed worker could not be ended; they will be, minutes from now: %s", error)


def _worker_names(pool: str) -> str:
    """How the names begin of the workers that are started here."""
    return f"local-{pool}-"


def _is_outdated(record: _Record | None, port: int) -> bool:
    """Whether a worker is to be ended, or what is left of it, and another one started in its place."""
    if record is None or not _alive(record) or record.port != port:
        return True
    if record.naming != _naming():
        _LOG.warning(
            "the variables that name files or GPUs have changed since %s was started: starting another", record.name
        )
        return True
    return False


def _launch(name: str, arguments: list[str], port: int, environment: dict[str, str], folder: Path) -> _Record:
    """Starts a detached session that survives this process and its terminal, and writes into its own log."""
    command = [sys.executable, *arguments]
    log = _log(name)
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment | {MARK: _mark(name)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _children[child.pid] = child
    return _Record(name, child.pid, psutil.Process(child.pid).create_time(), port, command)


def _naming() -> str:
    """A hash of the variables of NAMING: they may hold what is nobody's business."""
    named = sorted((name, value) for name, value in os.environ.items() if name.startswith(NAMING))
    return sha256(json.dumps(named).encode()).hexdigest()


def _free_port(wanted: int) -> int:
    """`wanted` if it is free, else any free port."""
    if wanted and _bindable(wanted):
        return wanted
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _bindable(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _failure(record: _Record, timeout: float) -> UserError:
    log = _log(record.name)
    found = f"no answer within {timeout:.0f} s" if _alive(record) else "the process has ended"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    text = "\n    ".join([f"{found}; the last lines of its log:", *lines])
    return UserError(log, f"{record.name} service", text, "mend what the log complains of and start again")


# Checking


def _healthy(record: _Record | None, server: _Server) -> bool:
    """Whether the recorded process itself, not some other program on its port, answers."""
    return record is not None and _listens(record) and _answers(f"{_url(record)}{server.health}")


def _alive(record: _Record | None) -> bool:
    return record is not None and _root(record) is not None


def _root(record: _Record) -> psutil.Process | None:
    if record.pid in _children:
        _children[record.pid].poll()
    with suppress(psutil.Error):
        process = psutil.Process(record.pid)
        # The start time is reckoned from the time of boot, which can move by a second when the clock is set.
        if process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - record.created) < 2:
            return process
    return None


def _listens(record: _Record) -> bool:
    root = _root(record)
    if root is None:
        return False
    with suppress(psutil.Error):
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == record.port:
                        return True
    return False


def _answers(url: str) -> bool:
    try:
        _ask(url)
    except OSError:
        return False
    return True


def _ask(url: str, body: object = None) -> bytes:
    """The answer to GET, or to POST with a JSON body. Never through a proxy. Raises OSError if it is no good."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with opener.open(request, timeout=30) as answer:
            return bytes(answer.read())
    except HTTPException as error:
        raise ConnectionError(f"{url}: {error!r}") from error


def _heard_of(services: Services, pool: str, name: str) -> bool:
    try:
        workers = json.loads(_ask(f"{services.prefect_api}/work_pools/{pool}/workers/filter", {}))
    except OSError:
        return False
    return any(worker["name"] == name for worker in workers)


# Stopping


def _processes(name: str, records: Mapping[str, _Record]) -> list[psutil.Process]:
    """All processes of a service, recorded or not, those too whose parent is gone."""
    found = {process.pid: process for process in _marked(name)}
    root = _root(records[name]) if name in records else None
    if root is not None:
        found[root.pid] = root
        with suppress(psutil.Error):
            found |= {child.pid: child for child in root.children(recursive=True)}
    return list(found.values())


def _marked(name: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == _mark(name) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _mark(name: str) -> str:
    return f"{name} of {data_folder()}"


def _end(names: Sequence[str], records: Mapping[str, _Record]) -> None:
    """Asks each service to end, then what is left of its processes; kills what does neither."""
    roots = {name: root for name in names if name in records and (root := _root(records[name])) is not None}
    # Flow runs before their workers, which else kill them before they have reported how they ended.
    runs = [run for name, root in roots.items() if name.startswith("worker") for run in _children_of(root)]
    _signal(runs, psutil.Process.terminate, STOP_TIMEOUT)
    _signal(list(roots.values()), psutil.Process.terminate, STOP_TIMEOUT)
    for signal in (psutil.Process.terminate, psutil.Process.kill):
        _signal([one for name in names for one in _processes(name, records)], signal, LAST_TIMEOUT)
    for name in roots:
        if records[name].pid in _children:
            _children.pop(records[name].pid).poll()


def _children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children())
    except psutil.Error:
        return []


def _signal(processes: list[psutil.Process], signal: Callable[[psutil.Process], None], seconds: float) -> None:
    for process in processes:
        with suppress(psutil.Error):
            signal(process)
    psutil.wait_procs(processes, timeout=seconds)


# The record


@contextmanager
def _lock() -> Iterator[None]:
    path = services_file().with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path):
        yield


def _read() -> dict[str, _Record]:
    path = services_file()
    if not path.exists():
        return {}
    try:
        return {row["name"]: _Record(**row) for row in json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, KeyError):
        _LOG.warning("%s is unreadable: services that still run are started again", path)
        return {}


def _write(records: dict[str, _Record]) -> None:
    rows = [asdict(record) for record in records.values()]
    replace_text(services_file(), json.dumps(rows, indent=1) + "\n")


def _remember(records: dict[str, _Record], record: _Record) -> None:
    records[record.name] = record
    _write(records)


def _forget(records: dict[str, _Record], *names: str) -> None:
    """Ends services and strikes them off. Written last: what is still being ended stays on record."""
    _end(names, records)
    recorded = [name for name in names if name in records]
    for name in recorded:
        del records[name]
    if recorded:
        _write(records)


def _services(records: dict[str, _Record]) -> Services:
    return Services(**{server.name: _url(records[server.name]) for server in SERVERS})


def _url(record: _Record) -> str:
    return f"http://{HOST}:{record.port}"


def _pid(record: _Record | None) -> int | None:
    return record.pid if record is not None and _alive(record) else None


def _log(name: str) -> Path:
    return logs_folder() / f"{name}.log"
