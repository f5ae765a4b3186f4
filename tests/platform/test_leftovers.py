"""A session of tests that ends leaves no process behind, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

LIMIT_S = 60
# A process in a session of its own, as a server is, and in a folder that only a fixture would end.
TEST = """
import subprocess, sys, time
from pathlib import Path

def test_that_starts_a_server():
    server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path("started").write_text(str(server.pid))
    {then}
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    """Starts pytest on one test; what it has printed is in `tmp_path / "log"`."""
    running: list[subprocess.Popen[bytes]] = []

    def run(then: str, *options: str) -> subprocess.Popen[bytes]:
        (tmp_path / "test_one.py").write_text(TEST.format(then=then))
        plugins = ["-p", "tests.helpers.leftovers", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *plugins, "--rootdir", str(tmp_path), "-c", os.devnull, *options]
        with (tmp_path / "log").open("wb") as log:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            running.append(
                subprocess.Popen([*command, "test_one.py"], cwd=tmp_path, env=environment, stdout=log, stderr=log)
            )
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait()


def wait_for_server(folder: Path) -> psutil.Process:
    """The process that the test has started."""
    deadline = time.monotonic() + LIMIT_S
    while not (folder / "started").exists() or not (folder / "started").read_text():
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    return psutil.Process(int((folder / "started").read_text()))


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_an_interrupted_session_ends_what_its_tests_started(start, tmp_path, number, workers):
    session = start("time.sleep(600)", "-n", str(workers))
    server = wait_for_server(tmp_path)
    session.send_signal(number)
    assert session.wait(LIMIT_S) == pytest.ExitCode.INTERRUPTED
    assert not server.is_running()


def test_a_test_that_leaves_a_process_behind_is_an_error(start, tmp_path):
    session = start("")
    server = wait_for_server(tmp_path)
    assert session.wait(LIMIT_S) == 1
    assert re.search(rf"left processes behind:\s+{server.pid} .*time.sleep\(600\)", (tmp_path / "log").read_text())
    assert not server.is_running()


def test_a_test_that_ends_its_process_is_none(start, tmp_path):
    session = start("server.kill()")
    assert session.wait(LIMIT_S) == 0, (tmp_path / "log").read_text()
