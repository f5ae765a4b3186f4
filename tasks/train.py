"""Tasks around a model: the files of its fold, its training, its predictions."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from blocks.engines.base import Usage
from blocks.store.artifacts import MANIFEST, ArtifactStore, artifact_key
from blocks.store.code import code_hash
from core.catalog.schema import ResolvedModel
from core.errors import UserError
from tasks.artifacts import LOG, made
from tasks.engine import THREADS, container_of, device, engine, engine_identity, require_same, resumable
from tasks.progress import shown_progress
from tasks.record import end_failed, tracking_server

USAGE = "usage.json"

Event = Mapping[str, Any]


class FoldJob(BaseModel):
    """One training: a model, a fold and a seed. All in it is JSON, so that it travels to another machine.

    data: key of the fold's artifact (`split_fold`), which holds no test cell. embedding: key of its embedding, or None.
    pretrained: key of the weights that the model starts from, or None.
    asked: covariate and condition of each test condition. target_sum: to which counts were scaled before the log.
    run_id: of the MLflow run of this fold, empty until it is opened.
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
        """What logs and pages call it."""
        return f"{self.dataset}, {self.model.name}, fold {self.fold}"


class _Recipe(NamedTuple):
    """What one of a fold's artifacts follows from."""

    kind: str
    inputs: dict[str, str]
    parameters: dict[str, Any]
    code: str

    @property
    def key(self) -> str:
        return artifact_key(self.kind, self.inputs, self.parameters, self.code)

    def made(self, build: Callable[[Path], None], label: str) -> Path:
        return made(self.kind, build, inputs=self.inputs, parameters=self.parameters, code=self.code, label=label)


@task(name="split-fold", task_run_name="split fold {fold}", cache_policy=NO_CACHE)
def split_fold(cells: Path, fold: int) -> Path:
    """train.h5ad and control.h5ad of a fold: all of the cells that a model may see."""
    from core.prepare.cells import read_cells
    from core.prepare.training_data import write_fold

    return made(
        "fold",
        lambda folder: write_fold(read_cells(cells), fold, folder),
        inputs={"cells": cells},
        parameters={"fold": fold},
        code=code_hash("core.prepare.training_data"),
        label=f"the cells of fold {fold}",
    )


def predictions_key(job: FoldJob) -> str:
    """The key of the predictions that a job gives on this machine, with its code and its models' packages."""
    return _predictions(job).key


def finished(job: FoldJob) -> Path | None:
    """The artifact's folder of a job's predictions, if the store has them."""
    return ArtifactStore().find("predictions", predictions_key(job))


def trained(job: FoldJob, on_event: Callable[[Event], None]) -> Path:
    """The model directory of one fold: weights, training.jsonl (the events that the model sent), usage.json (what its
    training took).

    on_event: called only where the model is trained now, not where the store has it.
    """
    data, model = _stored("fold", job.data), container_of(job.model)

    def build(folder: Path) -> None:
        spec = {
            "cells": str(data / "train.h5ad"),
            **_given(job),
            "hyperparameters": job.model.hyperparameters,
            "seed": job.seed,
            "threads": THREADS,
            "output": str(folder),
        }
        with (folder / "training.jsonl").open("w", encoding="utf-8") as curve, device(model, job.name) as gpu:

            def keep(event: Event) -> None:
                curve.write(json.dumps(dict(event), sort_keys=True) + "\n")
                on_event(event)

            limit = job.model.time_limits.train
            require_same(model)
            with resumable(_model(job).key) as checkpoint:
                spec["checkpoint"] = checkpoint
                usage = engine().run("train", model, spec, on_event=keep, timeout_s=limit, gpu=gpu)
        _require_free(folder, job.name)
        (folder / USAGE).write_text(json.dumps(asdict(usage), sort_keys=True), encoding="utf-8")

    return _model(job).made(build, f"the model of {job.name}")


def predicted(job: FoldJob, directory: Path, on_event: Callable[[Event], None]) -> Path:
    """predictions.h5ad (checked, rows sorted) and unpredicted.json of one fold's test conditions.

    directory: of the trained model. Raises UserError where the predictions break the contract.
    """
    from core.io.h5ad import read_genes
    from core.scoring.predictions import check_model_output

    control, model = _stored("fold", job.data) / "control.h5ad", container_of(job.model)

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            spec = {
                "model": str(directory),
                "control": str(control),
                "conditions": job.asked,
                **_given(job),
                "seed": job.seed,
                "threads": THREADS,
                "output": scratch,
            }
            limit = job.model.time_limits.predict
            require_same(model)
            with device(model, job.name) as gpu:
                engine().run("predict", model, spec, on_event=on_event, timeout_s=limit, gpu=gpu)
            profiles, unpredicted = check_model_output(
                Path(scratch), job.asked, read_genes(control), job.model.name, job.target_sum
            )
        profiles.write_h5ad(folder / "predictions.h5ad")
        (folder / "unpredicted.json").write_text(json.dumps(unpredicted, sort_keys=True), encoding="utf-8")

    return _predictions(job).made(build, f"the predictions of {job.name}")


@task(name="train-fold", task_run_name="{job.model.name} fold {job.fold}", cache_policy=NO_CACHE)
def train_fold(job: FoldJob) -> Path:
    """Train a model on one fold and predict its test conditions; the artifact's folder of the predictions.

    The fold's MLflow run shows the curve while it grows, a progress artifact how far the training is.
    """
    tracking = tracking_server()
    if finished(job) is None:
        tracking.begin_training(job.run_id, str(runtime.flow_run.id))
    live = tracking.live_curve(job.run_id)
    progress = shown_progress(f"training {job.name}")

    def say(event: Event) -> None:
        if event.get("event") == "log":
            LOG.info("%s: %s", job.name, event["message"])

    def learn(event: Event) -> None:
        live(event)
        progress(event)
        say(event)

    try:
        directory = trained(job, learn)
        predictions = predicted(job, directory, say)
    except BaseException as error:
        end_failed([job.run_id], error)
        raise
    tracking.log_usage(job.run_id, Usage(**json.loads((directory / USAGE).read_text(encoding="utf-8"))))
    tracking.log_curve(job.run_id, directory / "training.jsonl")
    tracking.finish(job.run_id)
    lacking = len(json.loads((predictions / "unpredicted.json").read_text(encoding="utf-8")))
    LOG.info("%s: %d of %d conditions predicted", job.name, len(job.asked) - lacking, len(job.asked))
    return predictions


def _model(job: FoldJob) -> _Recipe:
    parameters = {"hyperparameters": job.model.hyperparameters, "seed": job.seed, "threads": THREADS}
    return _Recipe("model", _inputs(job), parameters, engine_identity(container_of(job.model)))


def _predictions(job: FoldJob) -> _Recipe:
    parameters = {"conditions": job.asked, "seed": job.seed, "threads": THREADS, "target_sum": job.target_sum}
    code = engine_identity(container_of(job.model)) + code_hash("core.scoring.predictions")
    return _Recipe("predictions", {"model": _model(job).key, **_inputs(job)}, parameters, code)


def _inputs(job: FoldJob) -> dict[str, str]:
    keys = {"fold": job.data, "embedding": job.embedding, "pretrained": job.pretrained}
    return {name: key for name, key in keys.items() if key}


def _stored(kind: str, key: str) -> Path:
    store = ArtifactStore()
    found = store.find(kind, key)
    if found is None:
        remedy = (
            "machines that train for each other need one store: set CALIPERT_STORE to the same place on all of them"
        )
        raise UserError(store.root, kind, f"nothing under the key {key}", remedy)
    return found


def _given(job: FoldJob) -> dict[str, str | None]:
    """Fields of both stages' specs: what the model is given beside cells."""
    return {
        "embedding": str(_stored("embedding", job.embedding) / "embedding.parquet") if job.embedding else None,
        "pretrained": str(_stored("pretrained", job.pretrained)) if job.pretrained else None,
    }


def _require_free(folder: Path, name: str) -> None:
    """Raise UserError where a model wrote what is written beside its output."""
    taken = [own for own in (USAGE, MANIFEST) if os.path.lexists(folder / own)]
    if taken:
        raise UserError(
            f"output of {name}", "name", f"{taken[0]!r}, a name that the benchmark uses itself", "choose another"
        )
