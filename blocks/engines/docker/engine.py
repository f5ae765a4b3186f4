"""The engine of containers: each stage of a model is one container of the model's image on this machine."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import docker
from docker.errors import APIError, DockerException
from docker.models.containers import Container
from prefect.blocks.core import Block
from prefect_docker.host import DockerHost
from pydantic import Field
from requests.exceptions import RequestException

from blocks.config.paths import data_folder, scratch_folder
from blocks.engines.docker import guard as docker_guard
from blocks.engines.docker.checkpoints import Checkpoint
from blocks.engines.docker.images import usable_image
from blocks.engines.docker.limits import Limits, change, read_limits
from blocks.engines.docker.logs import Printed
from blocks.engines.docker.output import RefusedOutput, members, move_into, unpack
from blocks.engines.docker.stage import (
    CHECKPOINT,
    OUTPUT,
    Machine,
    User,
    keeper_options,
    memory_limit,
    met_limit,
    model_options,
    volume_options,
    write_spec,
)
from blocks.engines.process import (
    DESCRIBE_LIMIT_S,
    LAST_LINES,
    WAIT_S,
    Event,
    ModelFailed,
    Stage,
    Usage,
    described,
    device_of,
    ending_of,
    event_of,
    split_lines,
    where_to_change,
)
from blocks.local.cancellation import kill_on_stop, raise_if_stopped
from blocks.local.gpus import GPUS, NONE, Gpu
from blocks.local.processes import is_dead, name_this_process
from blocks.local.scratch import scratch
from core.errors import UserError
from model_containers.contract import Description

LOG = logging.getLogger("calipert.engines")

# Labels of all that a stage makes. Its owner: the process that runs it, as blocks.local.processes names it.
STAGE, OWNER, DATA, GPU = "calipert.stage", "calipert.owner", "calipert.data", "calipert.gpu"
METER_S = 1.0
# How long the guard may take in the end before it is left to itself.
GUARD_LIMIT_S = 120.0
GUARD = Path(docker_guard.__file__)
CHUNK = 2**20
NO_GPU = ("could not select device driver", "nvidia-container-cli", "unknown or invalid runtime", "cdi device")


class DockerEngine(Block):
    """Runs a model's stage in a container of its image, behind walls: docs/containers.md says which, and their limits.

    The contract is that of the other engines.
    """

    _block_type_name = "Calipert Docker engine"
    _block_type_slug = "calipert-docker-engine"

    limits: Limits = Field(default_factory=read_limits, description="What a container may use of the machine.")

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
        """Run a stage of a model in a container and wait for its end.

        spec: the stage's JSON (docs/models.md) with paths of this machine; the container sees those files and folders
        alone. on_event: called in this thread with each event that the model prints; any other line becomes a log
        event. timeout_s: wall-clock limit in seconds. gpu: the leased one that the container gets.
        The output reaches the spec's folder whole, and only after a good end; the spec's `checkpoint` now and then
        while the model runs (blocks.engines.docker.checkpoints).
        Raises ModelFailed if the model exits with an error, meets a limit, or writes what is no plain file or folder,
        UserError if the engine, the image or a GPU cannot be used, and Stopped if its flow ends meanwhile or has ended.
        Whatever ends this call, be it the death of this process by any signal, removes the containers and volumes;
        the GPU stays leased until they are gone.
        """
        name = f"{model_folder.name} {stage}"
        raise_if_stopped(name)
        deadline = float("inf") if timeout_s is None else monotonic() + timeout_s
        with docker_client() as client, _explained(model_folder.name, stage, gpu):
            _remove_leftovers(client)
            image = usable_image(client, model_folder)
            if gpu is not None:
                _require_unused(client, gpu, model_folder.name, stage)
            one = _Stage(client, str(image.id), model_folder.name, stage, self.limits, on_event, timeout_s, deadline)
            with scratch(scratch_folder(), "stage") as folder, _Guard(client, one.id, gpu) as guard:
                one.guard = guard
                with kill_on_stop(name, guard.remove):
                    return one.run(spec, folder, gpu)

    def describe(self, model_folder: Path) -> Description:
        """What a model says that it can do and needs. Raises ModelFailed unless it says so as the contract wants."""
        return described(self.run, model_folder, DESCRIBE_LIMIT_S)

    def identity(self, model_folder: Path) -> str:
        """The id of a model's image, `sha256:...`: all that decides the model's results is in it.

        Raises UserError if there is no usable image of it.
        """
        with docker_client() as client, _explained(model_folder.name, "describe", None):
            return str(usable_image(client, model_folder).id)


class _Stage:
    """One stage from the making of its containers to the fetching of its output; the guard removes all of it."""

    def __init__(
        self,
        client: docker.DockerClient,
        image: str,
        model: str,
        stage: Stage,
        limits: Limits,
        on_event: Callable[[Event], None],
        timeout_s: float | None,
        deadline: float,
    ) -> None:
        self.client = client
        self.image = image
        self.model = model
        self.stage = stage
        self.limits = limits
        self.on_event = on_event
        self.timeout_s = timeout_s
        self.deadline = deadline
        self.id = uuid4().hex
        self.guard: _Guard
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.meter = _Meter()
        self.checkpoint: Checkpoint | None = None

    def run(self, spec: Mapping[str, Any], folder: Path, gpu: Gpu | None) -> Usage:
        info = self.client.info()
        machine, user = Machine(info["NCPU"], info["MemTotal"]), User.of_container()
        named = f"calipert-{self.model}-{self.stage}-{self.id[:12]}"
        labels = {STAGE: self.id, OWNER: name_this_process(), DATA: str(data_folder())}
        labels |= {} if gpu is None else {GPU: gpu.id}
        mounts = write_spec(spec, folder / "spec.json", user)
        create = self.client.containers.create
        kept = spec.get("checkpoint")
        volumes = {place: f"{named}-{place[1:]}" for place in ([OUTPUT] if kept is None else [OUTPUT, CHECKPOINT])}
        for volume in volumes.values():
            self.client.volumes.create(volume, driver="local", driver_opts=volume_options(self.limits), labels=labels)
        keeper = create(name=f"{named}-keeper", labels=labels, **keeper_options(self.image, volumes, user))
        options = model_options(
            self.image, self.stage, mounts, volumes, user, self.limits, machine, int(spec.get("threads", 1)), gpu
        )
        container = create(name=named, labels=labels, **options)
        keeper.start()
        if kept is not None:
            self.checkpoint = Checkpoint(container, Path(kept), self.limits, user, self._check)
            self.checkpoint.restore()
        printed = Printed(container)
        try:
            container.start()
            printed.start()
            self._follow(container, printed)
            state = self._end(container)
        finally:
            printed.leave()
        usage = self._judged(state, memory_limit(self.limits, machine), gpu)
        self._fetch(container, folder / "output", Path(spec["output"]))
        return usage

    def _follow(self, container: Container, printed: Printed) -> None:
        """Hand on what the model prints, to its end. Raises ModelFailed when a limit is reached."""
        rests: dict[bool, bytes] = {True: b"", False: b""}
        size = 0
        while True:
            self._look(container)
            try:
                chunk = printed.chunks.get(timeout=max(0.0, min(WAIT_S, self.deadline - monotonic())))
            except queue.Empty:
                continue
            if chunk is None:
                break
            size += len(chunk.data)
            if size > self.limits.printed:
                limit = self.limits.printed.human_readable()
                raise self._failure(f"was stopped after it had printed {limit}, its limit{change('printed')}")
            lines, rests[chunk.stdout] = split_lines(rests[chunk.stdout], chunk.data)
            for line in lines:
                self._check()
                self._hand_on(line, chunk.stdout)
        for stdout, rest in rests.items():
            for line in split_lines(rest, b"")[0]:
                self._hand_on(line, stdout)

    def _hand_on(self, line: str, stdout: bool) -> None:
        if stdout:
            self.on_event(event_of(line))
        else:
            self.last.append(line)

    def _look(self, container: Container) -> None:
        """What is to be done now and then while the container runs. Raises what ends a stage before its own end."""
        self._check()
        self.meter.read(container)
        if self.checkpoint is not None:
            try:
                self.checkpoint.keep()
            except RefusedOutput as error:
                raise self._failure(f"wrote what is refused as a checkpoint: {error}") from error

    def _check(self) -> None:
        """Raise what ends a stage before its own end."""
        raise_if_stopped(f"{self.model} {self.stage}")
        if monotonic() >= self.deadline:
            raise self._failure(f"was stopped after {self.timeout_s:g} s, its limit{where_to_change(self.stage)}")
        if self.guard.is_gone():
            raise self._failure("was given up: the process that watches over its container was killed")

    def _end(self, container: Container) -> dict[str, Any]:
        """The state of the container once it has ended, which may be long after it closed its streams."""
        while True:
            container.reload()
            if container.status in ("exited", "dead"):
                state: dict[str, Any] = container.attrs["State"]
                return state
            self._look(container)
            with suppress(RequestException):  # it still runs
                container.wait(timeout=WAIT_S)

    def _judged(self, state: Mapping[str, Any], memory: int, gpu: Gpu | None) -> Usage:
        """What the stage took. Raises ModelFailed unless it ended well."""
        code = int(state["ExitCode"])
        exit_code = 128 - code if code > 128 and code - 128 in set(signal.Signals) else code
        # First, whatever the exit code: a model may go on without the child that was killed.
        if state["OOMKilled"]:
            raise self._failure(
                f"ran out of memory, of which it may use {memory / 2**30:.3g} GiB{change('memory')}", exit_code
            )
        if exit_code:
            raise self._failure(ending_of(exit_code) + met_limit(list(self.last)), exit_code)
        began, ended = (_moment(state[name]) for name in ("StartedAt", "FinishedAt"))
        seconds = (ended - began).total_seconds()
        return Usage(seconds, self.meter.cpu_seconds, self.meter.peak_memory_bytes, device_of(gpu))

    def _fetch(self, container: Container, folder: Path, output: Path) -> None:
        folder.mkdir()
        try:
            # What is refused is not read to its end, and the engine removes no container that it still reads.
            with closing(container.get_archive(OUTPUT, chunk_size=CHUNK)[0]) as chunks:
                found = members(chunks, OUTPUT, int(self.limits.output), self.limits.output_files)
                unpack(found, folder)
            move_into(folder, output)
        except RefusedOutput as error:
            raise self._failure(f"wrote what is refused: {error}", 0) from error

    def _failure(self, ending: str, exit_code: int | None = None) -> ModelFailed:
        return ModelFailed(self.model, self.stage, ending, exit_code, tuple(self.last))


class _Meter:
    """What a container took when it was last looked at, once a second; None before the first time.

    cpu_seconds: of all its processes. peak_memory_bytes: the most that was seen at one time, of all its processes
    together, files in memory not counted.
    """

    def __init__(self) -> None:
        self.cpu_seconds: float | None = None
        self.peak_memory_bytes: int | None = None
        self._next = 0.0

    def read(self, container: Container) -> None:
        if monotonic() < self._next:
            return
        self._next = monotonic() + METER_S
        found = container.client.api.stats(container.id, stream=False, one_shot=True)
        memory = found.get("memory_stats", {}).get("stats", {})
        used = memory.get("anon", memory.get("rss"))  # of cgroups, version 2 or 1
        # Nothing of it is there after the container's end.
        if used is not None:
            self.cpu_seconds = found["cpu_stats"]["cpu_usage"]["total_usage"] / 1e9
            self.peak_memory_bytes = max(used, self.peak_memory_bytes or 0)


class _Guard:
    """The process that removes a stage's containers and volume at the end of the block, and if this process dies.

    It holds the lock of the GPU. To say `remove` is one write to a pipe, which a signal's handler may do.
    """

    def __init__(self, client: docker.DockerClient, stage_id: str, gpu: Gpu | None) -> None:
        self._client = client
        self._label = f"{STAGE}={stage_id}"
        self._gpu = gpu

    def __enter__(self) -> _Guard:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(GUARD), str(os.getpid()), self._label],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=() if self._gpu is None else (self._gpu.descriptor,),
            # A signal for the flow's group, as of ctrl-C, is not for it.
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._say(docker_guard.END)
        try:
            said = self._process.communicate(timeout=GUARD_LIMIT_S)[1]
        except subprocess.TimeoutExpired:
            LOG.error("what is labelled %s is still there after %g s; it is tried on", self._label, GUARD_LIMIT_S)
            return
        if self._process.returncode:
            LOG.warning("the guard of %s has failed: %s", self._label, said.decode(errors="replace")[-2000:])
            docker_guard.remove(self._client, self._label)

    def remove(self) -> None:
        """Have all removed now."""
        self._say(docker_guard.REMOVE)

    def is_gone(self) -> bool:
        return self._process.poll() is not None

    def _say(self, word: bytes) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it was killed
                self._process.stdin.write(word)


def _remove_leftovers(client: docker.DockerClient) -> None:
    """Remove what processes left that used this data folder and are certainly dead; their guards may be at it, too."""
    label = {"label": f"{DATA}={data_folder()}"}
    made = [*client.api.containers(all=True, filters=label), *(client.api.volumes(filters=label)["Volumes"] or [])]
    for stage_id in {thing["Labels"][STAGE] for thing in made if is_dead(thing["Labels"][OWNER])}:
        LOG.warning("removing the containers of a stage that a killed process left (%s)", stage_id)
        docker_guard.remove(client, f"{STAGE}={stage_id}")


def _require_unused(client: docker.DockerClient, gpu: Gpu, model: str, stage: Stage) -> None:
    """Raise ModelFailed where a container uses the GPU although this process has leased it: of another data folder,
    whose flow and guard were killed, or with lock files elsewhere."""
    users = client.api.containers(filters={"label": f"{GPU}={gpu.id}"})
    if users:
        name = users[0]["Names"][0].removeprefix("/")
        ending = (
            f"cannot have GPU {gpu.id}: the container {name} uses it. If nobody waits for it, `docker rm -f {name}`"
        )
        raise ModelFailed(model, stage, ending, None, ())


@contextmanager
def docker_client() -> Iterator[docker.DockerClient]:
    """A client of the engine of this machine, or of the one that DOCKER_HOST names. Raises UserError without one."""
    try:
        client = DockerHost().get_client()
    except (DockerException, RequestException) as error:
        remedy = (
            "start it (`systemctl start docker`) and let this user reach it, or name another with DOCKER_HOST;"
            " CALIPERT_ENGINE=process runs models without containers"
        )
        raise UserError("Docker", "engine", f"no answer: {error}", remedy) from error
    try:
        yield client
    finally:
        client.close()


@contextmanager
def _explained(model: str, stage: Stage, gpu: Gpu | None) -> Iterator[None]:
    """Errors of the Docker API as what they mean to a user."""
    try:
        yield
    except APIError as error:
        what = str(error.explanation or error)
        if gpu is not None and any(said in what.lower() for said in NO_GPU):
            remedy = f"install the NVIDIA container toolkit (docs/containers.md), or set {GPUS}={NONE} to use the CPU"
            raise UserError("Docker", f"GPU {gpu.id}", what, remedy) from error
        raise ModelFailed(model, stage, f"could not be run by Docker: {what}", None, ()) from error
    except (DockerException, RequestException) as error:
        raise ModelFailed(model, stage, f"was given up: the Docker engine is lost: {error}", None, ()) from error


def _moment(text: str) -> datetime:
    """A time as Docker writes it, with nanoseconds, which are more than Python 3.11 reads."""
    whole, _, rest = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}.{rest[:6]:0<6}+00:00")
