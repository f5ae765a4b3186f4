"""The benchmark of one data set: prepare, embed, train every fold, score, calibrate, report."""

from __future__ import annotations

import os
from pathlib import Path

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.folds import cancel_folds, folds_of, plan_folds, recipes_of, train_folds
from flows.parameters import Dataset, Folds, Models, Origin, Seed, Sources
from tasks.embed_texts import check_services
from tasks.engine import check_containers
from tasks.inputs import check_sources, chosen_dataset, chosen_models, inputs_of
from tasks.prepare import build_reference, measure_quality, prepare_cells
from tasks.pretrained import fetch_inputs
from tasks.record import (
    end_interrupted,
    failing_with_the_flow,
    open_runs,
    record_calibration,
    record_results,
    show_results,
)
from tasks.results import make_results, publish_results
from tasks.score import calibrate_metrics, score_controls, score_model
from tasks.sources import described, fetch_source


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
    spec = chosen_dataset(dataset, folds, origin)
    chosen = chosen_models(models)
    needed = inputs_of(chosen)
    check_sources([spec, *needed], sources)
    check_containers(chosen)
    check_services([model.embedding for model in chosen if model.embedding], sources)

    inputs = fetch_inputs(needed, sources)
    raw = fetch_source(spec, sources)
    cells = prepare_cells(spec, raw)
    reference = build_reference(spec, cells)
    quality = measure_quality.submit(cells, reference)
    control_scores = score_controls(spec, reference)
    calibration = calibrate_metrics(spec, control_scores)
    source = described(spec, raw)
    record_calibration(spec, calibration, source)

    jobs = plan_folds(spec, chosen, cells, reference, seed, inputs)
    runs = open_runs(spec, control_scores, recipes_of(jobs), folds_of(jobs), source)
    with failing_with_the_flow(runs):
        predictions = train_folds(jobs, runs)
        scores = [score_model(spec, reference, name, seed, of_model) for name, of_model in predictions.items()]
        results = make_results(
            spec, source, [control_scores, *scores], calibration, quality.result(), runs.benchmark_id
        )
        record_results(runs, results)
    page = publish_results(spec.name, results)
    show_results(spec, runs, results, page)
    return page.parent
