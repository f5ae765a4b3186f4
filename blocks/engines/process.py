"""Engines: how a model's stage is run. Nothing above this module knows which one is in use."""

from __future__ import annotations

import json
import logging
import os
import re
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any, Literal, Protocol

from prefect.blocks.core import Block
from pydantic import Field

from blocks.config.paths import MODEL_CONTAINERS, scratch_folder
from blocks.local.cancellation import kill_on_stop, raise_if_stopped
from blocks.local.gpus import VISIBLE, Gpu
from blocks.local.scratch import scratch
from core.errors import UserError
from core.io.h5ad import read_foreign_json
from model_containers.contract import THREAD_VARIABLES, ContractError, Description

LOG = logging.getLogger("calipert.engines")

Stage = Literal["describe", "train", "predict", "embed"]
Event = Mapping[str, Any]

# What every model finds on its path; docs/models.md.
SHARED = tuple(MODEL_CONTAINERS / name for name in ("contract.py", "neural.py"))
SUPERVISOR = Path(__file__).with_name("supervisor.py")
LAST_LINES = 30
LONGEST_LINE = 2**20
DESCRIBE_LIMIT_S = 120.0
# An exception that another thread raises in this one (a task's time limit) arrives only between two waits.
WAIT_S = 0.5
# All that a model's process gets of this one's environment: no setting, no credential, no proxy.
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Usage:
    """What a model's stage took; None where the engine cannot know it.

    seconds: wall clock. cpu_seconds: of its processes, those excepted that it never waited for. peak_memory_bytes: of
    its largest process, not the sum over processes; of a container, of all its processes at the moments of a look at
    it. device: `cpu`, or what it had of GPUs, as the engine names them.
    """

    seconds: float
    cpu_seconds: float | None
    peak_memory_bytes: int | None
    device: str


class ModelFailed(Exception):
    """A model's stage did not end well.

    model, stage: whose. ending: how, in words. exit_code: its exit code, minus the number of the signal that killed
    it, or None if it was stopped here. last_lines: the end of what it wrote to stderr.
    """

    def __init__(self, model: str, stage: str, ending: str, exit_code: int | None, last_lines: tuple[str, ...]) -> None:
        self.model = model
        self.stage = stage
        self.ending = ending
        self.exit_code = exit_code
        self.last_lines = last_lines
        # All go to Exception, so that the error survives pickling between processes.
        super().__init__(model, stage, ending, exit_code, last_lines)

    def __str__(self) -> str:
        return "\n".join([f"{self.model} {self.stage} {self.ending}", *(f"  {line}" for line in self.last_lines)])


class Engine(Protocol):
    """What runs models, wherever and behind whatever walls."""

    def run(
        self,
        stage: Stage,
        model_folder: Path,
        spec: Mapping[str, Any],
        *,
        on_event: Callable[[Event], None],
        timeout_s: float | None = None,
        gpu: Gpu | None = None,
    ) -> Usage:
        """Run a stage of a model to its end. Raises ModelFailed, UserError or Stopped, as the engine says."""

    def describe(self, model_folder: Path) -> Description:
        """What a model says that it can do and needs."""

    def identity(self, model_folder: Path) -> str:
        """What decides a model's results, in one word."""


class ProcessEngine(Block):
    """Runs a model's stage as a process of its own on this machine, for machines without containers.

    The contract and the folders are those of a container, but nothing is walled off: a model may read what this user
    may read, and reach the network.
    """

    _block_type_name = "Calipert process engine"
    _block_type_slug = "calipert-process-engine"

    python: str = Field(default=sys.executable, description="Python of the environment that has the models' packages.")

    def run(
        self,
        stage: Stage,
        model_folder: Path,
        spec: Mapping[str, Any],
        *,
        on_event: Callable[[Event], None],
        timeout_s: float | None = None,
        gpu: Gpu | None = None,
    ) -> Usage:
        """Run `model.py STAGE SPEC.json` of a model and wait for its end.

        spec: the stage's JSON (docs/models.md). on_event: called in this thread with each event that the model prints;
        any other line becomes a log event. timeout_s: wall-clock limit in seconds. gpu: the leased one that the model
        may use (blocks.local.gpus); it sees no other, and none without a lease.
        Raises ModelFailed if the model exits with an error, is killed, or takes longer, and Stopped if its flow ends
        meanwhile or has ended (blocks.local.cancellation). Whatever ends this call, be it the model's own end, an
        exception of `on_event`, a cancellation or the death of this process by any signal, ends all processes of the
        model too; the GPU stays leased until the last of them is gone.
        """
        deadline = float("inf") if timeout_s is None else monotonic() + timeout_s
        last: deque[str] = deque(maxlen=LAST_LINES)
        name = f"{model_folder.name} {stage}"
        raise_if_stopped(name)
        with scratch(scratch_folder(), "model") as folder:
            status, spec_file = folder / "status", folder / "spec.json"
            spec_file.write_text(json.dumps(spec), encoding="utf-8")
            model = [self.python, str(model_folder.resolve() / "model.py"), stage, str(spec_file)]
            with subprocess.Popen(
                [sys.executable, "-I", "-S", str(SUPERVISOR), str(status), *model],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=self._environment(folder, int(spec.get("threads", 1)), gpu),
                pass_fds=() if gpu is None else (gpu.descriptor,),
                start_new_session=True,
            ) as process:
                try:
                    with kill_on_stop(name, partial(_kill_group, process)):
                        for stream, line in _lines(process, deadline):
                            raise_if_stopped(name)
                            if stream is process.stdout:
                                on_event(event_of(line))
                            else:
                                last.append(line)
                except _LimitReached:
                    ending = f"was stopped after {timeout_s:g} s, its limit{where_to_change(stage)}"
                    raise ModelFailed(model_folder.name, stage, ending, None, tuple(last)) from None
                finally:
                    _kill_group(process)
            exit_code, usage = _report(status, process.returncode, device_of(gpu))
        if exit_code or usage is None:
            raise ModelFailed(model_folder.name, stage, ending_of(exit_code), exit_code, tuple(last))
        LOG.debug("%s took %.1f s on %s", name, usage.seconds, usage.device)
        return usage

    def describe(self, model_folder: Path) -> Description:
        """What a model says that it can do and needs. Raises ModelFailed unless it says so as the contract wants."""
        return described(self.run, model_folder, DESCRIBE_LIMIT_S)

    def identity(self, model_folder: Path) -> str:
        """SHA-256 of what decides a model's results: its folder's files, the contract, its packages' versions.

        Raises UserError if the environment lacks a package of the model's requirements.txt.
        """
        requirements = sources_of(model_folder).get("requirements.txt")
        versions = _versions(self.python, () if requirements is None else _required(requirements), model_folder)
        return sha256((sources_hash(model_folder) + versions).encode()).hexdigest()

    def _environment(self, home: Path, threads: int, gpu: Gpu | None) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        return kept | {
            "PATH": os.pathsep.join([str(Path(self.python).parent), kept.get("PATH", os.defpath)]),
            "HOME": str(home),
            "TMPDIR": str(home),
            "PYTHONPATH": str(MODEL_CONTAINERS),
            "PYTHONHASHSEED": "0",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            VISIBLE: "" if gpu is None else gpu.id,
            **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        }


def described(run: Callable[..., Usage], model_folder: Path, limit_s: float) -> Description:
    """What a model says of itself by an engine's `run`, within a limit in seconds. Raises ModelFailed as that does, and
    where the model does not say it as the contract wants."""
    with scratch(scratch_folder(), "description") as output:
        spec = {"output": str(output)}
        run("describe", model_folder, spec, on_event=lambda event: None, timeout_s=limit_s)
        try:
            return Description(**read_foreign_json(output / "describe.json", LONGEST_LINE))
        except (OSError, ValueError, TypeError, ContractError) as error:
            ending = f"did not write the describe.json of docs/models.md: {error}"
            raise ModelFailed(model_folder.name, "describe", ending, 0, ()) from error


def sources_of(model_folder: Path) -> dict[str, Path]:
    """The files that make a model, by their path in its folder, and what models share, as `../contract.py`."""
    files = {path.relative_to(model_folder).as_posix(): path for path in model_folder.rglob("*") if path.is_file()}
    shared = {f"../{path.name}": path for path in SHARED}
    return {name: path for name, path in files.items() if not _is_litter(name)} | shared


def sources_hash(model_folder: Path) -> str:
    """SHA-256 of a model's files and of what models share."""
    whole = sha256()
    for name, path in sorted(sources_of(model_folder).items()):
        whole.update(f"{name}\0{sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


class _LimitReached(Exception):
    """The model took longer than it may. Not TimeoutError, which `on_event` may raise for reasons of its own."""


def _lines(process: subprocess.Popen[bytes], deadline: float) -> Iterator[tuple[object, str]]:
    """(stream, line) as the model writes them, until both streams end. Raises _LimitReached at the deadline.

    The supervisor holds both streams to its own end, so they end when all is over.
    """
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                selector.register(stream, selectors.EVENT_READ, data=b"")
        while selector.get_map():
            if monotonic() >= deadline:
                raise _LimitReached
            ready = selector.select(min(WAIT_S, max(0.0, deadline - monotonic())))
            if not ready and process.poll() is not None:
                return  # the supervisor was killed from outside: whoever holds the streams is left without one
            for key, _ in ready:
                chunk = os.read(key.fd, 2**16)
                lines, rest = split_lines(key.data, chunk)
                if chunk:
                    selector.modify(key.fileobj, selectors.EVENT_READ, data=rest)
                else:
                    selector.unregister(key.fileobj)
                for line in lines:
                    yield key.fileobj, line


def split_lines(rest: bytes, chunk: bytes) -> tuple[list[str], bytes]:
    """(whole lines, new rest) after one more chunk of a stream; an empty chunk is its end, which ends the last line.

    A carriage return ends a line too: progress bars write many on one line. A line longer than LONGEST_LINE comes in
    pieces; an empty one is left out.
    """
    *lines, rest = re.split(rb"[\r\n]", rest + chunk)
    if not chunk or len(rest) > LONGEST_LINE:
        lines.append(rest)
        rest = b""
    return [line.decode("utf-8", errors="replace") for line in lines if line], rest


def event_of(line: str) -> Event:
    """An event of the contract as it is; anything else that a model prints, as a log event."""
    as_log: Event = {"event": "log", "message": line}
    try:
        event: Event = json.loads(line)
    except (ValueError, RecursionError):
        return as_log
    match event:
        case (
            {"event": "progress", "done": int(), "total": int(), "unit": str()}
            | {"event": "metric", "name": str(), "step": int(), "value": int() | float()}
            | {"event": "log", "message": str()}
        ):
            return event
    return as_log


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the supervisor and all in its group; mostly the supervisor has done so itself."""
    # Nobody may be left in the group (which macOS calls a permission error while zombies are).
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def device_of(gpu: Gpu | None) -> str:
    """What stands in Usage for a leased GPU, or none."""
    return "cpu" if gpu is None else f"GPU {gpu.id}"


def _report(status: Path, supervisor_code: int, device: str) -> tuple[int, Usage | None]:
    """The model's exit code and usage as its supervisor wrote them; where it could not, its own exit code alone."""
    if not status.exists():
        return supervisor_code, None
    report = json.loads(status.read_text(encoding="ascii"))
    return report.pop("exit_code"), Usage(**report, device=device)


def where_to_change(stage: Stage) -> str:
    if stage == "describe":
        return ": a model has to describe itself at once (docs/models.md)"
    limit, entry = f"time_limits: {{{stage}: SECONDS}}", "model"
    if stage == "embed":
        limit, entry = "time_limit: SECONDS", "embedding"
    return f": to change it, set `{limit}` in the {entry}'s entry of the catalog (docs/models.md)"


def ending_of(exit_code: int) -> str:
    """In words. exit_code: minus the signal's number for a process that was killed."""
    if exit_code == -signal.SIGKILL:
        return "was killed (SIGKILL): most often the machine ran out of memory"
    if exit_code < 0:
        return f"was killed ({signal.Signals(-exit_code).name})"
    return f"ended with exit code {exit_code}"


def _is_litter(name: str) -> bool:
    """Whether a file comes and goes without meaning anything: caches, hidden files."""
    return any(part == "__pycache__" or part.startswith(".") for part in name.split("/"))


def _required(requirements: Path) -> tuple[str, ...]:
    """Names of the packages in a requirements.txt, sorted."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return tuple(sorted(found.group() for line in lines if (found := re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line))))


@cache
def _versions(python: str, names: tuple[str, ...], model_folder: Path) -> str:
    """`name==version` lines of these packages and the Python version, as that interpreter has them.

    Raises UserError if it lacks one.
    """
    ask = (
        "import sys; from importlib.metadata import version; "
        "print(sys.version_info[:2], *(f'{n}=={version(n)}' for n in sys.argv[1:]), sep='\\n')"
    )
    answer = subprocess.run([python, "-I", "-c", ask, *names], capture_output=True, text=True, check=False)
    if answer.returncode:
        lacks = "".join(answer.stderr.strip().splitlines()[-1:]).rpartition("found for ")[2]
        found = f"{python} lacks a package: {lacks}"
        build = f"`calipert model build {model_folder.name}`, then set CALIPERT_ENGINE=docker (docs/containers.md)"
        remedy = f"run it in its image: {build}; or install here what the file lists, where that fits the rest"
        raise UserError(model_folder / "requirements.txt", "packages", found, remedy)
    return answer.stdout
