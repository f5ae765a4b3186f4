"""`.ci/run` with stand-ins for make and the container engine: in what order, and what is stopped when it is cut off."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 60
LOG = '#!/bin/sh\necho "$(basename $0) $*" >> "$LOG"\n'
# As make, which ends what it has started when it is ended.
SLEEP = 'if [ "$1" = "$SLEEP_IN" ]; then sleep 600 & echo $! > "$LOG.pid"; trap "kill $!" TERM; wait $!; exit 1; fi\n'
FAIL = '[ "$1" != "$FAIL_IN" ]\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that has `.ci/run` alone, with commands that write down how they are called."""
    for path, text in {
        ".ci/docker-engine": LOG,
        "bin/make": LOG + SLEEP + FAIL,
        "bin/chromium": LOG,
        "bin/apt-get": LOG,
    }.items():
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    return tmp_path


def start(checkout: Path, **variables: str) -> subprocess.Popen[bytes]:
    environment = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "LOG": str(checkout / "log"), **variables}
    return subprocess.Popen([checkout / ".ci" / "run"], env=environment, start_new_session=True)


def calls(checkout: Path) -> list[str]:
    """The commands so far; installing packages is left out."""
    lines = (checkout / "log").read_text().splitlines()
    return [line for line in lines if not line.startswith("apt-get")]


def test_all_tiers_run_with_an_engine_for_the_last(checkout: Path) -> None:
    assert start(checkout).wait(LIMIT_S) == 0
    assert calls(checkout) == [
        *("make test", "make test-studies", "docker-engine start", "make test-platform"),
        *("make --silent down", "docker-engine stop"),
    ]


def test_a_failure_of_the_first_tier_ends_it(checkout: Path) -> None:
    assert start(checkout, FAIL_IN="test").wait(LIMIT_S) == 1
    assert calls(checkout) == ["make test", "make --silent down", "docker-engine stop"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_cut_off_it_ends_what_runs_and_stops_the_engine(checkout: Path, number: signal.Signals, status: int) -> None:
    run = start(checkout, SLEEP_IN="test-platform")
    deadline = time.monotonic() + LIMIT_S
    while not (checkout / "log.pid").exists() or not (checkout / "log.pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sleeping = psutil.Process(int((checkout / "log.pid").read_text()))
    run.send_signal(number)
    assert run.wait(LIMIT_S) == status
    assert not sleeping.is_running() or sleeping.status() == psutil.STATUS_ZOMBIE
    assert calls(checkout)[-2:] == ["make --silent down", "docker-engine stop"]
