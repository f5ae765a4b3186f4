"""Tasks that score: controls, models, and the calibration of the metrics. Each returns its artifact's folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.store.code import code_hash
from core.catalog.schema import DatasetSpec
from core.scoring.files import CALIBRATION, SCORES
from tasks.artifacts import Recipe, build_or_get, checksum_file


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
