"""Tasks that score controls and models, calibrate the metrics, and put the results together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.config.paths import reports_folder
from blocks.local.files import lock_file
from blocks.local.scratch import scratch
from blocks.store.code import code_hash
from core.catalog.schema import DatasetSpec
from core.report.files import REPORT
from core.scoring.files import CALIBRATION, SCORES
from tasks.artifacts import Recipe, build_or_get, checksum_file, key_of


@task(name="score-controls", cache_policy=NO_CACHE)
def score_controls(spec: DatasetSpec, reference: Path) -> Path:
    """Write scores.parquet of all controls and baselines, for every half split."""
    from core.scoring.scores import write_control_scores

    code = code_hash("core.scoring.scores")
    recipe = Recipe("control_scores", {"reference": reference}, {"seed": spec.seed}, code)
    return build_or_get(recipe, lambda folder: write_control_scores(reference, folder, spec.seed))


@task(name="score-model", task_run_name="score {model}", cache_policy=NO_CACHE)
def score_model(spec: DatasetSpec, reference: Path, model: str, seed: int, predictions: list[Path]) -> Path:
    """Write scores.parquet and unpredicted.parquet of a model from its folds' predictions, for every half split."""
    from core.scoring.scores import write_model_scores

    recipe = Recipe(
        "model_scores",
        {"reference": reference} | {f"fold_{fold}": path for fold, path in enumerate(predictions)},
        {"model": model, "seed": seed, "half_seed": spec.seed},
        code_hash("core.scoring.scores"),
        label=f"the scores of {model}",
    )
    return build_or_get(
        recipe, lambda folder: write_model_scores(predictions, model, seed, reference, spec.seed, folder)
    )


@task(name="calibrate-metrics", cache_policy=NO_CACHE)
def calibrate_metrics(spec: DatasetSpec, control_scores: Path) -> Path:
    """Write calibration.parquet: the dynamic range and the verdict of every metric."""
    from core.scoring.calibration import build_calibration

    def build(folder: Path) -> None:
        scores = pd.read_parquet(control_scores / SCORES)
        build_calibration(scores, spec.seed).to_parquet(folder / CALIBRATION, index=False)

    code = code_hash("core.scoring.calibration")
    return build_or_get(Recipe("calibration", {"scores": control_scores}, {"seed": spec.seed}, code), build)


@task(name="accept-predictions", cache_policy=NO_CACHE)
def accept_predictions(spec: DatasetSpec, file: Path, reference: Path) -> Path:
    """Write predictions.h5ad, made elsewhere and aligned to the reference, and unpredicted.json.

    Raises UserError if the file cannot be used.
    """
    from core.scoring.predictions import write_aligned_predictions

    recipe = Recipe(
        "predictions",
        {"file": checksum_file(file), "reference": reference},
        {"target_sum": spec.target_sum},
        code_hash("core.scoring.predictions"),
    )
    return build_or_get(recipe, lambda folder: write_aligned_predictions(file, reference, spec.target_sum, folder))


@task(name="make-results", cache_policy=NO_CACHE)
def make_results(
    spec: DatasetSpec, source: str, scores: list[Path], calibration: Path, quality: Path, benchmark_id: str
) -> Path:
    """Write tables, report.html and figures of a benchmark (`docs/outputs.md`); the artifact's folder.

    source: where the data come from, for the report. scores: of the controls, then of the models.
    """

    def build(folder: Path) -> None:
        # Imported only here: it takes seconds, and mostly the results are in the store.
        from core.report.page import Dataset
        from core.report.results import write_results

        dataset = Dataset(spec.name, spec.title, spec.task, spec.citation, spec.licence)
        write_results(dataset, spec.seed, scores, calibration, quality, provenance, folder)

    provenance = {
        "data set": spec.name,
        "source": source,
        "benchmark": benchmark_id,
        "data seed": str(spec.seed),
        # Those of the cells: a preprocessed mirror brings its own.
        "folds": str(pd.read_parquet(scores[0] / SCORES, columns=["fold"])["fold"].nunique()),
        "half splits": str(spec.half_seeds),
        "calibration": key_of(calibration),
        "quality": key_of(quality),
        "scores": ", ".join(key_of(path) for path in scores),
    }
    inputs = {"calibration": calibration, "quality": quality}
    inputs |= {f"scores_{position}": path for position, path in enumerate(scores)}
    parameters = {"provenance": provenance, "entry": spec.model_dump(mode="json")}
    return build_or_get(Recipe("results", inputs, parameters, code_hash("core.report.results")), build)


@task(name="publish-results", cache_policy=NO_CACHE)
def publish_results(name: str, results: Path) -> Path:
    """Copy the results to the data folder's reports/<name>, in place of earlier ones; the path of report.html there."""
    target = reports_folder(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two runs of one data set may end at once: one after the other puts its copy there, whole.
    lock = lock_file(target.with_name(f".{name}.lock"), f"another run publishes the results of {name}")
    with lock, scratch(target.parent, ".publishing") as temporary:
        fresh = shutil.copytree(results, temporary / "new", copy_function=shutil.copyfile)
        if target.exists():
            target.rename(temporary / "old")
        fresh.rename(target)
    return target / REPORT
