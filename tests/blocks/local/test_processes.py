"""A process is known to be dead only where that can be known."""

from __future__ import annotations

import os
import subprocess
import sys

from blocks.local.processes import is_dead, name_this_process


def test_this_process_lives() -> None:
    assert name_this_process() == name_this_process()
    assert not is_dead(name_this_process())


def test_one_that_has_ended_is_dead_even_if_nobody_has_noticed() -> None:
    code = "from blocks.local.processes import name_this_process; print(name_this_process(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        name = child.stdout.readline().strip()
        assert name != name_this_process()
        assert not is_dead(name)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        assert is_dead(name)
        child.wait()
        assert is_dead(name)


def test_a_number_that_another_process_has_now_is_dead() -> None:
    machine, number, _ = name_this_process().split()
    assert is_dead(f"{machine} {number} 1000000000.0")


def test_of_other_machines_and_of_no_process_nothing_is_known() -> None:
    _, number, started = name_this_process().split()
    for name in (f"elsewhere/1 {number} 1.0", f"elsewhere/1 999999999 {started}", "", "two words", "a b c d"):
        assert not is_dead(name)
