"""A model that means harm: it does the one misdeed that its hyperparameters name, and says how far it got.

`python model.py train|predict SPEC.json`. Standard library only. Each attempt prints a line that begins with `refused`
or `DONE`; whoever runs it expects no DONE.
"""

# It takes the shortest way to each misdeed.
# ruff: noqa: PTH101, PTH108, PTH123, PTH208, PTH211, SIM115, S103, S108
from __future__ import annotations

import ctypes
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SPEC = json.loads(Path(sys.argv[2]).read_text())
GIVEN = SPEC["hyperparameters"]
OUTPUT = Path(SPEC["output"])
MEGABYTE = bytes(2**20)


def attempt(what: str, deed: Callable[[], object]) -> None:
    try:
        got = deed()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"refused {what}: {type(error).__name__} {error}", flush=True)
    else:
        print(f"DONE {what}: {got!r:.100}", flush=True)


def read_what_it_must_not() -> None:
    cells = Path(SPEC["cells"])
    for path in GIVEN["paths"]:
        attempt(f"read {path}", lambda path=path: open(path, "rb").read(10))
        attempt(f"read through another root {path}", lambda path=path: open(f"/proc/1/root{path}", "rb").read(10))
    for path in ("/var/run/docker.sock", "/run/docker.sock", "/dev/vda", "/dev/sda", "/dev/mem", "/proc/kcore"):
        attempt(f"open {path}", lambda path=path: open(path, "rb").read(1))
    beside = sorted(str(path) for path in cells.parent.rglob("*"))
    if beside != [str(cells)]:
        print(f"DONE found beside its cells: {beside}")
    up = cells.parent / ".." / ".." / ".."
    attempt("leave its folder", lambda: (up / GIVEN["paths"][0].lstrip("/")).read_bytes()[:10])
    others = [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) not in (1, os.getpid())]
    if others:
        print(f"DONE saw processes: {others}")
    attempt("open a file by its handle", lambda: system_call("open_by_handle_at", -100, 0, 0))


def reach_out() -> None:
    for host, port in [*GIVEN["addresses"], ("1.1.1.1", 53), ("169.254.169.254", 80), ("172.17.0.1", 22)]:
        attempt(f"connect to {host}:{port}", lambda host=host, port=port: socket.create_connection((host, port), 2))
    attempt("look a name up", lambda: socket.getaddrinfo("pypi.org", 443))
    attempt("send a datagram", lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("8.8.8.8", 53)))
    attempt("open a raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
    attempt("listen to the wire", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3))
    for name in GIVEN["sockets"]:
        attempt(f"connect to a socket {name!r}", lambda name=name: socket.socket(socket.AF_UNIX).connect(name))


def write_elsewhere() -> None:
    folders = (
        "/",
        "/etc",
        "/usr/bin",
        "/model",
        "/input",
        "/home",
        "/var/tmp",
        "/run",
        "/dev",
        "/sys",
        "/proc/sys/kernel",
    )
    for folder in folders:
        attempt(f"write to {folder}", lambda folder=folder: Path(folder, "new").write_text("x"))
    for path in (SPEC["cells"], sys.argv[2], __file__, "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"):
        attempt(f"change {path}", lambda path=path: open(path, "r+").write("x"))
        attempt(f"remove {path}", lambda path=path: os.unlink(path))
        attempt(f"take {path}", lambda path=path: os.chmod(path, 0o777))
    attempt("become root", lambda: os.setuid(0))
    attempt("become another", lambda: os.setgid(0))
    attempt("make a device", lambda: os.mknod("/tmp/disk", 0o60666, os.makedev(8, 0)))
    attempt("mount over its root", lambda: system_call("mount", b"none", b"/", b"tmpfs", 0x20, 0))
    attempt("get a name space of its own", lambda: system_call("unshare", 0x10000000))
    attempt("be unlimited", lambda: os.setpriority(os.PRIO_PROCESS, 0, -20))
    attempt("use a program that makes root", lambda: subprocess.run(["su", "-c", "id"], check=True, timeout=10))


def fork_without_end() -> None:
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.01)


def leave_processes_behind() -> None:
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)


def eat_memory() -> None:
    held = []
    while True:
        held.append(bytearray(2**24))


def fill() -> None:
    """Write into each place until it refuses; say how many megabytes and files each took."""
    taken = {}
    for folder in ("/tmp", "/dev/shm", str(OUTPUT), "/", "/var/tmp"):
        taken[folder] = [_megabytes(folder, keep_name=True), _megabytes(folder, keep_name=False), _files(folder)]
    print(json.dumps({"event": "log", "message": json.dumps(taken)}), flush=True)


def _megabytes(folder: str, keep_name: bool) -> int:
    """How many a file takes; without a name, so that nobody who looks sees it."""
    number = 0
    try:
        with (
            tempfile.NamedTemporaryFile(dir=folder, buffering=0)
            if keep_name
            else tempfile.TemporaryFile(dir=folder, buffering=0) as file
        ):
            while file.write(MEGABYTE) == len(MEGABYTE):
                number += 1
    except OSError:
        pass
    return number


def _files(folder: str) -> int:
    number = 0
    try:
        own = tempfile.mkdtemp(dir=folder)
        while number < 100_000:
            Path(own, str(number)).touch()
            number += 1
    except OSError:
        pass
    shutil.rmtree(own, ignore_errors=True) if number else None
    return number


def leave_too_much() -> None:
    """Of little memory: a file that says to be of a petabyte."""
    with (OUTPUT / "sparse").open("wb") as file:
        file.truncate(2**50)


def print_without_end() -> None:
    line = GIVEN["line"]
    while True:
        os.write(1, line.encode())


def link() -> None:
    os.symlink(GIVEN["target"], OUTPUT / "predictions.h5ad")


def link_a_folder() -> None:
    os.symlink(GIVEN["target"], OUTPUT / "weights")


def link_hard() -> None:
    (OUTPUT / "one").write_text("x")
    os.link(OUTPUT / "one", OUTPUT / "two")


def leave_a_pipe() -> None:
    os.mkfifo(OUTPUT / "predictions.h5ad")


def leave_strange_names() -> None:
    for name in (b"\xff\xfe", b"new\nline", b"\x1b[2J", b"..\\..\\up", b"-rf", b"$(id)"):
        with open(os.fsencode(OUTPUT) + b"/" + name, "wb"):
            pass


def leave_a_deep_folder() -> None:
    folder = os.open(OUTPUT, os.O_RDONLY)
    for _ in range(40):
        os.mkdir("x" * 100, dir_fd=folder)
        folder = os.open("x" * 100, os.O_RDONLY, dir_fd=folder)


def replace_the_curve() -> None:
    (OUTPUT / "training.jsonl").write_text('{"event": "metric", "name": "r2", "step": 1, "value": 1.0}\n')


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {GIVEN['mark']}",)


def write_a_pickle() -> None:
    (OUTPUT / "predictions.h5ad").write_bytes(pickle.dumps(_Bomb()))
    (OUTPUT / "unpredicted.json").write_text("[]")


def deliver() -> None:
    """Hand in, as its predictions, the file that it was given as control cells."""
    shutil.copy(SPEC["control"], OUTPUT / "predictions.h5ad")
    (OUTPUT / "unpredicted.json").write_text(json.dumps(GIVEN.get("unpredicted", [])))


def system_call(name: str, *arguments: object) -> int:
    """Of the C library; raises what it refuses."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return 0


if __name__ == "__main__":
    globals()[GIVEN["misdeed"]]()
