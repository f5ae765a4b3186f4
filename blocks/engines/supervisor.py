"""Runs one command and ends together with it, with all that it started, and with the process that started this one.

`python supervisor.py STATUS COMMAND...`, as the leader of a process group of its own, with the read end of a pipe as
stdin whose write end only the starter holds. How the command ended is written to the file STATUS (`main`); then the
whole group is killed, this process included. The group is killed, too, as soon as the starter is gone, however it died:
the pipe ends, or, where a fork of the starter's still holds the pipe, this process gets another parent. The command
joins the group before it runs: there is no moment at which it could be left. What else this process holds (the lock of
a GPU) the command gets too.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

CHECK_S = 1.0


def main(status: str, *command: str) -> NoReturn:
    """Run a command, write how it ended and what it took, and kill the group.

    exit_code: minus the signal's number for a command that was killed; seconds: of wall clock; cpu_seconds: of the
    command and of the children that it waited for; peak_memory_bytes: of the largest of these processes.
    """
    threading.Thread(target=_end_with_starter, args=(os.getppid(),), daemon=True).start()
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    _, ending, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(ending)
    report = {
        "exit_code": process.returncode,
        "seconds": time.monotonic() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
    partial = Path(f"{status}.partial")
    partial.write_text(json.dumps(report), encoding="ascii")
    partial.replace(status)
    _kill_group()


def _end_with_starter(starter: int) -> None:
    while not select.select([sys.stdin], [], [], CHECK_S)[0]:
        if os.getppid() != starter:
            break
    _kill_group()


def _kill_group() -> NoReturn:
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("a process outlived its own SIGKILL")


if __name__ == "__main__":
    main(*sys.argv[1:])
