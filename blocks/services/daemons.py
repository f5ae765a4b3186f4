"""Services: processes that outlive the one which started them. How they are started, recorded, found again and ended.

Each belongs to one data folder. What runs is recorded there in services.json; a mark in the environment identifies
the processes of a service even if that record is lost.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from blocks.config.child_environment import replace_text
from blocks.config.paths import data_folder, logs_folder, services_file
from blocks.local.files import lock_file
from blocks.local.processes import find_process
from core.errors import UserError

# About 8 s on an idle laptop; much longer on a first start from a slow disk.
START_TIMEOUT = 180.0
# A worker first ends its flow runs, and a server the requests it serves; then they are killed.
STOP_TIMEOUT = 20.0
LAST_TIMEOUT = 5.0
# Inherited by every process that a service starts; it identifies them even if their parent or the record of services
# is gone. Not a setting.
MARK = "CALIPERT_SERVICE"

LOG = logging.getLogger("calipert.services")
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Record:
    """One started service.

    created: its start (seconds since 1970), which identifies a pid that was used again.
    port: where a server listens; for a worker, where its server does.
    naming: for a worker, a hash of the variables in which it found the user's files and devices named.
    """

    name: str
    pid: int
    created: float
    port: int
    command: list[str]
    naming: str = ""


Records = dict[str, Record]  # by name


# Starting


def start_service(name: str, arguments: list[str], port: int, environment: dict[str, str], folder: Path) -> Record:
    """Start a detached session that survives this process and its terminal, and writes into its own log."""
    command = [sys.executable, *arguments]
    log = log_file(name)
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
    return Record(name, child.pid, psutil.Process(child.pid).create_time(), port, command)


def describe_failure(record: Record, timeout: float) -> UserError:
    """Return the error for a service that ended or did not answer within `timeout` seconds, with the end of its log."""
    log = log_file(record.name)
    found = f"no answer within {timeout:.0f} s" if is_alive(record) else "the process has ended"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    text = "\n    ".join([f"{found}; the last lines of its log:", *lines])
    return UserError(log, f"{record.name} service", text, "fix what the log reports and start again")


# Checking


def is_alive(record: Record | None) -> bool:
    """Whether the recorded process runs; False without a record."""
    return record is not None and _root(record) is not None


def _root(record: Record) -> psutil.Process | None:
    if record.pid in _children:
        _children[record.pid].poll()
    with suppress(psutil.Error):
        return find_process(record.pid, record.created)
    return None


def is_listening(record: Record) -> bool:
    """Whether the recorded process, or one that it started, listens on its port."""
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


def log_file(name: str) -> Path:
    """Where a service writes what it prints."""
    return logs_folder() / f"{name}.log"


# Stopping


def end_children(records: Records, *names: str) -> None:
    """Ask what these services have started to end, and wait for it; nothing is killed."""
    children: list[psutil.Process] = []
    for root in _roots(names, records):
        with suppress(psutil.Error):
            children += root.children()
    _signal(children, psutil.Process.terminate, STOP_TIMEOUT)


def list_processes(name: str, records: Records) -> list[psutil.Process]:
    """List all processes of a service, recorded or not, also those whose parent is gone."""
    marked = [
        process
        for process in psutil.process_iter(["environ", "status"])
        if (process.info["environ"] or {}).get(MARK) == _mark(name) and process.info["status"] != psutil.STATUS_ZOMBIE
    ]
    found = {process.pid: process for process in marked}
    root = _root(records[name]) if name in records else None
    if root is not None:
        found[root.pid] = root
        with suppress(psutil.Error):
            found |= {child.pid: child for child in root.children(recursive=True)}
    return list(found.values())


def _mark(name: str) -> str:
    return f"{name} of {data_folder()}"


def _roots(names: Sequence[str], records: Records) -> list[psutil.Process]:
    """Return the recorded processes that run."""
    return [root for name in names if name in records and (root := _root(records[name])) is not None]


def _signal(processes: list[psutil.Process], signal: Callable[[psutil.Process], None], seconds: float) -> None:
    for process in processes:
        with suppress(psutil.Error):
            signal(process)
    psutil.wait_procs(processes, timeout=seconds)


# The record


@contextmanager
def lock_services() -> Iterator[None]:
    """Wait for the lock that excludes others from starting or ending services of this data folder, and hold it."""
    path = services_file().with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path, "another command starts or ends the services of this data folder"):
        yield


def read_records() -> Records:
    """Read the record; it is empty, with a warning, if its file is unreadable."""
    path = services_file()
    if not path.exists():
        return {}
    try:
        return {row["name"]: Record(**row) for row in json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, KeyError):
        LOG.warning("%s is unreadable: services that still run are started again", path)
        return {}


def _write(records: Records) -> None:
    rows = [asdict(record) for record in records.values()]
    replace_text(services_file(), json.dumps(rows, indent=1) + "\n")


def add_record(records: Records, record: Record) -> None:
    """Add a started service to the record."""
    records[record.name] = record
    _write(records)


def end_services(records: Records, *names: str) -> None:
    """End services and then remove them from the record, which lists them until they have ended.

    Each is asked to end, then what is left of its processes; what does not is killed.
    """
    _signal(_roots(names, records), psutil.Process.terminate, STOP_TIMEOUT)
    for signal in (psutil.Process.terminate, psutil.Process.kill):
        _signal([one for name in names for one in list_processes(name, records)], signal, LAST_TIMEOUT)
    recorded = [name for name in names if name in records]
    for name in recorded:
        if child := _children.pop(records.pop(name).pid, None):
            child.poll()
    if recorded:
        _write(records)
