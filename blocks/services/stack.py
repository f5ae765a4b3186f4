"""The private local services: a Prefect server, an MLflow server and a worker per work pool, of this project alone.

The servers are started here, the workers in blocks.services.workers; all are shown and stopped here. They listen on
127.0.0.1, keep everything under the data folder and use none of the user's own Prefect or MLflow settings. Imports
neither prefect nor mlflow, which take seconds.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blocks.config.child_environment import (
    HOST,
    Services,
    build_child_environment,
    remove_toml,
    require_own_toml,
    write_toml,
)
from blocks.config.paths import logs_folder, mlflow_folder, prefect_folder, temporary_folder
from blocks.services import daemons
from blocks.services.daemons import START_TIMEOUT, Record, Records
from blocks.services.loopback import ask, find_free_port, is_answering, is_free_port
from blocks.services.workers import WORKERS, end_workers


@dataclass(frozen=True)
class ServiceStatus:
    """state: "running", "not answering" (a process, but no answer) or "stopped"; url is None for a worker."""

    name: str
    state: str
    url: str | None
    pid: int | None
    log: Path


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
            f"prefect.flow-run.{event}" for event in ("heartbeat", "Completed", "Failed", "Cancelled", "Crashed")
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
    """Start the servers that do not run yet, both at once, and return when both answer.

    Servers outlive the process that started them. Callers at the same time start nothing twice.
    timeout: seconds to wait for an answer. Raises UserError, with the last lines of the log, if a server ends or
    does not answer in time; it is stopped then, so that the next call starts it again.
    """
    records = daemons.read_records()
    if not all(_healthy(records.get(server.name), server) for server in SERVERS):
        with daemons.lock_services():
            records = daemons.read_records()
            require_own_toml()
            _start(records, timeout)
            _watch_runs(_services(records))
    services = _services(records)
    write_toml(services)
    return services


def stop() -> list[str]:
    """End the services of this data folder, the workers first; return the names of those that ran.

    Each gets some time to finish in order; what is left of its processes is killed.
    """
    servers = [server.name for server in SERVERS]
    with daemons.lock_services():
        records = daemons.read_records()
        # All others on record are workers too, of pools that no longer exist.
        workers = list(dict.fromkeys(name for name in (*WORKERS, *records) if name not in servers))
        running = [name for name in (*workers, *servers) if daemons.list_processes(name, records)]
        end_workers(records, *workers)
        shutil.rmtree(temporary_folder(), ignore_errors=True)
        daemons.end_services(records, *servers)
        remove_toml()
    return running


def status() -> list[ServiceStatus]:
    """Return the state of both servers and of the workers."""
    records = daemons.read_records()
    servers = {server.name: server for server in SERVERS}
    found = []
    for name in (*servers, *WORKERS):
        record, server = records.get(name), servers.get(name)
        state, url, pid = "stopped", None, None
        if record is not None and daemons.is_alive(record):
            state, pid = "running", record.pid
            if server is not None:
                state, url = ("running", _url(record)) if _healthy(record, server) else ("not answering", None)
        found.append(ServiceStatus(name, state, url, pid, daemons.log_file(name)))
    return found


# Starting


def _start(records: Records, timeout: float) -> None:
    for folder in (logs_folder(), prefect_folder(), mlflow_folder()):
        folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    launched: set[str] = set()
    waiting = list(SERVERS)
    # One that has answered is not asked again: it may be busy when the other's time is over.
    while waiting := [server for server in waiting if not _healthy(records.get(server.name), server)]:
        for server in waiting:
            record = records.get(server.name)
            port = record.port if record else server.port
            # One that another process was starting when it was killed may be on its way.
            alive = daemons.is_alive(record)
            # Launched once more where another program took the port in the meantime.
            if not alive and (server.name not in launched or not is_free_port(port)):
                daemons.end_services(records, server.name)
                _launch_server(records, server, find_free_port(port))
                launched.add(server.name)
            elif not alive or time.monotonic() > deadline:
                error = daemons.describe_failure(records[server.name], timeout)
                daemons.end_services(records, *(one.name for one in waiting))
                raise error
        time.sleep(0.1)


def _watch_runs(services: Services) -> None:
    url = f"{services.prefect_api}/automations"
    wanted = {"automations": {"name": {"any_": [SILENT_RUNS["name"]]}}}
    if not json.loads(ask(f"{url}/filter", wanted)):
        ask(f"{url}/", SILENT_RUNS)


def _launch_server(records: Records, server: _Server, port: int) -> None:
    own = f"http://{HOST}:{port}"
    environment = build_child_environment(Services(prefect=own, mlflow=own))
    # Each server gets its own address only: the other's port may not be known yet, and MLflow's must not call itself.
    del environment["MLFLOW_TRACKING_URI"]
    if server.name != "prefect":
        del environment["PREFECT_API_URL"]
    # In a folder where no prefect.toml, .env or module of the user's is picked up.
    daemons.add_record(
        records, daemons.start_service(server.name, server.command(port), port, environment, logs_folder())
    )


# Checking


def _healthy(record: Record | None, server: _Server) -> bool:
    """Whether the recorded process itself, not some other program on its port, answers."""
    return record is not None and daemons.is_listening(record) and is_answering(f"{_url(record)}{server.health}")


def _services(records: Records) -> Services:
    return Services(**{server.name: _url(records[server.name]) for server in SERVERS})


def _url(record: Record) -> str:
    return f"http://{HOST}:{record.port}"
