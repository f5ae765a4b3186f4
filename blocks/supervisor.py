"""Runs one command and ends together with it, with whatever it started, and with whoever started this.

`python supervisor.py STATUS COMMAND...`, as the leader of a process group of its own, with the read end of a pipe as
stdin whose write end only the starter holds. The command's exit code (minus the signal's number for one killed) is
written to the file STATUS; then the whole group is killed, this process included. The group is killed, too, as soon
as the starter is gone, however it died: the pipe ends, or, where a fork of the starter's still holds the pipe, this
process gets another parent. The command joins the group before it runs: there is no moment at which it could be left.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

CHECK_S = 1.0


def main(status: str, *command: str) -> NoReturn:
    threading.Thread(target=_end_with_starter, args=(os.getppid(),), daemon=True).start()
    Path(status).write_text(str(subprocess.call(command, stdin=subprocess.DEVNULL)), encoding="ascii")
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
