"""What runs, ran, failed and why, on one screen. Asks the servers that run, and starts none.

Over plain HTTP: importing Prefect's or MLflow's client would take longer than all the rest.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from blocks.config.paths import store_folder
from blocks.http import open_client
from blocks.local.processes import is_dead
from blocks.services.stack import ServiceStatus
from blocks.services.stack import status as services_status
from blocks.tracking.running import TrackedRun, find_running_runs
from core.errors import UserError, cut_middle, hide_password

DAYS = 7
# Trainings of single folds are flow runs too, but belong to one of these.
FLOWS = ["benchmark", "calibrate", "embed", "prepare", "reproduce", "score", "train"]
_CHOSEN_FLOWS = {"name": {"any_": FLOWS}}
ACTIVE = ["RUNNING", "PENDING", "CANCELLING"]
WAITING = ["SCHEDULED", "PAUSED"]
FAILED = ["FAILED", "CRASHED", "CANCELLED"]
# What is asked for: states, and which come first.
KINDS = {
    "active": (ACTIVE, "START_TIME_DESC"),
    "waiting": (WAITING, "NEXT_SCHEDULED_START_TIME_ASC"),
    "failed": (FAILED, "END_TIME_DESC"),
    "done": (["COMPLETED"], "END_TIME_DESC"),
}
_LONGEST = 300
_TIMEOUT = 10.0
# No more flow runs are read at once.
PAGE = 200
_EXPERIMENTS = "calipert/"
_OTHER_FLOW = "prefect.deployments.flow_runs.run_deployment"


class Pool(NamedTuple):
    """A work pool: the names of its workers that are online, and how many are known that are not."""

    name: str
    online: list[str]
    offline: int
    paused: bool


class FlowRun(NamedTuple):
    """A flow run.

    state: Prefect's name of it. begun, ended: None if it has not. doing: the steps that run now. folds: (finished,
    failed, all) of those that have a run in MLflow, or None. models: as the user wrote them.
    """

    id: str
    name: str
    kind: str
    state: str
    due: datetime | None
    begun: datetime | None
    ended: datetime | None
    seconds: float
    reason: str
    doing: list[str]
    folds: tuple[int, int, int] | None
    models: list[str]


@dataclass
class Snapshot:
    """All that the screen shows.

    troubles: what could not be found out, and why. runs: by the keys of KINDS. stale: MLflow runs that are RUNNING
    although their flow run or process has ended. store: (artifacts, bytes, free bytes).
    """

    services: list[ServiceStatus]
    pools: list[Pool] = field(default_factory=list)
    runs: dict[str, list[FlowRun]] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    gpus: list[tuple[str, str]] = field(default_factory=list)
    store: tuple[int, int, int] = (0, 0, 0)
    troubles: list[str] = field(default_factory=list)


def take_snapshot(now: datetime) -> Snapshot:
    """Find it all out. now: in UTC. A server that is down or does not answer raises nothing: it is among troubles."""
    services = services_status()
    own = {one.name: one.url for one in services if one.url}
    # The local server that runs, else the one that the environment names.
    prefect = f"{own['prefect']}/api" if "prefect" in own else os.environ.get("PREFECT_API_URL")
    mlflow = own.get("mlflow") or os.environ.get("MLFLOW_TRACKING_URI")
    shown = Snapshot(services)
    # In this order, whatever fails first.
    prefect_place, mlflow_place = (
        f"{name}: {hide_password(url or '')}" for name, url in (("Prefect", prefect), ("MLflow", mlflow))
    )
    troubles = dict.fromkeys((prefect_place, mlflow_place, "GPUs"), "")
    with ThreadPoolExecutor(8) as pool:
        tracking = pool.submit(_find_tracked_runs, mlflow, troubles, mlflow_place)
        size = pool.submit(_measure_store, store_folder())
        gpus = pool.submit(_list_gpus, troubles)
        answers, steps, flows, ended = dict[str, list[Any]](), dict[str, list[str]](), dict[str, str](), set[str]()
        if prefect:
            with _note_trouble(troubles, prefect_place), _open_prefect(prefect) as http:
                shown.pools, answers = _list_pools(http, pool), _list_runs(http, pool, now)
                flows = {flow["id"]: flow["name"] for flow in _ask(http, "/flows/filter", flows=_CHOSEN_FLOWS)}
                steps = _list_steps(http, [run["id"] for run in answers["active"]])
                ended = _find_ended(http, [flow_run for flow_run in tracking.result() if flow_run])
    tracked, shown.gpus, shown.store = tracking.result(), gpus.result(), size.result()
    shown.runs = {
        kind: [_flow_run(one, flows, steps.get(one["id"], []), tracked.get(one["id"], [])) for one in of_kind]
        for kind, of_kind in answers.items()
    }
    shown.stale = _list_stale_runs(ended, tracked)
    shown.troubles = [f"{where}: {why}" for where, why in troubles.items() if why]
    return shown


@contextmanager
def _note_trouble(troubles: dict[str, str], where: str) -> Iterator[None]:
    """Let the block fail for what another program is to blame for, and keep the reason under its place."""
    try:
        yield
    except UserError as error:
        troubles[where] = shorten_reason(hide_password(str(error)))
    except (httpx.HTTPError, ValueError) as error:
        troubles[where] = shorten_reason(hide_password(f"{type(error).__name__}: {error}"))


def _open_prefect(url: str) -> httpx.Client:
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    return open_client(url, auth=(user, password) if user else None, timeout=_TIMEOUT)


def _ask(http: httpx.Client, path: str, **body: object) -> Any:
    """Ask Prefect's REST interface. Raises httpx.HTTPError."""
    return http.post(path, json=body).raise_for_status().json()


def _list_pools(http: httpx.Client, threads: ThreadPoolExecutor) -> list[Pool]:
    def describe(pool: dict[str, Any]) -> Pool:
        workers = _ask(http, f"/work_pools/{pool['name']}/workers/filter")
        online = sorted(worker["name"] for worker in workers if worker["status"] == "ONLINE")
        return Pool(pool["name"], online, len(workers) - len(online), bool(pool["is_paused"]))

    return list(threads.map(describe, _ask(http, "/work_pools/filter")))


def _list_runs(http: httpx.Client, threads: ThreadPoolExecutor, now: datetime) -> dict[str, list[Any]]:
    """List flow runs by the keys of KINDS; of those that have ended, the ones of the last days."""
    recent = {"expected_start_time": {"after_": (now - timedelta(days=DAYS)).isoformat()}}

    def find(kind: str) -> Any:
        states, sort = KINDS[kind]
        chosen = {"state": {"type": {"any_": states}}, **(recent if kind in ("failed", "done") else {})}
        return _ask(http, "/flow_runs/filter", flows=_CHOSEN_FLOWS, flow_runs=chosen, sort=sort, limit=PAGE)

    return dict(zip(KINDS, threads.map(find, KINDS), strict=True))


def _list_steps(http: httpx.Client, flow_runs: list[str]) -> dict[str, list[str]]:
    """Return flow run -> the names of its tasks that run now, and of the trainings that it waits for."""
    steps: dict[str, list[str]] = {}
    if not flow_runs:
        return steps
    running = {"state": {"type": {"any_": ["RUNNING"]}}}
    tasks = _ask(http, "/task_runs/filter", flow_runs={"id": {"any_": flow_runs}}, task_runs=running, limit=PAGE)
    # Another flow run that a flow run waits for is a task of it, whose own name says nothing.
    waits = [task["id"] for task in tasks if task["task_key"].startswith(_OTHER_FLOW)]
    chosen = {"parent_task_run_id": {"any_": waits}}
    others = _ask(http, "/flow_runs/filter", flow_runs=chosen, limit=PAGE) if waits else []
    names = {run["parent_task_run_id"]: run["name"] for run in others}
    for task in tasks:
        # Prefect ends a task's name with some digits that tell its runs apart.
        name = names.get(task["id"], re.sub(r"-[0-9a-f]{1,3}$", "", task["name"]))
        steps.setdefault(task["flow_run_id"], []).append(name)
    return steps


def _find_ended(http: httpx.Client, flow_runs: list[str]) -> set[str]:
    """Find those that are known to have ended."""
    over = {"type": {"any_": ["COMPLETED", *FAILED]}}
    asked = [{"id": {"any_": flow_runs[at : at + PAGE]}, "state": over} for at in range(0, len(flow_runs), PAGE)]
    return {run["id"] for chosen in asked for run in _ask(http, "/flow_runs/filter", flow_runs=chosen, limit=PAGE)}


def _flow_run(answer: dict[str, Any], flows: dict[str, str], doing: list[str], tracked: list[TrackedRun]) -> FlowRun:
    folds = Counter(run.status for run in tracked if "fold" in run.tags)
    counted = (folds["FINISHED"], folds["FAILED"] + folds["KILLED"], folds.total())
    parameters, state = answer["parameters"], answer.get("state") or {}
    fields = ("next_scheduled_start_time", "expected_start_time", "start_time", "end_time")
    scheduled, expected, begun, ended = (_read_time(answer.get(field)) for field in fields)
    # The name that a flow run gets when it begins; until then it has one without a meaning.
    future = [flows.get(answer["flow_id"]), parameters.get("dataset", parameters.get("embedding"))]
    return FlowRun(
        id=answer["id"],
        name=answer["name"] if begun else "-".join(filter(None, future)) or answer["name"],
        kind=answer["state_type"],
        state=answer["state_name"] or answer["state_type"].capitalize(),
        due=scheduled or expected,
        begun=begun,
        ended=ended,
        seconds=float(answer.get("total_run_time") or 0.0),
        reason=shorten_reason(state.get("message") or ""),
        doing=doing,
        folds=counted if folds else None,
        models=list(parameters.get("models") or []),
    )


def _read_time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _find_tracked_runs(uri: str | None, troubles: dict[str, str], place: str) -> dict[str, list[TrackedRun]]:
    """Find the MLflow runs of flow runs (blocks.tracking.running)."""
    if uri:
        with _note_trouble(troubles, place):
            return find_running_runs(uri, _EXPERIMENTS)
    return {}


def _list_stale_runs(ended: set[str], tracked: dict[str, list[TrackedRun]]) -> list[str]:
    """List the names of MLflow runs that are RUNNING although their flow run or their process has ended.

    Those of folds are left out. ended: flow runs.
    """
    return sorted(
        run.name
        for flow_run, runs in tracked.items()
        for run in runs
        if run.status == "RUNNING" and "fold" not in run.tags
        if flow_run in ended or is_dead(run.tags.get("process", ""))
    )


def _list_gpus(troubles: dict[str, str]) -> list[tuple[str, str]]:
    """List (GPU, its holder)."""
    from blocks.local.gpus import list_holders

    with _note_trouble(troubles, "GPUs"):
        return [
            (gpu, "free" if holder is None else f"{holder.what} (process {holder.pid})" if holder.pid else holder.what)
            for gpu, holder in list_holders()
        ]
    return []


def _measure_store(store: Path) -> tuple[int, int, int]:
    """Count the artifacts in the store, their bytes, and the free bytes of its disk.

    A file that is removed meanwhile does not count.
    """
    existing = next(folder for folder in (store, *store.parents) if folder.exists())
    artifacts = [artifact for artifact in store.glob("[!.]*/*") if artifact.is_dir()]
    size = 0
    for folder, _, files in chain.from_iterable(map(os.walk, artifacts)):
        for file in files:
            with suppress(FileNotFoundError):
                size += Path(folder, file).lstat().st_size
    return len(artifacts), size, shutil.disk_usage(existing).free


def shorten_reason(message: str) -> str:
    """Shorten a reason to one line: of an error for the user place, field, finding and remedy, else its text."""
    text = re.sub(r"^(Flow|Task) run encountered an exception:? *", "", message.strip())
    parts = re.search(r"(?s)^(?:UserError: )?(.*?)\n  field: +(.*?)\n  found: +(.*?)\n  remedy: +(.*)", text)
    if parts:
        where, what, found, remedy = (" ".join(part.split()) for part in parts.groups())
        text = f"{where}, {what}: {found} → {remedy}"
    return cut_middle(" ".join(text.split()), _LONGEST)
