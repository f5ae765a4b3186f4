"""Predictions made elsewhere, scored as a model of the benchmark is."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.parameters import Dataset, Folds, Origin, Sources
from tasks.artifacts import key_of
from tasks.inputs import check_model_name, check_sources, chosen_dataset
from tasks.prepare import build_reference, measure_quality, prepare_cells
from tasks.record import (
    Recipe,
    end_interrupted,
    failing_with_the_flow,
    open_runs,
    record_calibration,
    record_results,
    show_results,
)
from tasks.results import make_results, publish_results
from tasks.score import accept_predictions, calibrate_metrics, score_controls, score_model
from tasks.sources import described, fetch_source


@flow(
    name="score",
    flow_run_name="score-{dataset}-{name}",
    on_cancellation=[end_interrupted],
    on_crashed=[end_interrupted],
)
def score(
    dataset: Dataset,
    predictions: Path,
    name: str = "predictions",
    folds: Folds = None,
    origin: Origin = "raw",
    sources: Sources = {},  # noqa: B006
) -> Path:
    """Score a file of predicted profiles against a data set and its calibrated metrics.

    predictions: h5ad of conditions x genes, X predicted mean log1p(CP10k), obs `condition` (and `covariate`).
    name: what to call the model.
    folds: instead of the data set's own number of folds; a mirror has its own.
    origin: the authors' raw file, or the preprocessed mirror. A file in `sources` comes before either.
    Returns the folder of the results.
    """
    spec = chosen_dataset(dataset, folds, origin)
    check_model_name(name)
    check_sources([spec], sources)
    raw = fetch_source(spec, sources)
    cells = prepare_cells(spec, raw)
    reference = build_reference(spec, cells)
    accepted = accept_predictions(spec, predictions, reference)
    quality = measure_quality(cells, reference)
    control_scores = score_controls(spec, reference)
    calibration = calibrate_metrics(spec, control_scores)
    source = described(spec, raw)
    record_calibration(spec, calibration, source)
    recipes = {name: Recipe({"file": predictions.name}, "", -1, [key_of(accepted)])}
    runs = open_runs(spec, control_scores, recipes, [], source)
    with failing_with_the_flow(runs):
        scores = score_model(spec, reference, name, -1, [accepted])
        results = make_results(spec, source, [control_scores, scores], calibration, quality, runs.benchmark_id)
        record_results(runs, results)
    page = publish_results(f"{spec.name}.{name}", results)
    show_results(spec, runs, results, page)
    return page.parent
