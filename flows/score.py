"""Predictions made elsewhere, scored as a model of the benchmark is."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.parameters import Dataset, Folds, Origin, Sources
from flows.steps import calibrate_screen, end_with, prepare_screen, report_results
from tasks.artifacts import key_of
from tasks.inputs import check_model_name
from tasks.preflight import check_run
from tasks.prepare import measure_quality
from tasks.record import ModelOrigin, end_interrupted, end_runs_on_error, open_runs
from tasks.score import accept_predictions, score_model


@flow(name="score", flow_run_name="score-{dataset}-{name}", **end_with(end_interrupted))
def score(
    dataset: Dataset,
    predictions: Path,
    name: str = "predictions",
    folds: Folds = None,
    origin: Origin = "raw",
    sources: Sources = {},
) -> Path:
    """Score a file of predicted profiles against a data set and its calibrated metrics.

    predictions: h5ad of conditions x genes, X predicted mean log1p(CP10k), obs `condition` (and `covariate`).
    name: what to call the model.
    folds: instead of the data set's own number of folds; a mirror has its own.
    origin: the authors' raw file, or the preprocessed mirror. A file in `sources` comes before either.
    Returns the folder of the results.
    """
    check_model_name(name)
    run = check_run(dataset, [], folds, origin, sources)
    screen = prepare_screen(run)
    accepted = accept_predictions(run.spec, predictions, screen.reference)
    quality = measure_quality(screen.cells, screen.reference)
    control_scores, calibration = calibrate_screen(screen)
    origins = {name: ModelOrigin({"file": predictions.name}, "", -1, [key_of(accepted)])}
    runs = open_runs(run.spec, control_scores, origins, [], screen.source)
    with end_runs_on_error(*runs.models.values()):
        scores = score_model(run.spec, screen.reference, name, -1, [accepted])
    return report_results(f"{run.spec.name}.{name}", screen, [control_scores, scores], calibration, quality, runs)
