"""All data sets of the study, one after the other: what one of them lacks does not stop the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client

from blocks.http import ConnectionLost
from core.catalog.schema import DatasetSpec
from core.errors import UserError, cut_middle
from flows.benchmark import benchmark
from flows.calibrate import calibrate
from flows.parameters import BenchmarkedModels, Datasets, Origin, Sources
from flows.prepare import prepare
from flows.remote_folds import cancel_folds
from flows.steps import end_with
from tasks.artifacts import LOG
from tasks.inputs import choose_models, choose_study, list_inputs, resolve_sources
from tasks.preflight import check_needs
from tasks.record import end_interrupted, find_flow_runs, open_tracking
from tasks.sources import fetch_source

LONGEST = 500  # characters of a reason
HEADS = ("data set", "outcome", "reason", "cells", "conditions", "genes", "calibrated metrics")


class Outcome(NamedTuple):
    """What became of one data set: `done` with its numbers, or the step that failed, and why."""

    dataset: str
    outcome: str
    reason: str = ""
    cells: int | None = None
    conditions: int | None = None
    genes: int | None = None
    calibrated_metrics: int | None = None


class NoneDone(UserError):
    """Not one data set was done: `outcomes` says why."""

    outcomes: list[Outcome]


def end_interrupted_subflows(flow: object, flow_run: Any, state: Any) -> None:
    """End what the subflows of a reproduction left running, in MLflow and in the work pools.

    A hook for its cancellation and its crash.
    """
    with get_client(sync_client=True) as client:
        subflows = find_flow_runs(client, parent_flow_run_id={"any_": [flow_run.id]})
    for subflow in subflows:
        end_interrupted(flow, subflow, state)
        cancel_folds(flow, subflow, state)


@flow(name="reproduce", flow_run_name="reproduce-{origin}", **end_with(end_interrupted_subflows))
def reproduce(
    datasets: Datasets = [], models: BenchmarkedModels = [], origin: Origin = "raw", sources: Sources = {}
) -> list[Outcome]:
    """Prepare and calibrate the data sets of the study, and benchmark models on each of them.

    datasets: names of the catalog, or paths of your own YAML entries. None: all data sets of the study.
    models: names or groups of the catalog to benchmark. None: no benchmark, the metrics are calibrated only.
    origin: the authors' raw files, or the preprocessed mirror. A file in `sources` comes before either.
    sources: files to use for data sets and embeddings, by name.
    A second run goes on from what the first one finished. Returns what became of each data set.
    """
    specs, chosen = choose_study(datasets, origin), choose_models(models)
    check_needs(list_inputs(chosen), sources, chosen, later=specs.values())
    open_tracking()
    outcomes: list[Outcome] = []
    connected = True
    for dataset, spec in specs.items():
        outcome, connected = _reproduce_dataset(dataset, spec, models, origin, sources, connected)
        outcomes.append(outcome)
    table = [dict(zip(HEADS, outcome, strict=True)) for outcome in outcomes]
    create_table_artifact(table, key="reproduce", description=f"What became of each data set, origin {origin}")
    done = [outcome.dataset for outcome in outcomes if outcome.outcome == "done"]
    LOG.info("%d of %d data sets done, %d not", len(done), len(outcomes), len(outcomes) - len(done))
    if not done:
        found = f"none of {len(outcomes)} was done; {outcomes[0].dataset} {outcomes[0].outcome}: {outcomes[0].reason}"
        error = NoneDone("reproduce", "datasets", found, "solve what the reasons say and run again")
        error.outcomes = outcomes
        raise error
    return outcomes


def _reproduce_dataset(
    dataset: str, spec: DatasetSpec, models: list[str], origin: Origin, sources: dict[str, str], connected: bool
) -> tuple[Outcome, bool]:
    """Reproduce one data set; what became of it, and whether the network could be reached.

    connected: whether it could for the last one. If not, one try is enough.
    """
    own = {name: file for name, file in sources.items() if name == spec.name}
    fetch = fetch_source if connected else fetch_source.with_options(retries=0)
    LOG.info("%s: %s", spec.name, spec.title)
    failing = "could not be fetched"
    try:
        fetch(spec, resolve_sources([spec], own).get(spec.name))
        failing = "could not be prepared"
        cells = prepare(dataset, origin, own)["cells"]
        failing = "could not be calibrated"
        calibration = calibrate(dataset, origin, own)
        if models:
            failing = "could not be benchmarked"
            needed = {one.name for one in list_inputs(choose_models(models))}
            taking_part = {name: file for name, file in sources.items() if name in {spec.name, *needed}}
            benchmark(dataset, models, origin=origin, sources=taking_part)
        outcome = _describe_success(spec.name, cells, calibration)
        LOG.info("%s: done; %d cells, %d conditions, %d genes, %d calibrated metrics", spec.name, *outcome[3:])
        return outcome, True
    except Exception as error:  # noqa: BLE001 - whatever it is, the other data sets can still be done
        if isinstance(error, UserError):
            text = f"{error.where}, {error.field}: {error.found} ({error.remedy})"
        else:
            text = f"{type(error).__name__}: {error}"
        outcome = Outcome(spec.name, failing, cut_middle(" ".join(text.split()), LONGEST))
        LOG.warning("%s %s: %s", spec.name, failing, outcome.reason)
        return outcome, not isinstance(error, ConnectionLost)


def _describe_success(name: str, cells: Path, calibration: Path) -> Outcome:
    import pandas as pd

    from core.conditions import CONTROL
    from core.io.h5ad import read_names
    from core.prepare.files import CELLS
    from core.report.tables import tabulate_verdicts
    from core.scoring.files import CALIBRATION

    verdicts = tabulate_verdicts(pd.read_parquet(calibration / CALIBRATION))["verdict"]
    obs, var = read_names(cells / CELLS)
    conditions = set(obs["condition"]) - {CONTROL}
    return Outcome(name, "done", "", len(obs), len(conditions), len(var), int((verdicts == "calibrated").sum()))
