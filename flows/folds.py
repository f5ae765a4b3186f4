"""The trainings of a benchmark: one for each model and fold, on other machines where there are any, else here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Cancelled, Cancelling, Crashed

from blocks.config.pools import GPU
from blocks.local.cancellation import models_end_with
from core.catalog.schema import DatasetSpec, ResolvedModel
from core.errors import UserError
from tasks.artifacts import LOG, key_of
from tasks.embed import make_embeddings
from tasks.progress import shown_progress
from tasks.record import Recipe, Runs, recipe
from tasks.results import perturbed_genes, test_conditions
from tasks.train import FoldJob, finished, predictions_key, split_fold, train_fold

DEPLOYMENT = "train-fold/any"
POLL_S = 1.0
PAGE = 200  # flow runs that the server gives at once
REPEATS = 2  # of a training whose machine failed under it
SILENCE_S = 60.0  # between two warnings that nobody takes the trainings
# From a worker's taking a training to its start. A cluster may have to get a machine first; a worker that died in
# between left a run that would wait for ever.
START_LIMIT = timedelta(minutes=30)

WAITING = (StateType.SCHEDULED, StateType.PENDING)
ACTIVE = (*WAITING, StateType.RUNNING, StateType.PAUSED)


def plan_folds(
    spec: DatasetSpec, models: list[ResolvedModel], cells: Path, reference: Path, seed: int, inputs: Mapping[str, Path]
) -> list[FoldJob]:
    """One job for each model and fold, model after model, with the folds' cells and the models' embeddings made.

    inputs: what these are made of and the models start from (tasks.pretrained).
    """
    asked = test_conditions(reference) if models else {}
    data = {fold: split_fold(cells, fold) for fold in asked}
    embedded = make_embeddings(models, data, inputs, perturbed_genes(reference))
    return [
        FoldJob(
            dataset=spec.name,
            model=model,
            fold=fold,
            seed=seed,
            data=key_of(data[fold]),
            embedding=key_of(embedding) if (embedding := embedded[model.name, fold]) else None,
            pretrained=key_of(inputs[model.pretrained.name]) if model.pretrained else None,
            asked=asked[fold],
            target_sum=spec.target_sum,
        )
        for model in models
        for fold in asked
    ]


def recipes_of(jobs: Iterable[FoldJob]) -> dict[str, Recipe]:
    """What the scores of each model follow from."""
    by_model: dict[str, list[FoldJob]] = {}
    for job in jobs:
        by_model.setdefault(job.model.name, []).append(job)
    return {
        name: recipe(own[0].model, own[0].seed, [key for job in own for key in (job.embedding, job.pretrained)])
        for name, own in by_model.items()
    }


def folds_of(jobs: Iterable[FoldJob]) -> list[int]:
    """The folds of some jobs, sorted."""
    return sorted({job.fold for job in jobs})


def train_folds(jobs: Iterable[FoldJob], runs: Runs) -> dict[str, list[Path]]:
    """The predictions' artifacts of every model, in the order of its folds.

    What the store lacks goes to the work pool `gpu`, a flow run for each fold, where this flow itself was started by a
    worker and that pool has workers; else it is done here. Either way one fold's failure does not stop the others: the
    error comes at the end, and what was finished stays in the store. A cancellation stops them all.
    """
    opened = [job.model_copy(update={"run_id": runs.folds[job.model.name][job.fold]}) for job in jobs]
    away: list[FoldJob] = []
    here: list[FoldJob] = []
    elsewhere = bool(opened) and _has_workers()
    for job in opened:
        (away if elsewhere and finished(job) is None else here).append(job)
    failures: dict[str, BaseException | str] = {}
    with models_end_with("the training of folds"):
        futures = {train_fold.submit(job): job for job in here}
        if away:
            failures |= _done_elsewhere(away)
        failures |= _done_here(futures)
    if failures:
        raise _failed(failures, len(opened))
    predictions: dict[str, list[Path]] = {}
    for job in opened:
        found = finished(job)
        if found is None:
            raise UserError(job.name, "predictions", "gone from the store", "run again")
        predictions.setdefault(job.model.name, []).append(found)
    return predictions


def cancel_folds(flow: object, flow_run: Any, state: Any) -> None:
    """Hook of a flow that was cancelled or has crashed: cancel the trainings that it left with other workers."""
    mine = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run.id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(ACTIVE))),
    )
    with get_client(sync_client=True) as client:
        left: list[FlowRun] = []
        while page := client.read_flow_runs(flow_run_filter=mine, limit=PAGE, offset=len(left)):
            left += page
        _cancel(client, left)


def _has_workers() -> bool:
    """Whether somebody takes trainings: this flow runs under a worker itself, and the pool has one that is alive."""
    if not runtime.deployment.id:
        return False
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(DEPLOYMENT)
            workers = client.read_workers_for_work_pool(GPU)
        except ObjectNotFound:
            return False
    online = any(worker.status == WorkerStatus.ONLINE for worker in workers)
    if not online:
        LOG.info("the work pool %s has no worker online: training here", GPU)
    return online


def _done_here(futures: dict[PrefectFuture[Path], FoldJob]) -> dict[str, BaseException | str]:
    """Failures by name, after all have ended."""
    failures: dict[str, BaseException | str] = {}
    for future in as_completed(list(futures)):
        found = future.result(raise_on_failure=False)
        if isinstance(found, BaseException):
            failures[futures[future].name] = found
    return failures


def _done_elsewhere(jobs: list[FoldJob]) -> dict[str, BaseException | str]:
    """Send jobs to the work pool and wait for all of them; failures by name. Whatever ends the wait cancels them."""
    LOG.info("%d trainings go to the work pool %s", len(jobs), GPU)
    progress = shown_progress(f"folds of {jobs[0].dataset}")
    repeats = dict.fromkeys((job.name for job in jobs), REPEATS)
    failures: dict[str, BaseException | str] = {}
    with _cancelled_in_the_end() as waiting:
        for job in jobs:
            waiting[_sent(job, REPEATS)] = job
        said = time.monotonic()
        with get_client(sync_client=True) as client:
            while waiting:
                time.sleep(POLL_S)
                runs = {run.id: run for run in _read(client, waiting)}
                for deleted in [run_id for run_id in waiting if run_id not in runs]:
                    failures[waiting.pop(deleted).name] = "its flow run was deleted"
                ended = [run for run in runs.values() if run.state and run.state.is_final()]
                for run in ended:
                    job = waiting.pop(run.id)
                    why = _why(run)
                    if why and run.state_type == StateType.CRASHED and repeats[job.name]:
                        repeats[job.name] -= 1
                        LOG.warning("%s: %s; once more", job.name, why)
                        waiting[_sent(job, repeats[job.name])] = job
                    elif why:
                        LOG.error("%s: %s", job.name, why)
                        failures[job.name] = why
                if ended:
                    said = time.monotonic()
                    done = len(jobs) - len(waiting)
                    progress({"event": "progress", "done": done, "total": len(jobs), "unit": "fold"})
                elif time.monotonic() - said > SILENCE_S:
                    said = time.monotonic()
                    _say_if_nobody_works(client, len(waiting))
                    _give_up_stalled(client, runs.values())
    return failures


@contextmanager
def _cancelled_in_the_end() -> Iterator[dict[UUID, FoldJob]]:
    """Flow runs that are waited for; those that are still there when the context ends are cancelled."""
    waiting: dict[UUID, FoldJob] = {}
    try:
        yield waiting
    finally:
        if waiting:
            try:
                with get_client(sync_client=True) as client:
                    _cancel(client, _read(client, waiting))
            except (httpx.HTTPError, PrefectException) as error:
                # It must not hide why the wait has ended.
                LOG.warning("%d trainings could not be cancelled: %s", len(waiting), error)


def _sent(job: FoldJob, left: int) -> UUID:
    """The flow run of a job. left: how often it may be repeated; a request that the client repeats makes one run."""
    run = run_deployment(
        DEPLOYMENT,
        parameters={"job": job.model_dump(mode="json"), "expected": predictions_key(job)},
        flow_run_name=job.name,
        tags=["calipert", job.dataset, job.model.name],
        idempotency_key=f"{runtime.flow_run.id}/{job.name}/{left}",
        timeout=0,
    )
    if not isinstance(run, FlowRun):
        raise TypeError(f"a flow run was awaited, not {run!r}")
    return run.id


def _read(client: SyncPrefectClient, ids: Iterable[UUID]) -> list[FlowRun]:
    wanted = list(ids)
    return [
        run
        for start in range(0, len(wanted), PAGE)
        for run in client.read_flow_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=wanted[start : start + PAGE])), limit=PAGE
        )
    ]


def _cancel(client: SyncPrefectClient, runs: Iterable[FlowRun]) -> None:
    """A run that nobody has taken is cancelled at once; a worker stops one that runs, and says so when it has."""
    for run in runs:
        if run.state and not run.state.is_final():
            taken = run.state_type not in WAITING
            client.set_flow_run_state(run.id, Cancelling() if taken else Cancelled(), force=not taken)


def _why(run: FlowRun) -> str | None:
    """Why a run did not end well; None where it did."""
    state = run.state
    if state is None or state.is_completed():
        return None
    return f"{state.type.value.lower()}: {state.message or 'no reason given'}"


def _say_if_nobody_works(client: SyncPrefectClient, waiting: int) -> None:
    if client.read_work_pool(GPU).is_paused:
        LOG.warning("%d trainings wait: the work pool %s is paused; resume it, or cancel", waiting, GPU)
        return
    workers = client.read_workers_for_work_pool(GPU)
    if not any(worker.status == WorkerStatus.ONLINE for worker in workers):
        LOG.warning("%d trainings wait: the work pool %s has no worker online; start one, or cancel", waiting, GPU)


def _give_up_stalled(client: SyncPrefectClient, runs: Iterable[FlowRun]) -> None:
    """Let a run that a worker has taken and never started count as crashed."""
    begun = datetime.now(UTC) - START_LIMIT
    for run in runs:
        if run.state and run.state_type == StateType.PENDING and run.state.timestamp < begun:
            message = f"taken by a worker, but not started within {START_LIMIT}"
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)


def _failed(failures: dict[str, BaseException | str], jobs: int) -> Exception:
    """One error for all folds that failed; the first one's own, where it says what the user can mend."""
    first = next(iter(failures.values()))
    if len(failures) == 1 and isinstance(first, Exception):
        return first
    reasons = "\n".join(
        f"{name}: {reason if isinstance(reason, str) else f'{type(reason).__name__}: {reason}'}"
        for name, reason in failures.items()
    )
    found = f"{len(failures)} of {jobs} failed; the others are in the store\n{reasons}"
    error = UserError("benchmark", "trainings", found, "mend what the reasons say and run again: only these are done")
    error.__cause__ = first if isinstance(first, Exception) else None
    return error
