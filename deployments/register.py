"""Registers work pools and deployments with the Prefect server in use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import DeploymentSort
from prefect.exceptions import ObjectAlreadyExists
from prefect.flows import load_flow_from_entrypoint
from prefect.workers.process import ProcessWorker

from blocks.config.paths import PROJECT_ROOT
from blocks.config.pools import CPU, GPU
from blocks.services.pages import read_pages
from deployments.forms import build_form
from deployments.table import Deployment

DESCRIPTIONS = {CPU: "Whole flows: preparing, scoring, gathering.", GPU: "Trainings: one model on one fold each."}


class Registered(NamedTuple):
    """Full names of the deployments that were new, that had changed, and that are ours but no longer in the table."""

    new: list[str]
    changed: list[str]
    left: list[str]


def create_work_pool(name: str, concurrency_limit: int | None = None) -> None:
    """Create a work pool whose runs are processes on the worker's machine; one that exists stays as it is.

    concurrency_limit: how many of its runs may run at the same time, on all its machines together; None: any number.
    """
    pool = WorkPoolCreate(
        name=name,
        type=ProcessWorker.type,
        description=DESCRIPTIONS[name],
        base_job_template=ProcessWorker.get_default_base_job_template(),
        concurrency_limit=concurrency_limit,
    )
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_work_pool(pool)


def register(rows: Iterable[Deployment]) -> Registered:
    """Create the deployments, or change what differs from the table where they exist; their work pools must exist.

    What an operator makes of a deployment is kept: schedules (added, changed, switched on or deleted), a pause, a
    concurrency limit. So is a deployment whose row is gone, with its schedules and the record of its runs: the row may
    have gone only because a catalog of the user's was not named this time.
    """
    rows = list(rows)
    registered = Registered([], [], [])
    with get_client(sync_client=True) as client:
        flows = {flow: client.create_flow_from_name(flow) for flow in {row.flow: None for row in rows}}
        known = {name: one for flow in flows for name, one in _known(client, flow).items()}
        for row in rows:
            settings = _settings(row)
            if row.full_name not in known:
                _create(client, flows[row.flow], row, settings)
                registered.new.append(row.full_name)
            elif differing := _differing(known[row.full_name], settings):
                # Not created once more: that would delete the schedules.
                client.update_deployment(known[row.full_name].id, DeploymentUpdate(**differing))
                registered.changed.append(row.full_name)
    ours = {name for name, one in known.items() if "calipert" in one.tags}
    registered.left.extend(sorted(ours - {row.full_name for row in rows}))
    return registered


def _known(client: SyncPrefectClient, flow: str) -> dict[str, DeploymentResponse]:
    """Read the server's deployments of a flow, by full name."""
    of_flow = FlowFilter(name=FlowFilterName(any_=[flow]))
    # Names differ within a flow only: sorted across flows, one might fall between two pages.
    found = read_pages(client.read_deployments, flow_filter=of_flow, sort=DeploymentSort.NAME_ASC)
    return {f"{flow}/{one.name}": one for one in found}


def _settings(row: Deployment) -> dict[str, Any]:
    """Build what the table decides, as the server gives it back."""
    flow: Flow[..., Any] = load_flow_from_entrypoint(row.entrypoint, use_placeholder_flow=False)
    settings = {
        "entrypoint": row.entrypoint,
        "work_pool_name": row.pool,
        "parameters": row.parameters,
        "tags": row.tags,
        "description": row.description,
        "parameter_openapi_schema": build_form(flow, row),
        "enforce_parameter_schema": True,
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(PROJECT_ROOT)}}],
    }
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def _differing(known: DeploymentResponse, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if getattr(known, name) != value}


def _create(client: SyncPrefectClient, flow_id: UUID, row: Deployment, settings: Mapping[str, Any]) -> None:
    schedules = []
    if row.schedule:
        cron = CronSchedule(cron=row.schedule.cron, timezone="UTC")
        schedules.append(DeploymentScheduleCreate(schedule=cron, active=False, slug=row.schedule.slug))
    wait = ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
    client.create_deployment(
        flow_id,
        row.name,
        **settings,
        concurrency_limit=row.at_once,
        concurrency_options=None if row.at_once is None else wait,
        schedules=schedules,
    )
