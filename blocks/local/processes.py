"""Names of processes that stay valid after the process has ended, to find what an ended process left behind."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

# The start of a process is computed from the time of boot, which can move by a second when the clock is set.
_TOLERANCE = 2.0


def find_process(pid: int, created: float) -> psutil.Process | None:
    """Return the process of that number and start (seconds since 1970); None if it does not run."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - created) < _TOLERANCE and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def name_this_process() -> str:
    """Return the name of this process: its machine, its number there, and its start (seconds since 1970)."""
    return f"{_machine()} {os.getpid()} {psutil.Process().create_time():.1f}"


def is_dead(name: str) -> bool:
    """Whether that process has certainly ended; False if it runs, and if this machine cannot know."""
    words = name.split()
    if len(words) != 3 or words[0] != _machine():
        return False
    try:
        return find_process(int(words[1]), float(words[2])) is None
    except (psutil.AccessDenied, ValueError):
        return False


@cache
def _machine() -> str:
    """Return a name that differs between machines, between starts of one, and between containers on one."""
    parts = [socket.gethostname().replace(" ", "")]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return "/".join(parts)
