"""The benchmark of one data set: prepare, embed, train every fold, score, calibrate, report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from core import catalog
from core.catalog.schema import ResolvedModel
from tasks.embed import make_embeddings
from tasks.inputs import check_sources, chosen_dataset
from tasks.prepare import build_reference, measure_quality, prepare_cells
from tasks.record import (
    failing_with_the_flow,
    open_runs,
    recipe,
    record_calibration,
    record_results,
    show_results,
)
from tasks.results import make_results, perturbed_genes, publish_results, test_conditions
from tasks.score import calibrate_metrics, score_controls, score_model
from tasks.sources import fetch_source
from tasks.train import split_fold, train_fold


@flow(
    name="benchmark",
    flow_run_name="benchmark-{dataset}",
    task_runner=ThreadPoolTaskRunner(max_workers=os.cpu_count()),  # type: ignore[arg-type]
    validate_parameters=True,
)
def benchmark(
    dataset: str = "demo",
    models: list[str] = ["demo"],  # noqa: B006 - shown in the form of the UI, never changed
    folds: int | Literal["leave-one-out"] | None = None,
    seed: int = 42,
    sources: dict[str, str] = {},  # noqa: B006
) -> Path:
    """Calibrate the metrics on a data set and judge models by them.

    dataset: a name of the catalog, or the path of your own YAML entry.
    models: names or groups of the catalog. Controls, the additive and the linear baseline always take part.
    folds: instead of the data set's own number of folds.
    seed: of the models' training.
    sources: files to use for data sets and embeddings, by name.
    Returns the folder of the results: tables, report.html and figures.
    """
    spec = chosen_dataset(dataset, folds)
    chosen = [model for model in catalog.models(models) if model.container]
    embeddings = [model.embedding for model in chosen if model.embedding]
    check_sources([spec, *embeddings], sources)

    raw = fetch_source(spec, sources)
    cells = prepare_cells(spec, raw)
    reference = build_reference(spec, cells)
    quality = measure_quality.submit(cells, reference)
    control_scores = score_controls(spec, reference)
    calibration = calibrate_metrics(spec, control_scores)

    asked = test_conditions(reference) if chosen else {}
    data = {fold: split_fold(cells, fold) for fold in asked}
    embedded = make_embeddings(embeddings, data, sources, perturbed_genes(reference))
    recipes = {model.name: recipe(model, seed) for model in chosen}
    runs = open_runs(spec, reference, control_scores, recipes, list(asked), str(raw))
    with failing_with_the_flow(runs):
        predictions = {
            model.name: [
                train_fold.submit(
                    model,
                    fold,
                    data[fold],
                    _embedded(model, fold, embedded),
                    seed,
                    asked[fold],
                    runs.folds[model.name][fold],
                )
                for fold in asked
            ]
            for model in chosen
        }
        scores = [
            score_model(spec, reference, name, seed, [fold.result() for fold in folds])
            for name, folds in predictions.items()
        ]
        results = make_results(spec, [control_scores, *scores], calibration, quality.result(), runs.benchmark_id)
        record_results(runs, results)
    record_calibration(spec, calibration, str(raw), results)
    page = publish_results(spec.name, results)
    show_results(spec, runs, results, page)
    return page.parent


def _embedded(model: ResolvedModel, fold: int, embedded: Mapping[tuple[str, int], Path]) -> Path | None:
    return embedded[model.embedding.name, fold] if model.embedding else None
