"""Registers work pools and deployments with the Prefect server in use."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker

from blocks.paths import PROJECT_ROOT
from deployments.table import Deployment


def create_pool(name: str) -> None:
    """Creates a work pool whose runs are processes on the worker's machine; one that exists stays as it is."""
    template = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template))
        except ObjectAlreadyExists:
            return


def register(rows: Iterable[Deployment]) -> None:
    """Creates the deployments, or brings them up to date where they exist; their work pools must exist.

    Schedules that somebody gave a deployment, and its pause, are kept.
    """
    with get_client(sync_client=True) as client:
        for row in rows:
            _register(client, row)


def _register(client: SyncPrefectClient, row: Deployment) -> None:
    flow = _flow(row.entrypoint)
    if flow.name != row.flow:
        raise ValueError(f"the flow {row.entrypoint} is named {flow.name}, not {row.flow}")
    settings: dict[str, Any] = {
        "entrypoint": row.entrypoint,
        "work_pool_name": row.pool,
        "parameters": row.parameters,
        "tags": list(row.tags),
        "description": row.description,
        "parameter_openapi_schema": parameter_schema(flow).model_dump_for_openapi(),
        "enforce_parameter_schema": True,
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(PROJECT_ROOT)}}],
    }
    try:
        known = client.read_deployment_by_name(row.full_name)
    except ObjectNotFound:
        flow_id = client.create_flow_from_name(row.flow)
        client.create_deployment(flow_id, row.name, **settings)
    else:
        # Not created once more: that would delete the schedules.
        client.update_deployment(known.id, DeploymentUpdate(**settings))


def _flow(entrypoint: str) -> Flow[..., Any]:
    module, _, name = entrypoint.rpartition(".")
    flow = getattr(import_module(module), name)
    if not isinstance(flow, Flow):
        raise TypeError(f"{entrypoint} is not a flow")
    return flow
