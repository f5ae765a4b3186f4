"""The benchmark of one data set: prepare, embed, train every fold, score, calibrate, report."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.folds import plan_folds, train_folds, train_with_all_cores
from flows.parameters import Dataset, Folds, Models, Origin, Seed, Sources
from flows.steps import calibrate_screen, prepare_screen, report_results
from tasks.inputs import list_inputs
from tasks.preflight import check_run
from tasks.prepare import measure_quality
from tasks.record import end_runs_on_error
from tasks.score import score_model
from tasks.sources import fetch_inputs


@flow(name="benchmark", flow_run_name="benchmark-{dataset}", **train_with_all_cores())
def benchmark(
    dataset: Dataset = "demo",
    models: Models = ["demo"],
    folds: Folds = None,
    seed: Seed = 42,
    origin: Origin = "raw",
    sources: Sources = {},
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

    jobs, runs = plan_folds(screen, run.models, seed, inputs, control_scores)
    with end_runs_on_error(*runs.models.values()):
        predictions = train_folds(jobs, runs)
        scores = [score_model(run.spec, screen.reference, name, seed, folders) for name, folders in predictions.items()]
        measured = quality.result()
    return report_results(run.spec.name, screen, [control_scores, *scores], calibration, measured, runs)
