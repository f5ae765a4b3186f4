"""The workers: one per work pool, which runs the pool's flow runs on this machine.

Imports neither prefect nor mlflow, which take seconds.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import httpx

from blocks.config.child_environment import Services, build_child_environment
from blocks.config.paths import PROJECT_ROOT, temporary_folder
from blocks.config.pools import CPU, GPU
from blocks.config.settings import SOURCE, Settings, variable
from blocks.services import daemons
from blocks.services.daemons import START_TIMEOUT, Record, Records
from blocks.services.loopback import ask, ask_once
from blocks.services.pages import read_pages

# Variables, by how they begin, that name the user's files, store and GPUs. A worker has those with which it was
# started.
NAMING = (
    "AWS_",
    "CUDA_VISIBLE_DEVICES",
    "DOCKER_",
    SOURCE,
    *(variable(field) for field in Settings.model_fields if field != "data"),
)
WORKER = "worker-"  # how the names of workers begin; the work pool follows
WORKERS = tuple(f"{WORKER}{pool}" for pool in (CPU, GPU))

LOG = logging.getLogger("calipert.services")


def ensure_workers(services: Services, pools: Sequence[str] = (CPU, GPU), timeout: float = START_TIMEOUT) -> None:
    """Start a worker for each process work pool that has none here, and return when the server lists all.

    One that was started with other variables of NAMING than this process has is ended first, together with its flow
    runs. The pools must exist. Raises UserError, with the last lines of the log, if a worker ends or is not listed
    within `timeout` seconds; those that started well stay.
    """
    port = int(services.prefect.rpartition(":")[2])
    with daemons.lock_services():
        records = daemons.read_records()
        names = [f"{WORKER}{pool}" for pool in pools]
        end_workers(records, *(name for name in names if _is_outdated(records.get(name), port)))
        for pool in pools:
            if f"{WORKER}{pool}" not in records:
                _end_lost_runs(services, pool)
                _launch_worker(records, services, pool, port)
        deadline = time.monotonic() + timeout
        for pool in pools:
            record = records[f"{WORKER}{pool}"]
            name = record.command[record.command.index("--name") + 1]
            while not _heard_of(services, pool, name):
                if not daemons.is_alive(record) or time.monotonic() > deadline:
                    error = daemons.describe_failure(record, timeout)
                    end_workers(records, record.name)
                    raise error
                time.sleep(0.2)


def end_workers(records: Records, *names: str) -> None:
    """End the flow runs of workers, then the workers, and remove them from the record.

    In this order, because a worker that ends kills its flow runs before they report how they ended.
    """
    daemons.end_children(records, *names)
    daemons.end_services(records, *names)


def _launch_worker(records: Records, services: Services, pool: str, port: int) -> None:
    name = _worker_names(pool) + secrets.token_hex(4)
    command = ["-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", name]
    command += ["--install-policy", "never"]
    # Prefect leaves files of a killed flow run among the temporary ones: they go with the next start.
    temporary = temporary_folder() / f"{WORKER}{pool}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    environment = build_child_environment(services) | {"TMPDIR": str(temporary)}
    started = daemons.start_service(f"{WORKER}{pool}", command, port, environment, PROJECT_ROOT)
    daemons.add_record(records, replace(started, naming=_naming()))


def _end_lost_runs(services: Services, pool: str) -> None:
    """Tell the server that the flow runs of a killed worker have ended.

    They would hold the pool's slots until their silence is noticed, and those that were about to start for ever.
    Called while this data folder has no worker for the pool. Where workers of others are online, the runs may be theirs
    and are left alone.
    """
    api = services.prefect_api
    try:
        workers = json.loads(ask(f"{api}/work_pools/{pool}/workers/filter", {}))
        if any(one["status"] == "ONLINE" and not one["name"].startswith(_worker_names(pool)) for one in workers):
            return
        ends = {"PENDING": "CRASHED", "RUNNING": "CRASHED", "CANCELLING": "CANCELLED"}
        query = {"work_pools": {"name": {"any_": [pool]}}, "flow_runs": {"state": {"type": {"any_": list(ends)}}}}
        for run in read_pages(lambda **page: json.loads(ask(f"{api}/flow_runs/filter", {**query, **page}))):
            state = {"type": ends[run["state_type"]], "message": "Its worker was killed."}
            ask(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    except httpx.HTTPError as error:
        LOG.warning("flow runs of a killed worker could not be ended; they will be, minutes from now: %s", error)


def _worker_names(pool: str) -> str:
    """Return how the names of the workers begin that are started here."""
    return f"local-{pool}-"


def _is_outdated(record: Record | None, port: int) -> bool:
    """Whether another worker must replace this one, or what is left of it."""
    if record is None or not daemons.is_alive(record) or record.port != port:
        return True
    if record.naming != _naming():
        LOG.warning(
            "the variables that name files or GPUs have changed since %s was started: starting another", record.name
        )
        return True
    return False


def _naming() -> str:
    """Return a hash of the variables of NAMING, which may hold secrets."""
    named = sorted((name, value) for name, value in os.environ.items() if name.startswith(NAMING))
    return sha256(json.dumps(named).encode()).hexdigest()


def _heard_of(services: Services, pool: str, name: str) -> bool:
    try:
        workers = json.loads(ask_once(f"{services.prefect_api}/work_pools/{pool}/workers/filter", {}))
    except httpx.HTTPError:
        return False
    return any(worker["name"] == name for worker in workers)
