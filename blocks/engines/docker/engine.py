"""The engine of containers: each stage of a model is one container of the model's image on this machine."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import docker
from docker.errors import APIError, DockerException
from docker.models.containers import Container
from prefect_docker.host import DockerHost
from requests.exceptions import RequestException

from blocks.config.paths import data_folder, scratch_folder
from blocks.engines.base import WAIT_S, Engine, ModelFailed, Stage, StageRun, Usage, count_seconds, describe_exit
from blocks.engines.docker import guard as docker_guard
from blocks.engines.docker.checkpoints import FILE, Checkpoint
from blocks.engines.docker.images import find_image
from blocks.engines.docker.limits import Limits, how_to_change, read_limits
from blocks.engines.docker.logs import start
from blocks.engines.docker.output import RefusedOutput, move_into, open_folder, unpack
from blocks.engines.docker.stage import (
    CHECKPOINT,
    OUTPUT,
    describe_limit_met,
    keeper_options,
    memory_limit,
    model_options,
    volume_options,
    write_spec,
)
from blocks.local.cancellation import kill_on_stop, raise_if_stopped
from blocks.local.gpus import GPUS, NONE, Gpu
from blocks.local.processes import is_dead, name_this_process
from blocks.local.scratch import scratch
from core.errors import UserError

LOG = logging.getLogger("calipert.engines")

# Labels of all that a stage creates. Its owner: the process that runs it, as blocks.local.processes names it.
STAGE, OWNER, DATA, GPU = "calipert.stage", "calipert.owner", "calipert.data", "calipert.gpu"
METER_S = 1.0
# How long the guard may take in the end before this process goes on without it.
GUARD_LIMIT_S = 120.0
GUARD = Path(docker_guard.__file__)
NO_GPU = ("could not select device driver", "nvidia-container-cli", "unknown or invalid runtime", "cdi device")


@dataclass(frozen=True)
class DockerEngine(Engine):
    """Runs a model's stage in an isolated container of its image: docs/containers.md says how, and within which limits.

    limits: what a container may use of the machine.
    """

    limits: Limits = field(default_factory=read_limits)

    def run_stage(self, run: StageRun) -> Usage:
        """Run a stage in a container that sees the files and folders of the spec alone.

        The output reaches the spec's folder whole, and only after a good end; the spec's `checkpoint` now and then
        while the model runs (blocks.engines.docker.checkpoints). What the model writes is refused unless it is plain
        files and folders. Whatever ends this call removes the containers and volumes.
        """
        raise_if_stopped(run.name)
        with connect() as client, _explain_errors(run.model, run.stage, run.gpu):
            _remove_leftovers(client)
            image = find_image(client, run.model_folder)
            _require_unused(client, run)
            stage_id = uuid4().hex
            with (
                scratch(scratch_folder(), "stage") as folder,
                _start_guard(client, f"{STAGE}={stage_id}", run.gpu) as guard,
                kill_on_stop(run.name, partial(_tell, guard, docker_guard.REMOVE)),
            ):
                return _StageContainer(client, stage_id, run, self.limits, guard).run_to_end(str(image.id), folder)

    def identity(self, model_folder: Path) -> str:
        """Return the id of a model's image, `sha256:...`: all that decides the model's results is in it.

        Raises UserError if there is no usable image of it.
        """
        with connect() as client, _explain_errors(model_folder.name, "describe", None):
            return str(find_image(client, model_folder).id)


@dataclass
class _Meter:
    """What a container took when it was last measured, once a second; None before the first time.

    cpu_seconds: of all its processes. peak_memory_bytes: the most that was seen at one time, of all its processes
    together, files in memory not counted.
    """

    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    due: float = 0.0

    def read(self, container: Container) -> None:
        if monotonic() < self.due:
            return
        self.due = monotonic() + METER_S
        found = container.client.api.stats(container.id, stream=False, one_shot=True)
        memory = found.get("memory_stats", {}).get("stats", {})
        used = memory.get("anon", memory.get("rss"))  # of cgroups, version 2 or 1
        # Nothing of it is there after the container's end.
        if used is not None:
            self.cpu_seconds = found["cpu_stats"]["cpu_usage"]["total_usage"] / 1e9
            self.peak_memory_bytes = max(used, self.peak_memory_bytes or 0)


@dataclass
class _StageContainer:
    """One stage from the creation of its containers to the download of its output; the guard removes all of it."""

    client: docker.DockerClient
    id: str
    run: StageRun
    limits: Limits
    guard: subprocess.Popen[bytes]
    meter: _Meter = field(default_factory=_Meter)
    checkpoint: Checkpoint | None = None

    def run_to_end(self, image: str, folder: Path) -> Usage:
        """Run the stage and bring out its output. folder: an empty one for temporary files."""
        run, spec = self.run, self.run.spec
        machine = self.client.info()
        named = f"calipert-{run.model}-{run.stage}-{self.id[:12]}"
        labels = {STAGE: self.id, OWNER: name_this_process(), DATA: str(data_folder())}
        labels |= {} if run.gpu is None else {GPU: run.gpu.id}
        mounts = write_spec(spec, folder / "spec.json")
        create = self.client.containers.create
        kept = spec.get("checkpoint")
        volumes = {place: f"{named}-{place[1:]}" for place in ([OUTPUT] if kept is None else [OUTPUT, CHECKPOINT])}
        for volume in volumes.values():
            self.client.volumes.create(volume, driver="local", driver_opts=volume_options(self.limits), labels=labels)
        keeper = create(name=f"{named}-keeper", labels=labels, **keeper_options(image, volumes))
        options = model_options(image, run, mounts, volumes, self.limits, machine)
        container = create(name=named, labels=labels, **options)
        keeper.start()
        if kept is not None:
            self.checkpoint = Checkpoint(container, Path(kept) / FILE, self.limits, self._check)
            self.checkpoint.restore()
        self._follow(container)
        usage = self._judge_end(self._wait_for_end(container), memory_limit(self.limits, machine))
        self._download(container, folder / "output", Path(spec["output"]))
        return usage

    def _follow(self, container: Container) -> None:
        """Start the model, and pass on what it prints, to its end. Raises ModelFailed when a limit is reached."""
        size = 0
        with closing(start(container)) as printed:
            for stdout, chunk in printed:
                self._look(container)
                size += len(chunk)
                if size > self.limits.printed:
                    limit = self.limits.printed.human_readable()
                    change = how_to_change("printed")
                    raise self.run.failure(f"was stopped after it had printed {limit}, its limit{change}")
                if chunk:
                    self.run.pass_on(stdout, chunk, self._check)
        for stdout in self.run.rests:
            self.run.pass_on(stdout, b"", self._check)

    def _look(self, container: Container) -> None:
        """Do what is due while the container runs. Raises what ends a stage before its own end."""
        self._check()
        self.meter.read(container)
        if self.checkpoint is not None:
            try:
                self.checkpoint.keep()
            except RefusedOutput as error:
                raise self.run.failure(f"wrote what is refused as a checkpoint: {error}") from error

    def _check(self) -> None:
        """Raise what ends a stage before its own end."""
        self.run.check()
        if self.guard.poll() is not None:
            raise self.run.failure("was given up: the process that guards its container was killed")

    def _wait_for_end(self, container: Container) -> dict[str, Any]:
        """Return the container's state once it has ended, which may be long after it closed its streams."""
        while True:
            container.reload()
            if container.status in ("exited", "dead"):
                state: dict[str, Any] = container.attrs["State"]
                return state
            self._look(container)
            with suppress(RequestException):  # it still runs
                container.wait(timeout=WAIT_S)

    def _judge_end(self, state: Mapping[str, Any], memory: int) -> Usage:
        """Return what the stage took. Raises ModelFailed unless it ended well."""
        code = int(state["ExitCode"])
        exit_code = 128 - code if code > 128 and code - 128 in set(signal.Signals) else code
        # First, whatever the exit code: a model may go on without the child that was killed.
        if state["OOMKilled"]:
            limit = f"{memory / 2**30:.3g} GiB{how_to_change('memory')}"
            raise self.run.failure(f"ran out of memory, of which it may use {limit}", exit_code)
        if exit_code:
            raise self.run.failure(describe_exit(exit_code) + describe_limit_met(list(self.run.last)), exit_code)
        seconds = count_seconds(state["StartedAt"], state["FinishedAt"])
        return Usage(seconds, self.meter.cpu_seconds, self.meter.peak_memory_bytes, self.run.device)

    def _download(self, container: Container, folder: Path, output: Path) -> None:
        folder.mkdir()
        try:
            with open_folder(container, OUTPUT, self.limits, partial(raise_if_stopped, self.run.name)) as found:
                unpack(found, folder)
            move_into(folder, output)
        except RefusedOutput as error:
            raise self.run.failure(f"wrote what is refused: {error}", 0) from error


@contextmanager
def _start_guard(client: docker.DockerClient, label: str, gpu: Gpu | None) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process that removes a stage's containers and volumes at the end of the block, or if this process dies.

    It holds the lock of the GPU.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", str(GUARD), str(os.getpid()), label],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        bufsize=0,
        pass_fds=() if gpu is None else (gpu.descriptor,),
        # A signal for the flow's group, as of ctrl-C, must not reach it.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _tell(process, docker_guard.END)
        try:
            said = process.communicate(timeout=GUARD_LIMIT_S)[1]
        except subprocess.TimeoutExpired:
            LOG.error("what is labelled %s is still there after %g s; its guard goes on", label, GUARD_LIMIT_S)
        else:
            if process.returncode:
                LOG.warning("the guard of %s failed: %s", label, said.decode(errors="replace")[-2000:])
                docker_guard.remove(client, label)


def _tell(guard: subprocess.Popen[bytes], word: bytes) -> None:
    """Tell a guard what to do: one write to a pipe, which a signal's handler may do."""
    if guard.stdin is not None:
        with suppress(BrokenPipeError):  # it was killed
            guard.stdin.write(word)


def _remove_leftovers(client: docker.DockerClient) -> None:
    """Remove what processes left that used this data folder and are certainly dead.

    Their guards may remove it at the same time.
    """
    label = {"label": f"{DATA}={data_folder()}"}
    found = [*client.api.containers(all=True, filters=label), *(client.api.volumes(filters=label)["Volumes"] or [])]
    for stage_id in {thing["Labels"][STAGE] for thing in found if is_dead(thing["Labels"][OWNER])}:
        LOG.warning("removing the containers of a stage that a killed process left (%s)", stage_id)
        docker_guard.remove(client, f"{STAGE}={stage_id}")


def _require_unused(client: docker.DockerClient, run: StageRun) -> None:
    """Raise ModelFailed where a container uses the GPU although this process has leased it.

    Such a container is of another data folder, whose flow and guard were killed, or its lock files are elsewhere.
    """
    if run.gpu is None:
        return
    users = client.api.containers(filters={"label": f"{GPU}={run.gpu.id}"})
    if users:
        name = users[0]["Names"][0].removeprefix("/")
        remedy = f"if it is not needed any more, `docker rm -f {name}`"
        raise run.failure(f"cannot have GPU {run.gpu.id}: the container {name} uses it; {remedy}")


@contextmanager
def connect() -> Iterator[docker.DockerClient]:
    """Connect to the engine of this machine, or to the one that DOCKER_HOST names. Raises UserError without one."""
    try:
        client = DockerHost().get_client()
    except (DockerException, RequestException) as error:
        remedy = (
            "start it (`systemctl start docker`) and let this user reach it, or name another with DOCKER_HOST;"
            " CALIPERT_ENGINE=process runs models without containers"
        )
        raise UserError("Docker", "engine", f"no answer: {error}", remedy) from error
    with closing(client):
        yield client


@contextmanager
def _explain_errors(model: str, stage: Stage, gpu: Gpu | None) -> Iterator[None]:
    """Turn errors of the Docker API into what they mean to a user."""
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
