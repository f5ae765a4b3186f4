"""The trainings of a benchmark: one for each model and fold, on other machines if there are workers, else here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from prefect.futures import as_completed

from blocks.local.cancellation import end_models_with
from core.catalog.schema import ResolvedModel
from core.errors import UserError
from flows.remote_folds import has_workers, train_remotely
from flows.steps import Screen
from tasks.artifacts import LOG, find_artifact, key_of
from tasks.embed import make_embeddings
from tasks.progress import make_training_counter
from tasks.record import ModelOrigin, Runs, describe_origin
from tasks.results import list_perturbed_genes, list_test_conditions
from tasks.train import FoldJob, find_trained_fold, predictions_recipe, split_fold, train_fold


def plan_folds(screen: Screen, models: list[ResolvedModel], seed: int, inputs: Mapping[str, Path]) -> list[FoldJob]:
    """Return one job for each model and fold, model after model; makes the folds' cells and the models' embeddings.

    inputs: what these are made of and the models start from (tasks.pretrained).
    """
    asked = list_test_conditions(screen.reference) if models else {}
    data = {fold: split_fold(screen.cells, fold) for fold in asked}
    embedded = make_embeddings(models, data, inputs, list_perturbed_genes(screen.reference))
    return [
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
        for model in models
        for fold in asked
    ]


def list_origins(jobs: Iterable[FoldJob]) -> dict[str, ModelOrigin]:
    """Return what the scores of each model follow from, by its name."""
    by_model: dict[str, list[FoldJob]] = {}
    for job in jobs:
        by_model.setdefault(job.model.name, []).append(job)
    return {
        name: describe_origin(
            own[0].model, own[0].seed, [key for job in own for key in (job.embedding, job.pretrained)]
        )
        for name, own in by_model.items()
    }


def list_folds(jobs: Iterable[FoldJob]) -> list[int]:
    """Return the folds of some jobs, sorted."""
    return sorted({job.fold for job in jobs})


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
    reasons = "\n".join(
        f"{name}: {reason if isinstance(reason, str) else f'{type(reason).__name__}: {reason}'}"
        for name, reason in failures.items()
    )
    found = f"{len(failures)} of {jobs} failed; the others are in the store\n{reasons}"
    error = UserError(
        "benchmark", "trainings", found, "solve what the reasons say and run again: only these are trained"
    )
    error.__cause__ = first if isinstance(first, Exception) else None
    return error
