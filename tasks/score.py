"""Tasks that score: controls, models, and the calibration of the metrics."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.store.code import code_hash
from core.catalog.schema import DatasetSpec
from tasks.artifacts import checksum, made


@task(name="score-controls", cache_policy=NO_CACHE)
def score_controls(spec: DatasetSpec, reference: Path) -> Path:
    """scores.parquet of all controls and baselines, for every half split."""
    from core.scoring.scores import write_control_scores

    return made(
        "control_scores",
        lambda folder: write_control_scores(reference, folder, spec.seed),
        inputs={"reference": reference},
        parameters={"seed": spec.seed},
        code=code_hash("core.scoring.scores"),
    )


@task(name="score-model", task_run_name="score {model}", cache_policy=NO_CACHE)
def score_model(spec: DatasetSpec, reference: Path, model: str, seed: int, predictions: list[Path]) -> Path:
    """scores.parquet and unpredicted.parquet of a model, from the predictions of its folds, for every half split."""
    from core.scoring.scores import write_model_scores

    return made(
        "model_scores",
        lambda folder: write_model_scores(predictions, model, seed, reference, spec.seed, folder),
        inputs={"reference": reference} | {f"fold_{fold}": path for fold, path in enumerate(predictions)},
        parameters={"model": model, "seed": seed, "half_seed": spec.seed},
        code=code_hash("core.scoring.scores"),
        label=f"the scores of {model}",
    )


@task(name="calibrate-metrics", cache_policy=NO_CACHE)
def calibrate_metrics(spec: DatasetSpec, control_scores: Path) -> Path:
    """calibration.parquet: the dynamic range and the verdict of every metric."""
    from core.scoring.calibration import build_calibration

    def build(folder: Path) -> None:
        scores = pd.read_parquet(control_scores / "scores.parquet")
        build_calibration(scores, spec.seed).to_parquet(folder / "calibration.parquet", index=False)

    return made(
        "calibration",
        build,
        inputs={"scores": control_scores},
        parameters={"seed": spec.seed},
        code=code_hash("core.scoring.calibration"),
    )


@task(name="accept-predictions", cache_policy=NO_CACHE)
def accept_predictions(spec: DatasetSpec, file: Path, reference: Path) -> Path:
    """predictions.h5ad made elsewhere, aligned to the reference, and unpredicted.json; the artifact's folder.

    Raises UserError where the file cannot be used.
    """
    from core.scoring.predictions import write_aligned_predictions

    return made(
        "predictions",
        lambda folder: write_aligned_predictions(file, reference, spec.target_sum, folder),
        inputs={"file": checksum(file), "reference": reference},
        parameters={"target_sum": spec.target_sum},
        code=code_hash("core.scoring.predictions"),
    )
