"""The training of models on one data set, without scoring: predictions of every fold."""

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
from tasks.prepare import build_reference, prepare_cells
from tasks.pretrained import fetch_inputs
from tasks.record import end_interrupted, end_trainings, failing_with_the_flow, open_runs
from tasks.score import score_controls
from tasks.sources import described, fetch_source


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
    control_scores = score_controls(spec, reference)

    jobs = plan_folds(spec, chosen, cells, reference, seed, inputs)
    source = described(spec, raw)
    runs = open_runs(spec, control_scores, recipes_of(jobs), folds_of(jobs), source, controls=False)
    with failing_with_the_flow(runs):
        predictions = train_folds(jobs, runs)
        end_trainings(runs)
    return predictions
