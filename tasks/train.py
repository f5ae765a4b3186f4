"""Tasks around a model: the files of its fold, its training, its predictions."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from blocks.engines.base import Usage
from blocks.store.artifacts import MANIFEST, ArtifactStore
from blocks.store.code import code_hash
from blocks.tracking.tracker import MLflowTracking
from core.catalog.schema import ResolvedModel
from core.embeddings.files import EMBEDDING
from core.errors import UserError
from core.prepare.files import FOLD_CELLS, FOLD_CONTROL
from core.scoring.files import PREDICTIONS, REASONS
from tasks.artifacts import LOG, Recipe, build_or_get, find_artifact
from tasks.engine import THREADS, find_container_of, identify_container, run_stage
from tasks.progress import log_message, make_progress_reporter
from tasks.record import end_runs_on_error, open_tracking

CURVE = "training.jsonl"
USAGE = "usage.json"
ONE_STORE = "set CALIPERT_STORE to the same place on all machines that train for each other: they need one store"

Event = Mapping[str, Any]


class FoldJob(BaseModel):
    """One training: a model, a fold and a seed. All in it is JSON, so that it travels to another machine.

    data: key of the fold's artifact (`split_fold`), which holds no test cell. embedding: key of its embedding, or None.
    pretrained: key of the weights that the model starts from, or None.
    asked: covariate and condition of each test condition. target_sum: to which counts were scaled before the log.
    run_id: of the fold's MLflow run, empty until there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    model: ResolvedModel
    fold: int
    seed: int
    data: str
    embedding: str | None
    pretrained: str | None = None
    asked: list[dict[str, str]]
    target_sum: float
    run_id: str = ""

    @property
    def name(self) -> str:
        """The training as logs and pages call it."""
        return f"{self.dataset}, {self.model.name}, fold {self.fold}"


class TrainedFold(NamedTuple):
    """The artifacts' folders of a training that is done: the model and its predictions."""

    model: Path
    predictions: Path


@task(name="split-fold", task_run_name="split fold {fold}", cache_policy=NO_CACHE)
def split_fold(cells: Path, fold: int) -> Path:
    """Write train.h5ad and control.h5ad of a fold: all of the cells that a model may see; the artifact's folder."""
    from core.prepare.cells import read_cells
    from core.prepare.training_data import write_fold

    code = code_hash("core.prepare.training_data")
    recipe = Recipe("fold", {"cells": cells}, {"fold": fold}, code, f"the cells of fold {fold}")
    return build_or_get(recipe, lambda folder: write_fold(read_cells(cells), fold, folder))


def model_recipe(job: FoldJob) -> Recipe:
    """Return the recipe of a job's model, with this machine's code and the model's packages on it."""
    parameters = {"hyperparameters": job.model.hyperparameters, "seed": job.seed, "threads": THREADS}
    code = identify_container(find_container_of(job.model))
    return Recipe("model", _input_keys(job), parameters, code, f"the model of {job.name}")


def predictions_recipe(job: FoldJob) -> Recipe:
    """Return the recipe of a job's predictions, with this machine's code and the model's packages on it."""
    parameters = {"conditions": job.asked, "seed": job.seed, "threads": THREADS, "target_sum": job.target_sum}
    model = model_recipe(job)
    code = model.code + code_hash("core.scoring.predictions")
    inputs = {"model": model.key, **model.inputs}
    return Recipe("predictions", inputs, parameters, code, f"the predictions of {job.name}")


def _input_keys(job: FoldJob) -> dict[str, str]:
    keys = {"fold": job.data, "embedding": job.embedding, "pretrained": job.pretrained}
    return {name: key for name, key in keys.items() if key}


def find_trained_fold(job: FoldJob) -> TrainedFold | None:
    """Return the model and the predictions of a job, None unless the store has both."""
    predictions = find_artifact(predictions_recipe(job))
    model = find_artifact(model_recipe(job)) if predictions else None
    return TrainedFold(model, predictions) if model and predictions else None


def find_inputs(job: FoldJob) -> dict[str, Path]:
    """Return what a job's training is given, as artifacts' folders: `fold`, and what there is of the others.

    These are `embedding` and `pretrained`, weights that it starts from. Raises UserError if one is not in the store.
    """
    store, found = ArtifactStore(), dict[str, Path]()
    for kind, key in _input_keys(job).items():
        folder = store.find(kind, key)
        if folder is None:
            raise UserError(store.root, kind, f"nothing under the key {key}", ONE_STORE)
        found[kind] = folder
    return found


def _describe_inputs(job: FoldJob, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Return the fields that the specs of training and prediction share."""
    return {
        "embedding": str(inputs["embedding"] / EMBEDDING) if "embedding" in inputs else None,
        "pretrained": str(inputs["pretrained"]) if "pretrained" in inputs else None,
        "seed": job.seed,
    }


def train_model(job: FoldJob, inputs: Mapping[str, Path], on_event: Callable[[Event], None]) -> Path:
    """Train a model on one fold; the artifact's folder of its weights.

    Beside them lie training.jsonl, the events that the model sent, and usage.json, what its training took.
    on_event: called only if the model is trained now, not if the store has it.
    """
    container, recipe = find_container_of(job.model), model_recipe(job)

    def build(folder: Path) -> None:
        spec = {
            "cells": str(inputs["fold"] / FOLD_CELLS),
            **_describe_inputs(job, inputs),
            "hyperparameters": job.model.hyperparameters,
            "output": str(folder),
        }
        with (folder / CURVE).open("w", encoding="utf-8") as curve:

            def keep_event(event: Event) -> None:
                curve.write(json.dumps(dict(event), sort_keys=True) + "\n")
                on_event(event)

            limit = job.model.time_limits.train
            usage = run_stage("train", container, job.name, spec, keep_event, limit, recipe.key)
        _require_free(folder, job.name)
        (folder / USAGE).write_text(json.dumps(asdict(usage), sort_keys=True), encoding="utf-8")

    return build_or_get(recipe, build)


def predict_conditions(
    job: FoldJob, inputs: Mapping[str, Path], model: Path, on_event: Callable[[Event], None]
) -> Path:
    """Predict one fold's test conditions; the artifact's folder of predictions.h5ad (rows sorted) and unpredicted.json.

    model: the artifact's folder of `train_model`. Raises UserError if the predictions break the contract.
    """
    from core.io.h5ad import read_genes
    from core.scoring.predictions import check_model_output

    control, container = inputs["fold"] / FOLD_CONTROL, find_container_of(job.model)

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            spec = {
                "model": str(model),
                "control": str(control),
                "conditions": job.asked,
                **_describe_inputs(job, inputs),
                "output": scratch,
            }
            run_stage("predict", container, job.name, spec, on_event, job.model.time_limits.predict)
            profiles, unpredicted = check_model_output(
                Path(scratch), job.asked, read_genes(control), job.model.name, job.target_sum
            )
        profiles.write_h5ad(folder / PREDICTIONS)
        (folder / REASONS).write_text(json.dumps(unpredicted, sort_keys=True), encoding="utf-8")

    return build_or_get(predictions_recipe(job), build)


@task(name="train-fold", task_run_name="{job.model.name} fold {job.fold}", cache_policy=NO_CACHE)
def train_fold(job: FoldJob, stored: TrainedFold | None = None) -> Path:
    """Train a model on one fold and predict its test conditions; the artifact's folder of the predictions.

    stored: what the store has of the job (`find_trained_fold`). The fold's MLflow run shows the curve while it grows,
    a progress artifact how far the training is.
    """
    tracking = open_tracking()
    with end_runs_on_error(job.run_id):
        fold = stored or _train_now(job, tracking)
    tracking.log_usage(job.run_id, Usage(**json.loads((fold.model / USAGE).read_text(encoding="utf-8"))))
    tracking.log_curve(job.run_id, fold.model / CURVE)
    tracking.finish(job.run_id)
    unpredicted = len(json.loads((fold.predictions / REASONS).read_text(encoding="utf-8")))
    LOG.info("%s: %d of %d conditions predicted", job.name, len(job.asked) - unpredicted, len(job.asked))
    return fold.predictions


def _train_now(job: FoldJob, tracking: MLflowTracking) -> TrainedFold:
    tracking.begin_training(job.run_id, str(runtime.flow_run.id))
    follow_curve, log = tracking.follow_curve(job.run_id), partial(log_message, job.name)
    report_progress = make_progress_reporter(f"training {job.name}")

    def take_event(event: Event) -> None:
        for take in (follow_curve, report_progress, log):
            take(event)

    inputs = find_inputs(job)
    model = train_model(job, inputs, take_event)
    return TrainedFold(model, predict_conditions(job, inputs, model, log))


def _require_free(folder: Path, name: str) -> None:
    """Raise UserError if a model wrote a file of a name that the benchmark uses beside the model's output."""
    taken = [own for own in (USAGE, MANIFEST) if os.path.lexists(folder / own)]
    if taken:
        found = f"{taken[0]!r}, a name that the benchmark uses itself"
        raise UserError(f"output of {name}", "name", found, "choose another")
