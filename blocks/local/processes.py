"""Names of processes that stay good after the process is gone: to know of what was left behind that nobody goes on."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

# The start of a process is reckoned from the time of boot, which can move by a second when the clock is set.
_TOLERANCE = 2.0


def name_this_process() -> str:
    """The name of this process: its machine, its number there, and when it started (seconds since 1970)."""
    return f"{_machine()} {os.getpid()} {psutil.Process().create_time():.1f}"


def is_dead(name: str) -> bool:
    """Whether that process has certainly ended; False where it runs, and where nobody here can know."""
    words = name.split()
    if len(words) != 3 or words[0] != _machine():
        return False
    try:
        process = psutil.Process(int(words[1]))
        another = abs(process.create_time() - float(words[2])) > _TOLERANCE
        return bool(another or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, ValueError):
        return False


@cache
def _machine() -> str:
    """Tells this machine, since it was last started, from any other, and containers on it from each other."""
    parts = [socket.gethostname().replace(" ", "")]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return "/".join(parts)
