"""The training of models on one data set, without scoring: predictions of every fold."""

from __future__ import annotations

import os
from pathlib import Path

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.folds import list_folds, list_origins, plan_folds, train_folds
from flows.parameters import Dataset, Folds, Models, Origin, Seed, Sources
from flows.remote_folds import cancel_folds
from flows.steps import prepare_screen
from tasks.inputs import list_inputs
from tasks.preflight import check_run
from tasks.pretrained import fetch_inputs
from tasks.record import end_interrupted, end_runs_on_error, end_trainings, open_runs
from tasks.score import score_controls


@flow(
    name="train",
    flow_run_name="train-{dataset}",
    task_runner=ThreadPoolTaskRunner(max_workers=os.cpu_count()),  # type: ignore[arg-type]
    on_cancellation=[end_interrupted, cancel_folds],
    on_crashed=[end_interrupted, cancel_folds],
)
def train(
    dataset: Dataset = "demo",
    models: Models = ["demo"],  # noqa: B006 - shown in the form of the UI, never changed
    folds: Folds = None,
    seed: Seed = 42,
    origin: Origin = "raw",
    sources: Sources = {},  # noqa: B006
) -> dict[str, list[Path]]:
    """Train models on every fold of a data set and predict its test conditions; a benchmark does the rest.

    The parameters are those of a benchmark, which finds the trained models again.
    Returns the folders of the predictions in the store, by model, in the order of the folds.
    """
    run = check_run(dataset, models, folds, origin, sources)
    inputs = fetch_inputs(list_inputs(run.models), run.files)
    screen = prepare_screen(run)
    control_scores = score_controls(run.spec, screen.reference)

    jobs = plan_folds(screen, run.models, seed, inputs)
    runs = open_runs(run.spec, control_scores, list_origins(jobs), list_folds(jobs), screen.source, controls=False)
    with end_runs_on_error(runs):
        predictions = train_folds(jobs, runs)
        end_trainings(runs)
    return predictions
