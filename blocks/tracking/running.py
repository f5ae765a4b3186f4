"""Which runs MLflow shows as running, over plain HTTP, since importing its client takes seconds."""

from __future__ import annotations

import os
import ssl
from typing import Any, NamedTuple
from uuid import UUID

import httpx

from blocks.http import open_client

_TIMEOUT = 5.0
_PAGE = 50_000  # the most that MLflow answers at once


class TrackedRun(NamedTuple):
    """A run in MLflow. status: "RUNNING", "FINISHED", "FAILED" or "KILLED"."""

    name: str
    status: str
    tags: dict[str, str]


def find_running_runs(uri: str, prefix: str) -> dict[str, list[TrackedRun]]:
    """Return flow run -> its runs in MLflow, if one of them is RUNNING; "" for those that name no flow run.

    prefix: how the names of the experiments begin. Raises httpx.HTTPError, and ValueError for an answer that is not
    MLflow's.
    """
    found: dict[str, list[TrackedRun]] = {}
    with _open_client(uri) as client:
        named = _search(client, "experiments", f"name LIKE '{prefix}%'")
        ids = [experiment["experiment_id"] for experiment in named]
        if not ids:
            return found
        for run in _find_runs(client, ids, "attributes.status = 'RUNNING'"):
            flow_run = run.tags.get("flow_run_id", "")
            found.setdefault(flow_run if is_flow_run_id(flow_run) else "", []).append(run)
        for flow_run in filter(None, found):
            found[flow_run] = _find_runs(client, ids, f"tags.flow_run_id = '{flow_run}'")
    return found


def is_flow_run_id(tag: str) -> bool:
    """Say whether a tag is written as Prefect writes the id of a flow run.

    Anyone may write a tag in MLflow, and Prefect refuses a whole question in which one id is none.
    """
    try:
        return str(UUID(tag)) == tag
    except ValueError:
        return False


def _open_client(uri: str) -> httpx.Client:
    """Open a client with the credentials and certificates that MLflow's own client takes from the environment."""
    variables = ("USERNAME", "PASSWORD", "TOKEN", "INSECURE_TLS", "SERVER_CERT_PATH")
    user, password, token, insecure, certificate = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in variables)
    options: dict[str, Any] = {"timeout": _TIMEOUT}
    if user and password:
        options["auth"] = (user, password)
    elif token:
        options["headers"] = {"Authorization": f"Bearer {token}"}
    if (insecure or "").lower() in ("true", "1"):
        options["verify"] = False
    elif uri.startswith("https:") and (certificate := certificate or os.environ.get("REQUESTS_CA_BUNDLE")):
        options["verify"] = ssl.create_default_context(cafile=certificate)
    return open_client(uri, **options)


def _find_runs(client: httpx.Client, experiments: list[str], chosen: str) -> list[TrackedRun]:
    found = _search(client, "runs", chosen, experiment_ids=experiments)
    return [
        TrackedRun(
            run["info"].get("run_name", ""),
            run["info"]["status"],
            {tag["key"]: tag.get("value", "") for tag in run["data"].get("tags", [])},
        )
        for run in found
    ]


def _search(client: httpx.Client, what: str, chosen: str, **more: object) -> list[Any]:
    body = {"filter": chosen, "max_results": _PAGE, **more}
    answer = client.post(f"/api/2.0/mlflow/{what}/search", json=body).raise_for_status().json()
    if not isinstance(answer, dict):
        raise ValueError(f"{answer!r:.80}")
    return list(answer.get(what, []))
