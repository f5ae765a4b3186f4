"""The trainings of a benchmark: one for each model and fold, on other machines if there are workers, else here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefect.futures import as_completed
from prefect.task_runners import ThreadPoolTaskRunner

from blocks.local.cancellation import end_models_with
from core.catalog.schema import ResolvedModel
from core.errors import UserError
from flows.remote_folds import cancel_folds, has_workers, train_remotely
from flows.steps import Screen, end_with
from tasks.artifacts import LOG, find_artifact, key_of
from tasks.embed import make_embeddings
from tasks.prepare import list_perturbed_genes, list_test_conditions
from tasks.progress import make_training_counter
from tasks.record import ModelOrigin, Runs, describe_origin, end_interrupted, open_runs
from tasks.train import FoldJob, find_trained_fold, predictions_recipe, split_fold, train_fold


def train_with_all_cores() -> dict[str, Any]:
    """Return the options of a flow that trains folds: as many at once as there are cores, and none after its end."""
    ending = end_with(end_interrupted, cancel_folds)
    return {"task_runner": ThreadPoolTaskRunner(max_workers=os.cpu_count() or 1), **ending}


def plan_folds(
    screen: Screen,
    models: list[ResolvedModel],
    seed: int,
    inputs: Mapping[str, Path],
    control_scores: Path,
    controls: bool = True,
) -> tuple[list[FoldJob], Runs]:
    """Return one job for each model and fold, model after model, and the MLflow runs of models and folds.

    Makes the folds' cells and the models' embeddings. inputs: what these are made of and the models start from
    (tasks.sources.fetch_inputs). controls: whether those have runs too (tasks.record.open_runs).
    """
    asked = list_test_conditions(screen.reference) if models else {}
    data = {fold: split_fold(screen.cells, fold) for fold in asked}
    embedded = make_embeddings(models, data, inputs, list_perturbed_genes(screen.reference))
    jobs: list[FoldJob] = []
    origins: dict[str, ModelOrigin] = {}
    for model in models:
        own = [
            FoldJob(
                dataset=screen.spec.name,
                model=model,
                fold=fold,
                seed=seed,
                data=key_of(data[fold]),
                embedding=key_of(embedding) if (embedding := embedded[model.name, fold]) else None,
                pretrained=key_of(inputs[model.pretrained.name]) if model.pretrained else None,
                asked=asked[fold],
                target_sum=screen.spec.target_sum,
            )
            for fold in asked
        ]
        jobs += own
        given = [key for job in own for key in (job.embedding, job.pretrained)]
        origins[model.name] = describe_origin(model, seed, given)
    return jobs, open_runs(screen.spec, control_scores, origins, list(asked), screen.source, controls)


def train_folds(jobs: Iterable[FoldJob], runs: Runs) -> dict[str, list[Path]]:
    """Train all jobs; the predictions' artifacts of every model, in the order of its folds.

    What the store lacks goes to the work pool `gpu`, a flow run for each fold, if a worker started this flow and that
    pool has workers; else it is done here. Either way one fold's failure does not stop the others: the error comes at
    the end, and what is done stays in the store. A cancellation stops them all.
    """
    opened = [job.model_copy(update={"run_id": runs.folds[job.model.name][job.fold]}) for job in jobs]
    stored = {job.name: find_trained_fold(job) for job in opened}
    missing = {job.name: job for job in opened if stored[job.name] is None}
    if missing:
        LOG.info("%d of %d trainings are in the store, %d to do", len(opened) - len(missing), len(opened), len(missing))
    remote = missing if missing and has_workers() else {}
    count = make_training_counter(len(missing))
    failures: dict[str, BaseException | str] = {}
    predictions: dict[str, Path] = {}
    with end_models_with("the training of folds"):
        futures = {train_fold.submit(job, stored[job.name]): job for job in opened if job.name not in remote}
        if remote:
            failures |= train_remotely(list(remote.values()), count)
        for future in as_completed(list(futures)):
            job, result = futures[future], future.result(raise_on_failure=False)
            if isinstance(result, BaseException):
                failures[job.name] = result
            else:
                predictions[job.name] = result
            if job.name in missing:
                count(job.name)
    if failures:
        raise _join_failures(failures, len(opened))
    found: dict[str, list[Path]] = {}
    for job in opened:
        path = predictions.get(job.name) or find_artifact(predictions_recipe(job))
        if path is None:
            raise UserError(job.name, "predictions", "gone from the store", "run again")
        found.setdefault(job.model.name, []).append(path)
    return found


def _join_failures(failures: dict[str, BaseException | str], jobs: int) -> Exception:
    """Return one error for all folds that failed: the only one's own, if there is just one."""
    first = next(iter(failures.values()))
    if len(failures) == 1 and isinstance(first, Exception):
        return first
    reasons = [
        f"{name}: {reason if isinstance(reason, str) else f'{type(reason).__name__}: {reason}'}"
        for name, reason in failures.items()
    ]
    found = "\n".join([f"{len(failures)} of {jobs} failed; the others are in the store", *reasons])
    remedy = "solve what the reasons say and run again: only these are trained"
    error = UserError("benchmark", "trainings", found, remedy)
    error.__cause__ = first if isinstance(first, Exception) else None
    return error
