"""The benchmark of one data set: prepare, embed, train every fold, score, calibrate, report."""

from __future__ import annotations

import os
from pathlib import Path

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.folds import list_folds, list_origins, plan_folds, train_folds
from flows.parameters import Dataset, Folds, Models, Origin, Seed, Sources
from flows.remote_folds import cancel_folds
from flows.steps import calibrate_screen, prepare_screen, report_results
from tasks.inputs import list_inputs
from tasks.preflight import check_run
from tasks.prepare import measure_quality
from tasks.pretrained import fetch_inputs
from tasks.record import end_interrupted, end_runs_on_error, open_runs
from tasks.score import score_model


@flow(
    name="benchmark",
    flow_run_name="benchmark-{dataset}",
    task_runner=ThreadPoolTaskRunner(max_workers=os.cpu_count()),  # type: ignore[arg-type]
    on_cancellation=[end_interrupted, cancel_folds],
    on_crashed=[end_interrupted, cancel_folds],
)
def benchmark(
    dataset: Dataset = "demo",
    models: Models = ["demo"],  # noqa: B006 - shown in the form of the UI, never changed
    folds: Folds = None,
    seed: Seed = 42,
    origin: Origin = "raw",
    sources: Sources = {},  # noqa: B006
) -> Path:
    """Calibrate the metrics on a data set and judge models by them.

    dataset: a name of the catalog, or the path of your own YAML entry.
    models: names or groups of the catalog. Controls, the additive and the linear baseline always take part.
    folds: instead of the data set's own number of folds; a mirror has its own.
    seed: of the models' training.
    origin: the authors' raw file, or the preprocessed mirror. A file in `sources` comes before either.
    sources: files to use for data sets and embeddings, by name.
    Returns the folder of the results: tables, report.html and figures.
    """
    run = check_run(dataset, models, folds, origin, sources)
    inputs = fetch_inputs(list_inputs(run.models), run.files)
    screen = prepare_screen(run)
    quality = measure_quality.submit(screen.cells, screen.reference)
    control_scores, calibration = calibrate_screen(screen)

    jobs = plan_folds(screen, run.models, seed, inputs)
    runs = open_runs(run.spec, control_scores, list_origins(jobs), list_folds(jobs), screen.source)
    with end_runs_on_error(runs):
        predictions = train_folds(jobs, runs)
        scores = [score_model(run.spec, screen.reference, name, seed, folders) for name, folders in predictions.items()]
        measured = quality.result()
    return report_results(run.spec.name, screen, [control_scores, *scores], calibration, measured, runs)
