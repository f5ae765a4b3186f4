"""Trainings on other machines: each a flow run in the work pool `gpu`, which this flow waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Cancelling, Crashed

from blocks.config.pools import GPU
from blocks.services.pages import PAGE
from tasks.artifacts import LOG
from tasks.progress import make_progress_reporter
from tasks.record import find_flow_runs
from tasks.train import FoldJob, predictions_recipe

DEPLOYMENT = "train-fold/any"
POLL_S = 1.0
REPEATS = 2  # of a training whose machine failed under it
SILENCE_S = 60.0  # between two warnings that no worker takes the trainings
# From a worker's taking a training to its start. A cluster may have to get a machine first; a worker that died in
# between left a run that would wait for ever.
START_LIMIT = timedelta(minutes=30)

WAITING = (StateType.SCHEDULED, StateType.PENDING)
UNFINISHED = {"type": {"any_": [*WAITING, StateType.RUNNING, StateType.PAUSED]}}


def has_workers() -> bool:
    """Whether trainings can run elsewhere: a worker runs this flow itself, and the pool has one that is online."""
    if not runtime.deployment.id:
        return False
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(DEPLOYMENT)
            online = _is_worker_online(client)
        except ObjectNotFound:
            return False
    if not online:
        LOG.info("the work pool %s has no worker online: training here", GPU)
    return online


def _is_worker_online(client: SyncPrefectClient) -> bool:
    return any(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(GPU))


def train_remotely(jobs: list[FoldJob], count: Callable[[str], None]) -> dict[str, BaseException | str]:
    """Send jobs to the work pool and wait for all of them; failures by name. Whatever ends the wait cancels them.

    count: called with the name of each job that has ended.
    """
    LOG.info("%d trainings go to the work pool %s", len(jobs), GPU)
    report_progress = make_progress_reporter(f"folds of {jobs[0].dataset}")
    repeats = dict.fromkeys((job.name for job in jobs), REPEATS)
    failures: dict[str, BaseException | str] = {}
    waiting: dict[UUID, FoldJob] = {}
    try:
        for job in jobs:
            waiting[_send(job, REPEATS)] = job
        said = time.monotonic()
        with get_client(sync_client=True) as client:
            while waiting:
                time.sleep(POLL_S)
                runs = {run.id: run for run in _read(client, waiting)}
                going = {run.id for run in runs.values() if not (run.state and run.state.is_final())}
                ended = [run_id for run_id in waiting if run_id not in going]
                for run_id in ended:
                    job, run = waiting.pop(run_id), runs.get(run_id)
                    why = _explain_failure(run)
                    if why and run and run.state_type == StateType.CRASHED and repeats[job.name]:
                        repeats[job.name] -= 1
                        LOG.warning("%s: %s; once more", job.name, why)
                        waiting[_send(job, repeats[job.name])] = job
                        continue
                    if why:
                        LOG.error("%s: %s", job.name, why)
                        failures[job.name] = why
                    count(job.name)
                if ended:
                    said = time.monotonic()
                    done = len(jobs) - len(waiting)
                    report_progress({"event": "progress", "done": done, "total": len(jobs), "unit": "fold"})
                elif time.monotonic() - said > SILENCE_S:
                    said = time.monotonic()
                    _warn_if_no_worker(client, len(waiting))
                    _give_up_stalled(client, runs.values())
    finally:
        if waiting:
            _cancel_left(waiting)
    return failures


def cancel_folds(flow: object, flow_run: Any, state: Any) -> None:
    """Cancel the trainings that a flow left with other workers; a hook for its cancellation and its crash."""
    with get_client(sync_client=True) as client:
        _cancel(client, find_flow_runs(client, parent_flow_run_id={"any_": [flow_run.id]}, state=UNFINISHED))


def _cancel_left(waiting: Collection[UUID]) -> None:
    """Cancel the flow runs that nothing waits for any more."""
    try:
        with get_client(sync_client=True) as client:
            _cancel(client, _read(client, waiting))
    except (httpx.HTTPError, PrefectException) as error:
        # This error must not hide why the wait has ended.
        LOG.warning("%d trainings could not be cancelled: %s", len(waiting), error)


def _send(job: FoldJob, left: int) -> UUID:
    """Start the flow run of a job; its id. left: how often it may be repeated. A repeated request makes one run."""
    run = run_deployment(
        DEPLOYMENT,
        parameters={"job": job.model_dump(mode="json"), "expected": predictions_recipe(job).key},
        flow_run_name=job.name,
        tags=["calipert", job.dataset, job.model.name],
        idempotency_key=f"{runtime.flow_run.id}/{job.name}/{left}",
        timeout=0,
    )
    # A coroutine it is only for callers that are coroutines themselves.
    return cast(FlowRun, run).id


def _read(client: SyncPrefectClient, ids: Iterable[UUID]) -> list[FlowRun]:
    wanted = list(ids)
    parts = [{"id": {"any_": wanted[start : start + PAGE]}} for start in range(0, len(wanted), PAGE)]
    asked = map(FlowRunFilter.model_validate, parts)
    return [run for some in asked for run in client.read_flow_runs(flow_run_filter=some, limit=PAGE)]


def _cancel(client: SyncPrefectClient, runs: Iterable[FlowRun]) -> None:
    """Cancel runs: one that no worker has taken at once; one that runs is stopped by its worker, which reports it."""
    for run in runs:
        if run.state and not run.state.is_final():
            taken = run.state_type not in WAITING
            client.set_flow_run_state(run.id, Cancelling() if taken else Cancelled(), force=not taken)


def _explain_failure(run: FlowRun | None) -> str | None:
    """Say why a run failed, which is None if it was deleted; None if it did not."""
    if run is None:
        return "its flow run was deleted"
    state = run.state
    if state is None or state.is_completed():
        return None
    return f"{state.type.value.lower()}: {state.message or 'no reason given'}"


def _warn_if_no_worker(client: SyncPrefectClient, waiting: int) -> None:
    if client.read_work_pool(GPU).is_paused:
        LOG.warning("%d trainings wait: the work pool %s is paused; resume it, or cancel", waiting, GPU)
        return
    if not _is_worker_online(client):
        LOG.warning("%d trainings wait: the work pool %s has no worker online; start one, or cancel", waiting, GPU)


def _give_up_stalled(client: SyncPrefectClient, runs: Iterable[FlowRun]) -> None:
    """Let a run that a worker has taken and never started count as crashed."""
    latest = datetime.now(UTC) - START_LIMIT
    for run in runs:
        if run.state and run.state_type == StateType.PENDING and run.state.timestamp < latest:
            message = f"taken by a worker, but not started within {START_LIMIT}"
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
