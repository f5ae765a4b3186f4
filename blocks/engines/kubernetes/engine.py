"""The engine of a cluster: each stage of a model is one Kubernetes Job, whose folders travel through the bucket."""

from __future__ import annotations

import json
import logging
import queue
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

from prefect.blocks.core import Block
from pydantic import Field

from blocks.config.paths import scratch_folder, store_folder
from blocks.config.settings import read_settings
from blocks.engines.kubernetes.api import Api, Object, OutOfReach, RequestRefused
from blocks.engines.kubernetes.job import (
    MODEL,
    SETTINGS,
    Cluster,
    Ending,
    StageJob,
    digest_of,
    ending,
    failed,
    has_begun,
    inside,
    model_state,
    read_cluster,
    trouble,
    unscheduled,
)
from blocks.engines.kubernetes.logs import Follower
from blocks.engines.kubernetes.transfer import download, object_store
from blocks.engines.process import LAST_LINES, WAIT_S, Event, ModelFailed, Stage, Usage, described, event_of
from blocks.local.cancellation import killed_by_stop
from blocks.local.gpus import Gpu
from blocks.local.scratch import scratch
from blocks.store.bucket import DamagedFolder, ObjectStore
from core.errors import UserError
from model_containers.contract import Description

LOG = logging.getLogger("calipert.engines")

# An image of many gigabytes may have to be pulled first.
DESCRIBE_LIMIT_S = 3600.0
POLL_S = 2.0
# How long a container's start may fail before the stage does: registries hiccup.
TROUBLE_LIMIT_S = 180.0
# How long a deleted Job may take to go: its pod's node may be busy.
GONE_LIMIT_S = 120.0
# In the end: whoever cancels waits for it.
TIDY_LIMIT_S = 20.0
# Set by the pods of flow runs (deployments/kubernetes/pools): which pod this process runs in.
POD_NAME, POD_UID = "CALIPERT_POD_NAME", "CALIPERT_POD_UID"


class KubernetesEngine(Block):
    """Runs a model's stage as a Job in a cluster, in the model's own image; docs/kubernetes.md says how and what with.

    The contract is that of the other engines. Inputs are artifacts of the store and reach the Job through the bucket
    that CALIPERT_STORE names, as its output comes back.
    """

    _block_type_name = "Calipert Kubernetes engine"
    _block_type_slug = "calipert-kubernetes-engine"

    settings: str = Field(
        default_factory=lambda: str(read_settings().kubernetes or ""),
        description="File with the settings of the cluster.",
    )

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
        """Run a stage of a model as a Job and wait for its end.

        spec: the stage's JSON (docs/models.md) with paths of this machine: of artifacts in the local store, which the
        bucket must have too, and the folder `output`. on_event: called in this thread with each event that the model
        prints; any other line, of stderr too, becomes a log event. timeout_s: counts from the moment that a node takes
        the Job's pod. gpu: must be None: the cluster hands its own GPUs to Jobs.
        Raises ModelFailed if the Job does not end well, UserError if the settings, the bucket or the API stand in the
        way, and Stopped if its flow ends meanwhile. Whatever ends this call deletes the Job, its pod before it; what a
        killed process left is deleted before the same stage starts again.
        """
        if gpu is not None:
            raise ValueError("a GPU of this machine was leased for a Job, which gets its own from the cluster")
        cluster, store = self._cluster(model_folder.name), object_store()
        job = StageJob(
            cluster=cluster,
            model=model_folder.name,
            stage=stage,
            inputs=inside(spec, store_folder()),
            store=store.url,
            timeout_s=timeout_s,
            flow_run=_flow_run(),
            attempt=uuid4().hex,
            owner=_own_pod(),
        )
        digest_of(job.pod.image, self.settings, f"models.{job.model}.image")
        stops: list[bool] = []
        with killed_by_stop(f"{job.model} {stage}", lambda: stops.append(True)):
            watch = _Watch(job, on_event, stops)
            try:
                with _explained(watch):
                    return watch.run(store, Path(spec["output"]))
            finally:
                watch.close()

    def describe(self, model_folder: Path) -> Description:
        """What a model says that it can do and needs. Raises ModelFailed unless it says so as the contract wants."""
        return described(self.run, model_folder, DESCRIBE_LIMIT_S)

    def identity(self, model_folder: Path) -> str:
        """The digest of a model's image, `sha256:...`: it decides the model's results.

        Raises UserError if the settings name no image for it, or one without a digest.
        """
        image = self._cluster(model_folder.name).models[model_folder.name].image
        return digest_of(image, self.settings, f"models.{model_folder.name}.image")

    def _cluster(self, model: str) -> Cluster:
        """The settings, which have this model."""
        if not self.settings:
            remedy = "set it to the file of the cluster's settings (docs/kubernetes.md)"
            raise UserError("environment", SETTINGS, "no file", remedy)
        cluster = read_cluster(Path(self.settings))
        if model not in cluster.models:
            remedy = "add its image and what its container gets (docs/kubernetes.md)"
            raise UserError(self.settings, f"models.{model}", "no entry", remedy)
        return cluster


class _Watch:
    """One Job from its making to its removal."""

    def __init__(self, job: StageJob, on_event: Callable[[Event], None], stops: list[bool]) -> None:
        self.job = job
        self.on_event = on_event
        self.stops = stops
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.api = Api(job.cluster.api, job.cluster.namespace, self._check)
        self.follower: Follower | None = None
        self.said: str | None = None

    def run(self, store: ObjectStore, output: Path) -> Usage:
        """Start the Job, wait for it, bring its output into a folder, remove it."""
        job = self.job
        self._remove_old()
        _remove_folders(store, job)
        well = False
        try:
            with scratch(scratch_folder(), "spec") as folder:
                (folder / "spec.json").write_text(json.dumps(job.inputs.spec), encoding="utf-8")
                store.put(folder, job.specification)
            self.api.create_job(job.manifest(), job.attempt)
            usage = self._wait()
            well = True
            if not _bring(store, job.output, output):
                raise self.failure("ended well, but its output is not in the bucket", 0)
            return usage
        finally:
            self._tidy(store, well)

    def close(self) -> None:
        if self.follower is not None:
            self.follower.stop()
            self.follower.join()
        self.api.close()

    def _check(self) -> None:
        """Raise what ends a stopped flow; `killed_by_stop` then says why it was."""
        if self.stops:
            raise InterruptedError

    def _remove_old(self) -> None:
        """Delete the Job that a killed flow left under this name, and wait until it is gone."""
        end = monotonic() + GONE_LIMIT_S
        said = False
        while (old := self.api.job(self.job.name)) is not None:
            if not said:
                LOG.warning("removing the Job %s, which an earlier run left", self.job.name)
                said = True
            self.api.delete_job(self.job.name, old["metadata"]["uid"])
            if monotonic() >= end:
                raise self.failure(
                    f"cannot start: its Job of an earlier run, {self.job.name}, was deleted {GONE_LIMIT_S:g} s ago and"
                    " is still there; see `kubectl describe job`"
                )
            self._pause()

    def _wait(self) -> Usage:
        """Hand on what the model prints until the Job has ended. Raises ModelFailed unless it has ended well."""
        began = monotonic()
        troubled: dict[str, float] = {}
        taken = False
        while True:
            self._pause()
            pod = self._pod()
            if pod is None:
                if not taken:
                    self._limit_pending(began, "no pod was made for its Job yet")
                continue
            if (end := ending(pod, self.job)) is not None:
                return self._ended(pod, end)
            taken = taken or has_begun(pod)
            if (state := model_state(pod)).keys() & {"running", "terminated"}:
                self._follow(pod, over="terminated" in state)
            if (problem := trouble(pod)) is not None:
                container, what = problem
                self._say(f"cannot start: {what}")
                # The reasons of one image that cannot be had alternate: only the container's start ends the trouble.
                if monotonic() - troubled.setdefault(container, monotonic()) >= TROUBLE_LIMIT_S:
                    raise self.failure(f"could not start within {TROUBLE_LIMIT_S:g} s: {what}")
                continue
            if not taken:
                waits = unscheduled(pod)
                self._limit_pending(began, f"no node takes its pod: {waits}" if waits else "a node prepares its pod")

    def _pod(self) -> Object | None:
        """The pod, None where there is none yet. Raises ModelFailed if there will be none."""
        pod = self.api.pod(self.job.selector)
        if pod is not None:
            return pod
        standing = self.api.job(self.job.name)
        if standing is None:
            raise self.failure("lost its Job, which somebody else deleted")
        if not self._is_own(standing):
            raise self.failure("lost its Job to another flow run that does the same")
        why = failed(standing)
        if why is not None:
            raise self.failure(f"lost its pod: {why}")
        return None

    def _limit_pending(self, began: float, why: str) -> None:
        self._say(f"waits: {why}")
        limit = self.job.cluster.pending_limit_s
        if monotonic() - began >= limit:
            raise self.failure(f"did not start within {limit:g} s: {why}")

    def _follow(self, pod: Object, over: bool) -> None:
        if self.follower is None:
            self.follower = Follower(self.api, pod["metadata"]["name"], MODEL)
            self.follower.start()
        if over:
            self.follower.finish()

    def _ended(self, pod: Object, end: Ending) -> Usage:
        state = model_state(pod)
        if "terminated" in state:
            self._follow(pod, over=True)
        self._drain()
        if end.words is None:
            return _usage(state["terminated"], self.job.device)
        if end.container != MODEL:
            self.last.extend(self.api.last_lines(pod["metadata"]["name"], end.container, LAST_LINES))
        raise self.failure(end.words, end.exit_code)

    def failure(self, words: str, exit_code: int | None = None) -> ModelFailed:
        """The error to raise, after all that the model printed up to now was handed on."""
        while self.follower is not None and self._hand_on(self.follower, 0.0):
            pass
        return ModelFailed(self.job.model, self.job.stage, words, exit_code, tuple(self.last))

    def _say(self, what: str) -> None:
        """Once, until something else is to be said."""
        if what != self.said:
            LOG.info("%s %s %s", self.job.model, self.job.stage, what)
            self.said = what

    def _pause(self) -> None:
        """Wait until it is time to look at the Job again, handing on what the model prints meanwhile."""
        end = monotonic() + POLL_S
        while (left := end - monotonic()) > 0:
            self._check()
            if self.follower is None:
                sleep(min(WAIT_S, left))
            else:
                self._hand_on(self.follower, min(WAIT_S, left))
        self._check()

    def _drain(self) -> None:
        """Hand on the rest of what the model printed."""
        if self.follower is None:
            return
        while self.follower.is_alive():
            self._check()
            self._hand_on(self.follower, WAIT_S)
        while self._hand_on(self.follower, 0.0):
            pass
        if self.follower.problem is not None:
            LOG.warning("%s %s: the end of its log is lost: %s", self.job.model, self.job.stage, self.follower.problem)

    def _hand_on(self, follower: Follower, wait_s: float) -> bool:
        """Hand on the next line, if one comes in time."""
        try:
            line = follower.lines.get(timeout=wait_s) if wait_s else follower.lines.get_nowait()
        except queue.Empty:
            return False
        event = event_of(line)
        if event.get("message") == line:
            self.last.append(line)
        self.on_event(event)
        return True

    def _tidy(self, store: ObjectStore, well: bool) -> None:
        """Delete the Job and what it left in the bucket. Says what it could not do, and hides no other error.

        well: its pod has ended by itself.
        """
        self.stops = []
        self.api.patience_s = TIDY_LIMIT_S
        try:
            # Asked for by its name: it may have been made although nobody got the answer.
            made = self.api.job(self.job.name)
            if made is not None and self._is_own(made):
                self.api.delete_job(self.job.name, made["metadata"]["uid"])
                end = monotonic() + TIDY_LIMIT_S
                # Until the pod is gone it may still write into the bucket.
                while not well and self.api.pod(self.job.selector) is not None and monotonic() < end:
                    sleep(WAIT_S)
            _remove_folders(store, self.job)
        except (RequestRefused, OutOfReach, UserError, OSError) as error:
            LOG.error(
                "%s %s is over, but its Job %s or the folder .jobs/%s in the bucket is left: %s",
                self.job.model,
                self.job.stage,
                self.job.name,
                self.job.name,
                error,
            )

    def _is_own(self, job: Object) -> bool:
        return bool(job["metadata"].get("labels", {}).get("calipert/attempt") == self.job.attempt)


@contextmanager
def _explained(watch: _Watch) -> Iterator[None]:
    """Errors of the API and the bucket as what they mean to a user."""
    try:
        yield
    except RequestRefused as error:
        remedy = {
            401: "check the service account of this pod (deployments/kubernetes), or the login of `kubectl proxy`",
            403: "let the service account manage Jobs and read pods (deployments/kubernetes), within its quota",
            404: f"make the namespace {watch.job.cluster.namespace}, or correct the settings ({SETTINGS})",
        }.get(error.status, f"correct the settings ({SETTINGS}) as docs/kubernetes.md says")
        raise UserError("Kubernetes", error.request, f"HTTP {error.status}: {error.message}", remedy) from error
    except OutOfReach as error:
        raise watch.failure(f"was given up: the Kubernetes API is lost: {error}") from error
    except DamagedFolder as error:
        raise watch.failure(f"ended well, but its output in the bucket is damaged: {error}", 0) from error


def _bring(store: ObjectStore, name: str, output: Path) -> bool:
    """Download a folder of the bucket and put what is in it into `output`, beside what is there; False where it is
    not in the bucket."""
    with scratch(scratch_folder(), "output") as folder:
        there = download(store, name, folder)
        for path in sorted(folder.iterdir()):
            shutil.move(path, output / path.name)
    return there


def _remove_folders(store: ObjectStore, job: StageJob) -> None:
    store.remove(job.specification)
    store.remove(job.output)


def _usage(terminated: Object, device: str) -> Usage:
    """What the model's container took, of which Kubernetes keeps the times alone, in whole seconds."""
    began, ended = (datetime.fromisoformat(terminated[name]) for name in ("startedAt", "finishedAt"))
    seconds = (ended - began).total_seconds()
    return Usage(seconds, cpu_seconds=None, peak_memory_bytes=None, device=device)


def _flow_run() -> str | None:
    from prefect.runtime import flow_run

    found: str | None = flow_run.id
    return found


def _own_pod() -> tuple[str, str] | None:
    own = read_settings()
    return (own.pod_name, own.pod_uid) if own.pod_name and own.pod_uid else None
