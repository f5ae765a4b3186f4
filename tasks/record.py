"""Tasks that keep a benchmark in MLflow and show its result in Prefect."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from prefect import runtime, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun
from prefect.exceptions import TerminationSignal

from blocks.config.secrets import read_mlflow_credentials
from blocks.local.cancellation import Stopped
from blocks.services.pages import read_pages
from blocks.store.code import code_hash
from blocks.tracking.running import is_flow_run_id
from blocks.tracking.tracker import MLflowTracking, ModelRun
from core.catalog.schema import DatasetSpec, ResolvedModel
from core.errors import UserError
from core.reference.controls import CONTROLS
from core.report.files import LEADERBOARD, REPORT
from core.report.tables import list_entries
from core.scoring.files import CALIBRATION, SCORES
from tasks.artifacts import LOG, key_of
from tasks.engine import find_container_of, identify_container


class ModelOrigin(NamedTuple):
    """What a model's scores follow from, apart from the data.

    params: its parameters. engine: identity of what trains it. seed: of its training. inputs: keys of what else goes in
    (embeddings, a file of predictions).
    """

    params: dict[str, Any]
    engine: str
    seed: int
    inputs: list[str]


class Runs(NamedTuple):
    """The MLflow runs of one benchmark: by model or control, and by model and fold."""

    benchmark_id: str
    models: dict[str, str]
    folds: dict[str, dict[int, str]]


def describe_origin(model: ResolvedModel, seed: int, given: Iterable[str | None]) -> ModelOrigin:
    """Return the origin of a model of the catalog under the engine in use. given: keys of what its folds get."""
    spec, about = model.embedding, dict[str, Any]()
    if spec:
        about["embedding"] = spec.name
    if spec and spec.form == "table":
        # What it differs from others by beside its name.
        about |= {
            "dimensions": spec.dimensions,
            "embedding_pretrained": spec.pretrained,
            "embedding_settings": spec.settings or None,
            "embedding_service": spec.service.model if spec.service else None,
        }
    about["pretrained"] = model.pretrained.name if model.pretrained else None
    known = {name: value for name, value in about.items() if value is not None}
    inputs = list(dict.fromkeys(key for key in given if key))
    return ModelOrigin({**model.hyperparameters, **known}, identify_container(find_container_of(model)), seed, inputs)


def open_tracking() -> MLflowTracking:
    """Return the MLflow server of this environment, with its password. Raises UserError if none is named."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        remedy = "use `calipert run` or `make up`, which start a server and set it"
        raise UserError("environment", "MLFLOW_TRACKING_URI", "not set", remedy)
    os.environ.update(read_mlflow_credentials())
    return MLflowTracking(uri.rstrip("/"))


@task(name="open-runs", cache_policy=NO_CACHE)
def open_runs(
    spec: DatasetSpec,
    control_scores: Path,
    origins: dict[str, ModelOrigin],
    folds: list[int],
    source: str,
    controls: bool = True,
) -> Runs:
    """Find or create the MLflow runs of a benchmark: one per model and control, and one per model and fold.

    control_scores: of them only controls with a value get a run. source: where the raw file comes from. controls:
    false if nothing is scored.
    """
    scored = set(pd.read_parquet(control_scores / SCORES, columns=["model"])["model"])
    # Twelve hex digits tie the runs together. They follow from the data and the code that scores (the key of the
    # controls' scores holds both), the code that summarises, and the models' origins.
    parts = [key_of(control_scores), code_hash("core.report.results"), origins]
    identity = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    about = {"folds": spec.folds, "half_seeds": spec.half_seeds, "data_seed": spec.seed}
    wanted = [
        ModelRun(name, own.seed, f"{identity}/{name}", "model", about | own.params, own.engine or None, folds)
        for name, own in origins.items()
    ]
    wanted += [
        ModelRun(control.name, -1, f"{identity}/{control.name}", control.role, about)
        for control in CONTROLS
        if controls and control.name in scored
    ]
    server = open_tracking()
    server.end_stale(spec.name, list_active_flow_runs)
    opened = server.open_runs(
        spec.name, identity, wanted, digest=key_of(control_scores)[:32], source=source, flow_run_id=_get_flow_run_id()
    )
    return Runs(
        identity,
        {name: run.run_id for name, run in opened.items()},
        {name: run.folds for name, run in opened.items() if run.folds},
    )


def find_flow_runs(client: SyncPrefectClient, **chosen: Any) -> list[FlowRun]:
    """Return all flow runs that a filter chooses, as `FlowRunFilter` takes it: `id={"any_": [...]}`."""
    return read_pages(client.read_flow_runs, flow_run_filter=FlowRunFilter.model_validate(chosen))


def list_active_flow_runs(ids: list[str]) -> set[str]:
    """Return those flow runs that may still run: all but those that Prefect knows to have ended.

    Prefect may not know one: it belongs to another server, or is no flow run's id at all.
    """
    asked = list(filter(is_flow_run_id, ids))
    with get_client(sync_client=True) as client:
        ended = find_flow_runs(client, id={"any_": asked}, state={"type": {"any_": list(TERMINAL_STATES)}})
    return set(ids) - {str(run.id) for run in ended}


@contextmanager
def end_runs_on_error(*run_ids: str) -> Iterator[None]:
    """End MLflow runs if the block raises an error: as FAILED with the reason, or as KILLED if it came from outside.

    An error of MLflow is only logged: it must not hide this one.
    """
    try:
        yield
    except BaseException as error:
        status, reason = "FAILED", f"{type(error).__name__}: {error}"
        if isinstance(error, Stopped):
            status, reason = "KILLED", str(error)
        elif isinstance(error, TerminationSignal | KeyboardInterrupt):
            status, reason = "KILLED", "the flow run was cancelled, or its process was ended by a signal"
        for run_id in run_ids:
            with _log_errors("the failure"):
                open_tracking().fail(run_id, reason, status)
        raise


def end_training(run_id: str, flow_run_id: str, reason: str) -> None:
    """End the MLflow run of a training as KILLED, if it is this flow run's, and no later one's."""
    with _log_errors("the end of a training"):
        open_tracking().kill_training(run_id, flow_run_id, reason)


def end_interrupted(flow: object, flow_run: Any, state: Any) -> None:
    """End the MLflow runs that a flow left running; a hook for its cancellation and its crash."""
    with _log_errors("the end of interrupted runs"):
        open_tracking().end_interrupted(str(flow_run.id), f"the flow run is {state.name}")


@contextmanager
def _log_errors(what: str) -> Iterator[None]:
    try:
        yield
    except UserError as lost:
        LOG.warning("%s could not be written to MLflow: %s", what, lost)


@task(name="record-calibration", cache_policy=NO_CACHE)
def record_calibration(spec: DatasetSpec, calibration: Path, source: str) -> None:
    """One MLflow run for the calibration of a data set."""
    table = calibration / CALIBRATION
    open_tracking().log_calibration(
        spec.name,
        pd.read_parquet(table),
        key=key_of(calibration),
        digest=key_of(calibration)[:32],
        source=source,
        params={"half_seeds": spec.half_seeds, "data_seed": spec.seed},
        file=table,
        flow_run_id=_get_flow_run_id(),
    )


@task(name="end-trainings", cache_policy=NO_CACHE)
def end_trainings(runs: Runs) -> None:
    """End the MLflow runs of models that were trained, but not scored."""
    open_tracking().finish(*runs.models.values())


@task(name="record-results", cache_policy=NO_CACHE)
def record_results(runs: Runs, results: Path) -> None:
    """Write the leaderboard, the scores and the report to the benchmark's MLflow runs, and end them."""
    server, board = open_tracking(), pd.read_parquet(results / LEADERBOARD)
    scored = set(board["model"])
    server.log_leaderboard(board, {name: run_id for name, run_id in runs.models.items() if name in scored})
    server.log_scores(results / SCORES, runs.models)
    server.log_report(results / REPORT, runs.models.values())
    server.finish(*runs.models.values())


@task(name="show-results", cache_policy=NO_CACHE)
def show_results(spec: DatasetSpec, runs: Runs, results: Path, page: Path) -> None:
    """Prefect artifacts of the run: the leaderboard, and links to the report and to MLflow."""
    board = pd.read_parquet(results / LEADERBOARD)
    table = board[board["calibrated"]].pivot(index=["model", "kind"], columns="metric", values="mean")
    table = table.reindex(pd.MultiIndex.from_frame(list_entries(board)[["model", "kind"]])).reset_index()
    name = spec.name.replace("_", "-")
    create_table_artifact(
        key=f"leaderboard-{name}",
        table=table.round(4).astype(object).where(table.notna(), None).to_dict(orient="records"),
        description=f"Means over conditions on the calibrated metrics of {spec.title}",
    )
    server = open_tracking()
    # Browsers do not follow links from a server's pages to files, so MLflow serves the report.
    create_link_artifact(
        key=f"report-{name}",
        link=server.build_report_url(spec.name, next(iter(runs.models.values()))),
        link_text=f"Report of {spec.name}",
        description=f"Every MLflow run of the benchmark keeps it; the worker has it as `{page}`.",
    )
    url = server.build_benchmark_url(spec.name, runs.benchmark_id)
    create_link_artifact(key=f"mlflow-{name}", link=url, link_text="Compare the models in MLflow")


def _get_flow_run_id() -> str | None:
    return str(runtime.flow_run.id) if runtime.flow_run.id else None
