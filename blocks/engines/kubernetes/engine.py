"""The engine of a cluster: each stage of a model is one Kubernetes Job, whose folders travel through the bucket."""

from __future__ import annotations

import json
import logging
import queue
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import ClassVar
from uuid import uuid4

from blocks.config.paths import scratch_folder, store_folder
from blocks.config.settings import read_settings
from blocks.engines.base import LAST_LINES, WAIT_S, Engine, ModelFailed, StageRun, Usage, count_seconds
from blocks.engines.kubernetes import status
from blocks.engines.kubernetes.api import Api, Object, RequestFailed, is_lost, read_attempt
from blocks.engines.kubernetes.job import (
    MODEL,
    SETTINGS,
    Cluster,
    StageJob,
    read_cluster,
    require_digest,
    translate_spec,
)
from blocks.engines.kubernetes.logs import Follower
from blocks.engines.kubernetes.transfer import download, open_bucket
from blocks.engines.lines import read_event
from blocks.local.cancellation import kill_on_stop, raise_if_stopped
from blocks.local.scratch import scratch
from blocks.store.bucket import DamagedFolder, ObjectStore
from core.errors import UserError

LOG = logging.getLogger("calipert.engines")

POLL_S = 2.0
# How long a container's start may fail before the stage does: registries hiccup.
START_PROBLEM_LIMIT_S = 180.0
# How long a deleted Job may take to go: its pod's node may be busy.
GONE_LIMIT_S = 120.0
# At the end: a user who cancels waits for it.
TIDY_LIMIT_S = 20.0


@dataclass(frozen=True)
class KubernetesEngine(Engine):
    """Runs a model's stage as a Job in a cluster, in the model's own image; docs/kubernetes.md says how and what with.

    Inputs are artifacts of the store and reach the Job through the bucket that CALIPERT_STORE names, as its output
    comes back. settings: the file with the settings of the cluster.
    """

    # An image of many gigabytes may have to be pulled first.
    describe_limit_s: ClassVar[float] = 3600.0

    settings: str = field(default_factory=lambda: str(read_settings().kubernetes or ""))

    def run_stage(self, run: StageRun) -> Usage:
        """Run a stage as a Job, delete the Job at the end, and first what a killed process left of the same stage.

        The paths in the spec are those of artifacts in the local store, which the bucket must have too, and the folder
        `output`. Lines of stderr are events as well: Kubernetes keeps both streams as one. The time limit counts from
        the moment that a node takes the Job's pod. No GPU may be leased: the cluster gives its own GPUs to Jobs.
        Raises ModelFailed if the Job does not end well, UserError for wrong settings and errors of the bucket or API.
        """
        from prefect.runtime import flow_run

        if run.gpu is not None:
            raise ValueError("a GPU of this machine was leased for a Job, which gets its own from the cluster")
        cluster, store, own = self._cluster(run.model), open_bucket(), read_settings()
        job = StageJob(
            cluster=cluster,
            run=run,
            inputs=translate_spec(run.spec, store_folder()),
            store=store.url,
            flow_run=flow_run.id,
            attempt=uuid4().hex,
            # Set by the pods of flow runs (deployments/kubernetes/pools): in which this process runs.
            owner=(own.pod_name, own.pod_uid) if own.pod_name and own.pod_uid else None,
        )
        # A stop is heard between two looks at the Job.
        with kill_on_stop(run.name, lambda: None), closing(_Watch(job)) as watch, _explain_errors(watch):
            return watch.run_to_end(store, Path(run.spec["output"]))

    def identity(self, model_folder: Path) -> str:
        """Return the digest of a model's image, `sha256:...`: it decides the model's results.

        Raises UserError if the settings name no image for it, or one without a digest.
        """
        return self._cluster(model_folder.name).models[model_folder.name].image.rpartition("@")[2]

    def _cluster(self, model: str) -> Cluster:
        """Read the settings. Raises UserError unless they name this model, and its image by a digest."""
        if not self.settings:
            remedy = "set it to the file of the cluster's settings (docs/kubernetes.md)"
            raise UserError("environment", SETTINGS, "no file", remedy)
        cluster = read_cluster(Path(self.settings))
        if model not in cluster.models:
            remedy = "add its image and what its container gets (docs/kubernetes.md)"
            raise UserError(self.settings, f"models.{model}", "no entry", remedy)
        require_digest(cluster.models[model].image, self.settings, f"models.{model}.image")
        return cluster


class _Watch:
    """One Job from its creation to its removal."""

    def __init__(self, job: StageJob) -> None:
        self.job = job
        self.api = Api(job.cluster.api, job.cluster.namespace, self._pause)
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.follower: Follower | None = None
        self.last_message: str | None = None

    def run_to_end(self, store: ObjectStore, output: Path) -> Usage:
        """Start the Job, wait for it, download its output into a folder, beside what is there, and remove it."""
        job = self.job
        self._remove_old()
        _remove_folders(store, job)
        well = False
        try:
            with scratch(scratch_folder(), "spec") as folder:
                (folder / "spec.json").write_text(json.dumps(job.inputs.spec), encoding="utf-8")
                store.put(folder, job.specification)
            self.api.create_job(job.manifest())
            usage = self._wait()
            well = True
            with scratch(scratch_folder(), "output") as folder:
                if not download(store, job.output, folder):
                    raise self.failure("ended well, but its output is not in the bucket", 0)
                for path in sorted(folder.iterdir()):
                    shutil.move(path, output / path.name)
            return usage
        finally:
            self._tidy(store, well)

    def close(self) -> None:
        """End the connections to the API."""
        if self.follower is not None:
            self.follower.stop()
            self.follower.join()
        self.api.close()

    def _remove_old(self) -> None:
        """Delete the Job that a killed flow left under this name, and wait until it is gone."""
        end, name = monotonic() + GONE_LIMIT_S, self.job.name
        old = self.api.job(name)
        if old is not None:
            LOG.warning("removing the Job %s, which an earlier run left", name)
        while old is not None:
            self.api.delete_job(name, old["metadata"]["uid"])
            if monotonic() >= end:
                deleted = f"was deleted {GONE_LIMIT_S:g} s ago and is still there; see `kubectl describe job`"
                raise self.failure(f"cannot start: its Job of an earlier run, {name}, {deleted}")
            self._pause(POLL_S)
            old = self.api.job(name)

    def _wait(self) -> Usage:
        """Pass on what the model prints until the Job has ended. Raises ModelFailed unless it ended well."""
        began = monotonic()
        problems_since: dict[str, float] = {}
        begun = False
        while True:
            self._pause(POLL_S)
            pod = self._pod()
            if pod is None:
                if not begun:
                    self._limit_pending(began, "no pod was made for its Job yet")
                continue
            self._follow(pod)
            if (end := status.read_ending(pod, self.job)) is not None:
                return self._judge_end(pod, end)
            begun = begun or status.has_begun(pod)
            if (problem := status.find_start_problem(pod)) is not None:
                container, what = problem
                self._log_once(f"cannot start: {what}")
                # The reasons of one image that cannot be pulled alternate: only the container's start ends the problem.
                if monotonic() - problems_since.setdefault(container, monotonic()) >= START_PROBLEM_LIMIT_S:
                    raise self.failure(f"could not start within {START_PROBLEM_LIMIT_S:g} s: {what}")
                continue
            if not begun:
                waits = status.find_scheduling_problem(pod)
                self._limit_pending(began, f"no node takes its pod: {waits}" if waits else "a node prepares its pod")

    def _pod(self) -> Object | None:
        """Return the pod, None where there is none yet. Raises ModelFailed if there will be none."""
        pod = self.api.pod(self.job.selector)
        if pod is not None:
            return pod
        job = self.api.job(self.job.name)
        if job is None:
            raise self.failure("lost its Job, which was deleted from outside")
        if read_attempt(job) != self.job.attempt:
            raise self.failure("lost its Job to another flow run that does the same")
        why = status.find_job_failure(job)
        if why is not None:
            raise self.failure(f"lost its pod: {why}")
        return None

    def _limit_pending(self, began: float, why: str) -> None:
        self._log_once(f"waits: {why}")
        limit = self.job.cluster.pending_limit_s
        if monotonic() - began >= limit:
            raise self.failure(f"did not start within {limit:g} s: {why}")

    def _follow(self, pod: Object) -> None:
        """Read the model's log from its start on, and to its end."""
        state = status.read_model_state(pod)
        if self.follower is None and state.keys() & {"running", "terminated"}:
            self.follower = Follower(self.api, pod["metadata"]["name"], MODEL, self.lines)
            self.follower.start()
        if self.follower is not None and "terminated" in state:
            self.follower.over.set()

    def _judge_end(self, pod: Object, end: status.Ending) -> Usage:
        if self.follower is not None:
            self.follower.over.set()
            while self.follower.is_alive():
                self._pause(WAIT_S)
            if self.follower.problem is not None:
                LOG.warning("%s: the end of its log is lost: %s", self.job.run.name, self.follower.problem)
        self._drain()
        if end.words is None:
            # Kubernetes keeps the times alone, in whole seconds.
            ended = status.read_model_state(pod)["terminated"]
            return Usage(count_seconds(ended["startedAt"], ended["finishedAt"]), None, None, self.job.device)
        if end.container != MODEL:
            self.job.run.last.extend(self.api.last_lines(pod["metadata"]["name"], end.container, LAST_LINES))
        raise self.failure(end.words, end.exit_code)

    def failure(self, words: str, exit_code: int | None = None) -> ModelFailed:
        """Create the error to raise, and first pass on all that the model printed up to now."""
        self._drain()
        return self.job.run.failure(words, exit_code)

    def _log_once(self, what: str) -> None:
        """Log a message once, until another one comes."""
        if what != self.last_message:
            LOG.info("%s %s", self.job.run.name, what)
            self.last_message = what

    def _pause(self, seconds: float) -> None:
        """Wait, and pass on what the model prints meanwhile. Raises Stopped with its flow."""
        end = monotonic() + seconds
        while (left := end - monotonic()) > 0:
            raise_if_stopped(self.job.run.name)
            self._pass_on(min(WAIT_S, left))
        raise_if_stopped(self.job.run.name)

    def _drain(self) -> None:
        """Pass on all that the model printed up to now."""
        while self._pass_on(0.0):
            pass

    def _pass_on(self, wait_s: float) -> bool:
        """Pass on the next line, if one comes in time."""
        try:
            line = self.lines.get(timeout=wait_s)
        except queue.Empty:
            return False
        event = read_event(line)
        if event.get("message") == line:
            self.job.run.last.append(line)
        self.job.run.on_event(event)
        return True

    def _tidy(self, store: ObjectStore, well: bool) -> None:
        """Delete the Job and what it left in the bucket. Logs what it could not do, and hides no other error.

        well: its pod has ended by itself.
        """
        job, name = self.job, self.job.name
        self.api.sleep, self.api.patience_s = sleep, TIDY_LIMIT_S
        try:
            # Read by its name: it may have been created although the answer was lost.
            created = self.api.job(name)
            if created is not None and read_attempt(created) == job.attempt:
                self.api.delete_job(name, created["metadata"]["uid"])
                end = monotonic() + TIDY_LIMIT_S
                # Until the pod is gone it may still write into the bucket.
                while not well and self.api.pod(job.selector) is not None and monotonic() < end:
                    sleep(WAIT_S)
            _remove_folders(store, job)
        except (RequestFailed, UserError, OSError) as error:
            left = "%s is over, but its Job %s or the folder .jobs/%s in the bucket is left: %s"
            LOG.error(left, job.run.name, name, name, error)


@contextmanager
def _explain_errors(watch: _Watch) -> Iterator[None]:
    """Turn errors of the API and the bucket into what they mean to a user."""
    try:
        yield
    except RequestFailed as error:
        if is_lost(error):
            asked = f"{error.request} ({watch.api.client.configuration.host})"
            raise watch.failure(f"was given up: the Kubernetes API is lost: {asked}: {error.found}") from error
        remedy = {
            401: "check the service account of this pod (deployments/kubernetes), or the login of `kubectl proxy`",
            403: "let the service account manage Jobs and read pods (deployments/kubernetes), within its quota",
            404: f"create the namespace {watch.job.cluster.namespace}, or correct the settings ({SETTINGS})",
        }.get(error.status, f"correct the settings ({SETTINGS}) as docs/kubernetes.md says")
        raise UserError("Kubernetes", error.request, error.found, remedy) from error
    except DamagedFolder as error:
        raise watch.failure(f"ended well, but its output in the bucket is damaged: {error}", 0) from error


def _remove_folders(store: ObjectStore, job: StageJob) -> None:
    store.remove(job.specification)
    store.remove(job.output)
