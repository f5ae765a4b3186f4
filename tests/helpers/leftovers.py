"""A plugin of pytest: a session that ends, also by SIGINT or SIGTERM, leaves no process behind.

Every process that a test starts inherits the name of the session. What still has it when the session ends is ended; if
the session was not interrupted, that is an error, since a test should have ended it.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

SESSION = "TEST_SESSION"
PATIENCE_S = 5.0


def pytest_configure(config: pytest.Config) -> None:
    # As after Ctrl-C, fixtures end what they have started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not is_worker(config):
        os.environ[SESSION] = uuid.uuid4().hex


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    # Last, and also where the end of a fixture fails.
    try:
        return (yield)
    finally:
        if not is_worker(session.config):
            end_leftovers(exitstatus)


def end_leftovers(exitstatus: int) -> None:
    """End what the tests of this session left; raises where it was not interrupted."""
    left = list(find_processes(os.environ[SESSION]))
    if exitstatus != pytest.ExitCode.INTERRUPTED:
        # What watches a process ends soon after it.
        _, left = psutil.wait_procs(left, timeout=PATIENCE_S)
    names = [describe(process) for process in left]
    end_processes(left)
    if names and exitstatus != pytest.ExitCode.INTERRUPTED:
        pytest.exit("tests left processes behind:\n" + "\n".join(names), returncode=1)


def is_worker(config: pytest.Config) -> bool:
    """Whether this process runs tests for another one (pytest -n)."""
    return hasattr(config, "workerinput")


def find_processes(session: str) -> Iterator[psutil.Process]:
    """The processes that a session has started; not this one."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(SESSION) == session:
                yield process


def describe(process: psutil.Process) -> str:
    """A process by its number and command."""
    with suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline())}"
    return f"{process.pid}, which has ended meanwhile"


def end_processes(processes: list[psutil.Process]) -> None:
    """Ask processes to end, and kill those that do not."""
    for request in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                request(process)
        _, processes = psutil.wait_procs(processes, timeout=PATIENCE_S)
