"""One training as a flow run of its own: what a benchmark hands to the work pool `gpu`."""

from __future__ import annotations

from typing import Any

from prefect import flow

from blocks.local.cancellation import Stopped, end_models_with
from core.errors import UserError
from flows.steps import end_with
from tasks.record import end_training
from tasks.train import FoldJob, find_trained_fold, predictions_recipe
from tasks.train import train_fold as train_fold_task


def end_fold(flow: object, flow_run: Any, state: Any) -> None:
    """End the MLflow run of a training that was cancelled or has crashed, unless another one goes on with it."""
    reason = str(Stopped(flow_run.name, f"the flow run is {state.name}"))
    end_training(flow_run.parameters["job"]["run_id"], str(flow_run.id), reason)


@flow(name="train-fold", **end_with(end_fold))
def train_fold(job: FoldJob, expected: str) -> None:
    """Train one model on one fold and put its predictions into the store. Started by a benchmark, not by hand.

    job: what to train on what. expected: key of the predictions on the machine that asks for them.
    Raises UserError where this machine would give others, because its code or its models' packages differ.
    """
    own = predictions_recipe(job).key
    if own != expected:
        raise UserError(
            "this worker",
            "code, or packages of the model",
            f"its predictions of {job.name} would have the key {own[:12]}, not {expected[:12]}",
            "install the same version of calipert and of the model's packages here, and restart the worker",
        )
    with end_models_with(job.name):
        train_fold_task(job, find_trained_fold(job))
