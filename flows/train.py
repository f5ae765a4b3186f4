"""The training of models on one data set, without scoring: predictions of every fold."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.folds import plan_folds, train_folds, train_with_all_cores
from flows.parameters import Dataset, Folds, Models, Origin, Seed, Sources
from flows.steps import prepare_screen
from tasks.inputs import list_inputs
from tasks.preflight import check_run
from tasks.record import end_runs_on_error, end_trainings
from tasks.score import score_controls
from tasks.sources import fetch_inputs


@flow(name="train", flow_run_name="train-{dataset}", **train_with_all_cores())
def train(
    dataset: Dataset = "demo",
    models: Models = ["demo"],
    folds: Folds = None,
    seed: Seed = 42,
    origin: Origin = "raw",
    sources: Sources = {},
) -> dict[str, list[Path]]:
    """Train models on every fold of a data set and predict its test conditions; a benchmark does the rest.

    The parameters are those of a benchmark, which finds the trained models again.
    Returns the folders of the predictions in the store, by model, in the order of the folds.
    """
    run = check_run(dataset, models, folds, origin, sources)
    inputs = fetch_inputs(list_inputs(run.models), run.files)
    screen = prepare_screen(run)
    control_scores = score_controls(run.spec, screen.reference)

    jobs, runs = plan_folds(screen, run.models, seed, inputs, control_scores, controls=False)
    with end_runs_on_error(*runs.models.values()):
        predictions = train_folds(jobs, runs)
        end_trainings(runs)
    return predictions
