"""Tasks around a model: the files of its fold, its training, its predictions."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.code import code_hash
from core.catalog.schema import DatasetSpec, ResolvedModel
from tasks.artifacts import LOG, made
from tasks.engine import container, engine, engine_identity
from tasks.record import Runs, end_failed, tracking_server

THREADS = 1  # a model's bits may change with the number of threads; folds run beside each other instead

Event = Mapping[str, Any]


@task(name="split-fold", task_run_name="split fold {fold}", cache_policy=NO_CACHE)
def split_fold(cells: Path, fold: int) -> Path:
    """train.h5ad and control.h5ad of a fold: all of the cells that a model may see."""
    from core.cells import read_cells
    from core.training_data import write_fold

    return made(
        "fold",
        lambda folder: write_fold(read_cells(cells), fold, folder),
        inputs={"cells": cells},
        parameters={"fold": fold},
        code=code_hash("core.training_data"),
        label=f"the cells of fold {fold}",
    )


def trained(
    model: ResolvedModel,
    fold: Path,
    embedding: Path | None,
    seed: int,
    on_event: Callable[[Event], None],
    label: str,
) -> Path:
    """The model directory of one fold: weights and training.jsonl (the events that the model sent)."""
    folder_of_model = container(model)

    def build(folder: Path) -> None:
        spec = {
            "cells": str(fold / "train.h5ad"),
            "embedding": _file(embedding),
            "hyperparameters": model.hyperparameters,
            "seed": seed,
            "threads": THREADS,
            "output": str(folder),
        }
        with (folder / "training.jsonl").open("w", encoding="utf-8") as curve:

            def keep(event: Event) -> None:
                curve.write(json.dumps(dict(event), sort_keys=True) + "\n")
                on_event(event)

            engine().run("train", folder_of_model, spec, on_event=keep)

    return made(
        "model",
        build,
        inputs={"fold": fold} | ({"embedding": embedding} if embedding else {}),
        parameters={"hyperparameters": model.hyperparameters, "seed": seed, "threads": THREADS},
        code=engine_identity(model),
        label=label,
    )


def predicted(
    model: ResolvedModel,
    directory: Path,
    fold: Path,
    embedding: Path | None,
    seed: int,
    asked: list[dict[str, str]],
    target_sum: float,
    on_event: Callable[[Event], None],
    label: str,
) -> Path:
    """predictions.h5ad (checked, rows sorted) and unpredicted.json of one fold's test conditions.

    asked: covariate and condition of each. Raises UserError where the predictions break the contract.
    """
    from core.files import read_genes
    from core.predictions import check_model_output

    folder_of_model = container(model)

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            spec = {
                "model": str(directory),
                "control": str(fold / "control.h5ad"),
                "conditions": asked,
                "embedding": _file(embedding),
                "seed": seed,
                "threads": THREADS,
                "output": scratch,
            }
            engine().run("predict", folder_of_model, spec, on_event=on_event)
            genes = read_genes(fold / "control.h5ad")
            profiles, unpredicted = check_model_output(Path(scratch), asked, genes, model.name, target_sum)
        profiles.write_h5ad(folder / "predictions.h5ad")
        (folder / "unpredicted.json").write_text(json.dumps(unpredicted, sort_keys=True), encoding="utf-8")

    return made(
        "predictions",
        build,
        inputs={"model": directory, "fold": fold} | ({"embedding": embedding} if embedding else {}),
        parameters={"conditions": asked, "seed": seed, "threads": THREADS, "target_sum": target_sum},
        code=engine_identity(model) + code_hash("core.predictions"),
        label=label,
    )


@task(name="train-fold", task_run_name="{model.name} fold {fold}", cache_policy=NO_CACHE)
def train_fold(
    spec: DatasetSpec,
    model: ResolvedModel,
    fold: int,
    data: Path,
    embedding: Path | None,
    seed: int,
    asked: list[dict[str, str]],
    runs: Runs,
) -> Path:
    """Train a model on one fold and predict its test conditions; the artifact's folder of the predictions.

    data: the fold's artifact (`split_fold`). The fold's MLflow run among `runs` shows the curve while it grows.
    """
    run_id = runs.folds[model.name][fold]
    tracking = tracking_server()
    live = tracking.live_curve(run_id)
    name = f"{model.name}, fold {fold}"

    def say(event: Event) -> None:
        if event.get("event") == "log":
            LOG.info("%s: %s", name, event["message"])

    def learn(event: Event) -> None:
        live(event)
        say(event)

    try:
        directory = trained(model, data, embedding, seed, learn, f"the model {name}")
        predictions = predicted(
            model, directory, data, embedding, seed, asked, spec.target_sum, say, f"the predictions of {name}"
        )
    except BaseException as error:
        end_failed([run_id], error)
        raise
    tracking.log_curve(run_id, directory / "training.jsonl")
    tracking.finish(run_id)
    lacking = len(json.loads((predictions / "unpredicted.json").read_text(encoding="utf-8")))
    LOG.info("%s: %d of %d conditions predicted", name, len(asked) - lacking, len(asked))
    return predictions


def _file(embedding: Path | None) -> str | None:
    return str(embedding / "embedding.parquet") if embedding else None
