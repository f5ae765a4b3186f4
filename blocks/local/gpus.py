"""The GPUs of this host, and leases of them that the kernel ends with the processes that hold them.

A lease is an exclusive lock (`flock`) on one file per GPU. It belongs to the open file, not to the process that asked
for it: the flow, the supervisor and the model hold the same open file, and the GPU is free once the last of them is
gone, however they ended. It is given back by closing the file and never by unlocking, which would take the lock from
all of them: a flow that ends must not free a GPU that its dying model still uses. That is why FileLock is not used,
whose release unlocks.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from urllib.parse import quote

import filelock

from blocks.config.settings import read_settings
from blocks.local.cancellation import raise_if_stopped
from core.errors import UserError, shown

LOG = logging.getLogger("calipert.gpus")

GPUS = "CALIPERT_GPUS"
LOCKS = "CALIPERT_LOCKS"
VISIBLE = "CUDA_VISIBLE_DEVICES"
NONE = "none"
# Not the temporary folder of tempfile, which TMPDIR makes another one for each user or job.
SHARED_FOLDERS = (Path("/run/lock/calipert-gpus"), Path("/tmp/calipert-gpus"))  # noqa: S108
# For all users; sticky: no user deletes another's file.
FOLDER_MODE = 0o1777
# For all users; sticky, which tells systemd-tmpfiles to leave the file alone, however old it is.
FILE_MODE = 0o1666
POLL_S = 0.2
# A GPU that has fallen off its bus makes nvidia-smi wait for ever.
LIST_LIMIT_S = 60.0


@dataclass(frozen=True)
class Gpu:
    """A leased GPU.

    id: as CUDA_VISIBLE_DEVICES takes it. descriptor: of the open lock file, which a process that may use the GPU has
    to inherit.
    """

    id: str
    descriptor: int


@dataclass(frozen=True)
class Holder:
    """Who took a lease.

    pid: the process that asked (processes that inherited the lease may run longer); None before it has written it.
    what: what the lease is for.
    """

    pid: int | None
    what: str


def list_gpus() -> list[str]:
    """List the GPUs that this process may lease, as CUDA_VISIBLE_DEVICES takes them; empty without a GPU.

    CALIPERT_GPUS names them (`0,1`; `none` or nothing for none), else nvidia-smi does: the UUID of each GPU, or of each
    of its MIG instances where it is divided. CUDA_VISIBLE_DEVICES restricts them, where it is set. A number or the
    start of a UUID becomes the whole UUID if nvidia-smi knows it: two names of one GPU would be two leases of it.
    Raises UserError if nvidia-smi is installed and fails, or does not list what CALIPERT_GPUS names.
    """
    # CUDA reads the second one itself.
    chosen, visible = read_settings().gpus, os.environ.get(VISIBLE)
    if chosen is not None and chosen.strip() in ("", NONE):
        return []
    known = _known()
    if chosen is None:
        found = [id for ids in known.values() for id in ids]
    else:
        found = [id for name in _split(chosen) for id in _ids(name, known) or [_unlisted(name, known)]]
    if visible is not None:
        granted: list[str] = []
        for name in _split(visible):
            ids = [name] if name in found else _ids(name, known)
            if ids is None:
                break  # as CUDA does: what follows a GPU that is not there is not visible either
            granted += ids
        found = [id for id in found if id in granted]
    return list(dict.fromkeys(found))


@contextmanager
def lease_gpu(name: str) -> Iterator[Gpu | None]:
    """Lease a GPU of this host for the time of the block; None, with a message, if the host has none.

    name: who asks, for messages and for `list_holders`. Waits while all are taken. Each call excludes all others,
    those of other threads of this process too. Raises Stopped if the caller's flow ends meanwhile, and UserError if the
    locks cannot be used.
    """
    raise_if_stopped(name)
    gpus = list_gpus()
    if not gpus:
        values = {GPUS: read_settings().gpus, VISIBLE: os.environ.get(VISIBLE)}
        set_to = [f"{variable}={value}" for variable, value in values.items() if value is not None]
        why = f"no GPU is to be used here ({shown(set_to)})" if set_to else "this host has no GPU"
        LOG.info("%s runs on the CPU: %s", name, why)
        yield None
        return
    gpu, file = _wait(gpus, name)
    try:
        _LEASED.add(file)
        LOG.info("%s has GPU %s", name, gpu)
        yield Gpu(gpu, file.fileno())
    finally:
        _LEASED.discard(file)
        file.close()


def list_holders() -> list[tuple[str, Holder | None]]:
    """List the GPUs that this process may lease, each with its holder, or None if it is free."""
    gpus = list_gpus()
    if not gpus:
        return []
    folder = open_lock_folder()
    return [(gpu, _holder(_lock_file(folder, gpu))) for gpu in gpus]


def open_lock_folder() -> Path:
    """Return the folder of the lock files, the same for all users of the host; it is made if it is missing.

    CALIPERT_LOCKS, else /run/lock/calipert-gpus, else (where that cannot be made) /tmp/calipert-gpus.
    Raises UserError if it cannot be used.
    """
    chosen = read_settings().locks
    for folder in (chosen,) if chosen else SHARED_FOLDERS:
        try:
            with suppress(FileExistsError):
                folder.mkdir(FOLDER_MODE)
        except OSError as error:
            reason = error
            continue
        with _explain_errors(folder), ExitStack() as closing:
            # A link in a folder where all may write could lead anywhere.
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            closing.callback(os.close, descriptor)
            _for_all(descriptor, FOLDER_MODE)
        return folder
    raise UserError(folder, "lock files", str(reason), f"set {LOCKS} to a folder of this host that all its users share")


# The lock files that this process holds.
_LEASED: set[FileIO] = set()


def _forget_leases() -> None:
    for file in list(_LEASED):
        file.close()
    _LEASED.clear()


# A fork of the flow uses no GPU; left behind by a killed flow it must not keep one. A model starts by another way.
os.register_at_fork(after_in_child=_forget_leases)


def _wait(gpus: list[str], name: str) -> tuple[str, FileIO]:
    folder = open_lock_folder()
    said = False
    while True:
        for gpu in gpus:
            file = _take(_lock_file(folder, gpu), name)
            if file is not None:
                return gpu, file
        if not said:
            LOG.info("%s waits: %s", name, "the GPU is busy" if len(gpus) == 1 else f"all {len(gpus)} GPUs are busy")
            said = True
        time.sleep(POLL_S)
        raise_if_stopped(name)


def _take(path: Path, name: str) -> FileIO | None:
    """Open and lock a lock file, which is made for all users if it is missing; None while another holds it.

    No child process inherits it by itself.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    with _explain_errors(path), ExitStack() as closing:
        # A step of its own: in a folder like this Linux refuses O_CREAT for another user's file (fs.protected_regular).
        with suppress(FileExistsError):
            os.close(os.open(path, flags | os.O_CREAT | os.O_EXCL, FILE_MODE))
        file = closing.enter_context(FileIO(os.open(path, flags), "r+"))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
        _for_all(file.fileno(), FILE_MODE)
        if not (filelock.lock_descriptor(file.fileno(), blocking=False) and _is_still(file, path)):
            return None
        # The whole line at once, then the rest of a longer one: a reader always finds a whole first line.
        line = json.dumps({"pid": os.getpid(), "what": name}).encode() + b"\n"
        os.pwrite(file.fileno(), line, 0)
        file.truncate(len(line))
        closing.pop_all()
        return file


def _holder(path: Path) -> Holder | None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with _explain_errors(path), suppress(FileNotFoundError), FileIO(os.open(path, flags)) as file:
        try:
            # Shared: two who ask do not take each other for a holder. Closing gives it back.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                # One read of all: `readline` reads each byte by itself, and the next holder may write in between.
                return Holder(**json.loads(file.readall().split(b"\n")[0]))
            except (ValueError, TypeError):
                return Holder(None, "has just taken it")
    return None


def _for_all(descriptor: int, mode: int) -> None:
    """Set the mode, which the umask has cut, of a file or folder of this user; another user's stays as it is."""
    found = os.fstat(descriptor)
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != mode:
        os.fchmod(descriptor, mode)


def _is_still(file: FileIO, path: Path) -> bool:
    """Whether the open file is still the one under that name; if it was deleted, its lock excludes no other process."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a UserError that names the lock file or its folder."""
    remedy = (
        f"make it readable and writable for all (chmod a+rw), or set {LOCKS} to a local folder that all users share"
    )
    try:
        yield
    except OSError as error:
        raise UserError(path, "lock of a GPU", str(error), remedy) from error


def _lock_file(folder: Path, gpu: str) -> Path:
    return folder / f"{quote(gpu, safe='')}.lock"


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _known() -> dict[str, list[str]]:
    """Ask nvidia-smi for the number and the UUID of each GPU, each with what can be leased of it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    remedy = f"repair the driver (`nvidia-smi -L` shows its state), or set {GPUS}={NONE} to train on the CPU"
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=LIST_LIMIT_S, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise UserError(tool, "list of GPUs", str(error), remedy) from error
    text = f"{answer.stdout}{answer.stderr}".strip()
    known: dict[str, list[str]] = {}
    card, parts = "", list[str]()
    for line in answer.stdout.splitlines():
        if found := re.match(r"GPU (\d+): .*\(UUID: (\S+)\)", line):
            card, parts = found[2], []
            known[found[1]] = known[card] = [card]
        elif found := re.match(r"\s+MIG .*\(UUID: (\S+)\)", line):
            parts.append(found[1])
            known[card][:] = parts  # a divided GPU cannot be used as a whole
            known[found[1]] = [found[1]]
    if not known and "no devices" not in text.lower():
        raise UserError(tool, "list of GPUs", f"exit status {answer.returncode}: {text or 'nothing'}", remedy)
    if known and answer.returncode:
        LOG.warning("%s -L ended with exit status %d; GPUs may be missing: %s", tool, answer.returncode, text)
    return known


def _unlisted(name: str, known: Mapping[str, list[str]]) -> str:
    """Return a name of CALIPERT_GPUS as it is if there is no nvidia-smi that could list it, else raise UserError."""
    if known or not re.fullmatch(r"\d+|(GPU|MIG)-\S+", name):
        listed = ", ".join(number for number in known if number.isdigit()) or "0, 1, ..."
        remedy = f"set it to numbers ({listed}) or UUIDs as `nvidia-smi -L` shows them, or to `{NONE}`"
        raise UserError("environment", GPUS, f"{name!r}, which is not a GPU of this host", remedy)
    return name


def _ids(name: str, known: Mapping[str, list[str]]) -> list[str] | None:
    """Find what nvidia-smi lists under a number, a UUID or the start of one; None for anything else."""
    if name in known:
        return known[name]
    fitting = [whole for whole in known if whole.startswith(name)] if re.match("GPU-|MIG-", name) else []
    return known[fitting[0]] if len(fitting) == 1 else None
