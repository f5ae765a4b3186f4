"""What runs, ran, failed and why, on one screen. Asks the servers that run, and starts none.

Over plain HTTP: importing Prefect's or MLflow's client would take longer than all the rest.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from blocks.config.paths import store_folder
from blocks.http import open_client
from blocks.local.processes import is_dead
from blocks.services.stack import ServiceStatus
from blocks.services.stack import status as services_status
from blocks.tracking.running import TrackedRun, find_running_runs
from core.errors import UserError

DAYS = 7
# Trainings of single folds are flow runs too, but belong to one of these.
FLOWS = ["benchmark", "calibrate", "embed", "prepare", "reproduce", "score", "train"]
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


@dataclass(frozen=True)
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
    prefect, mlflow = _prefect_api(services), _mlflow(services)
    pools: list[Pool] = []
    found: dict[str, list[Any]] = {}
    steps: dict[str, list[str]] = {}
    flows: dict[str, str] = {}
    ended: set[str] = set()
    troubles: list[str] = []
    with ThreadPoolExecutor(8) as pool:
        tracking = pool.submit(_find_tracked_runs, mlflow)
        size = pool.submit(_measure_store, store_folder())
        gpus = pool.submit(_gpus)
        if prefect:
            try:
                with _Prefect(prefect, pool) as api:
                    pools, found, flows = api.pools(), api.runs(now), api.flows()
                    steps = api.steps([run["id"] for run in found["active"]])
                    ended = api.ended([flow_run for flow_run in tracking.result()[0] if flow_run])
            except httpx.HTTPError as error:
                troubles.append(f"Prefect: {prefect}: {type(error).__name__}: {error}")
        tracked, no_tracking = tracking.result()
        held, no_gpus = gpus.result()
    runs = {
        kind: [_flow_run(one, flows, steps.get(one["id"], []), tracked.get(one["id"], [])) for one in of_kind]
        for kind, of_kind in found.items()
    }
    return Snapshot(
        services,
        pools,
        runs,
        _list_stale_runs(ended, tracked),
        held,
        size.result(),
        [*troubles, *no_tracking, *no_gpus],
    )


def _prefect_api(services: list[ServiceStatus]) -> str | None:
    """Return the API of the local server that runs, else the one that the environment names."""
    own = next((one.url for one in services if one.name == "prefect" and one.url), None)
    return f"{own}/api" if own else os.environ.get("PREFECT_API_URL")


def _mlflow(services: list[ServiceStatus]) -> str | None:
    own = next((one.url for one in services if one.name == "mlflow" and one.url), None)
    return own or os.environ.get("MLFLOW_TRACKING_URI")


class _Prefect:
    """Prefect's REST interface. Raises httpx.HTTPError."""

    def __init__(self, url: str, pool: ThreadPoolExecutor) -> None:
        user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
        auth = httpx.BasicAuth(user, password) if user else None
        self._http = open_client(url, auth=auth, timeout=_TIMEOUT)
        self._pool = pool

    def __enter__(self) -> _Prefect:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, path: str, **body: object) -> Any:
        answer = self._http.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    def pools(self) -> list[Pool]:
        found = self.ask("/work_pools/filter")
        asked = [f"/work_pools/{pool['name']}/workers/filter" for pool in found]
        return [
            Pool(
                pool["name"],
                sorted(worker["name"] for worker in workers if worker["status"] == "ONLINE"),
                sum(worker["status"] != "ONLINE" for worker in workers),
                bool(pool["is_paused"]),
            )
            for pool, workers in zip(found, self._pool.map(self.ask, asked), strict=True)
        ]

    def runs(self, now: datetime) -> dict[str, list[Any]]:
        """Flow runs by the keys of KINDS; of those that have ended, the ones of the last days."""
        recent = {"after_": (now - timedelta(days=DAYS)).isoformat()}

        def found(kind: str) -> Any:
            states, sort = KINDS[kind]
            chosen: dict[str, object] = {"state": {"type": {"any_": states}}}
            if kind in ("failed", "done"):
                chosen["expected_start_time"] = recent
            flows = {"name": {"any_": FLOWS}}
            return self.ask("/flow_runs/filter", flows=flows, flow_runs=chosen, sort=sort, limit=PAGE)

        return dict(zip(KINDS, self._pool.map(found, KINDS), strict=True))

    def flows(self) -> dict[str, str]:
        """Id -> name."""
        return {flow["id"]: flow["name"] for flow in self.ask("/flows/filter", flows={"name": {"any_": FLOWS}})}

    def steps(self, flow_runs: list[str]) -> dict[str, list[str]]:
        """Flow run -> the names of its tasks that run now, and of the trainings that it waits for."""
        steps: dict[str, list[str]] = {}
        if not flow_runs:
            return steps
        running = {"state": {"type": {"any_": ["RUNNING"]}}}
        tasks = self.ask("/task_runs/filter", flow_runs={"id": {"any_": flow_runs}}, task_runs=running, limit=PAGE)
        # Another flow run that a flow run waits for is a task of it, whose own name says nothing.
        waits = [task["id"] for task in tasks if task["task_key"].startswith(_OTHER_FLOW)]
        chosen = {"parent_task_run_id": {"any_": waits}}
        others = self.ask("/flow_runs/filter", flow_runs=chosen, limit=PAGE) if waits else []
        names = {run["parent_task_run_id"]: run["name"] for run in others}
        for task in tasks:
            # Prefect ends a task's name with some digits that tell its runs apart.
            name = names.get(task["id"], re.sub(r"-[0-9a-f]{1,3}$", "", task["name"]))
            steps.setdefault(task["flow_run_id"], []).append(name)
        return steps

    def ended(self, flow_runs: list[str]) -> set[str]:
        """Those that are known to have ended."""
        over = {"type": {"any_": ["COMPLETED", *FAILED]}}
        asked = [{"id": {"any_": flow_runs[at : at + PAGE]}, "state": over} for at in range(0, len(flow_runs), PAGE)]
        return {run["id"] for chosen in asked for run in self.ask("/flow_runs/filter", flow_runs=chosen, limit=PAGE)}


def _flow_run(answer: dict[str, Any], flows: dict[str, str], doing: list[str], tracked: list[TrackedRun]) -> FlowRun:
    folds = Counter(run.status for run in tracked if "fold" in run.tags)
    counted = (folds["FINISHED"], folds["FAILED"] + folds["KILLED"], folds.total())
    state = answer.get("state") or {}
    return FlowRun(
        id=answer["id"],
        name=answer["name"] if answer.get("start_time") else _future_name(answer, flows),
        kind=answer["state_type"],
        state=answer["state_name"] or answer["state_type"].capitalize(),
        due=_time(answer.get("next_scheduled_start_time") or answer.get("expected_start_time")),
        begun=_time(answer.get("start_time")),
        ended=_time(answer.get("end_time")),
        seconds=float(answer.get("total_run_time") or 0.0),
        reason=shorten_reason(state.get("message") or ""),
        doing=doing,
        folds=counted if folds else None,
        models=list(answer["parameters"].get("models") or []),
    )


def _future_name(answer: dict[str, Any], flows: dict[str, str]) -> str:
    """Return the name that a flow run gets when it begins; until then it has a name without a meaning."""
    what = next((answer["parameters"][name] for name in ("dataset", "embedding") if name in answer["parameters"]), None)
    return "-".join(filter(None, [flows.get(answer["flow_id"]), what])) or str(answer["name"])


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _find_tracked_runs(uri: str | None) -> tuple[dict[str, list[TrackedRun]], list[str]]:
    """Find the MLflow runs of flow runs (blocks.tracking.running), and what hinders."""
    if uri is None:
        return {}, []
    try:
        return find_running_runs(uri, _EXPERIMENTS), []
    except (httpx.HTTPError, ValueError) as error:
        return {}, [f"MLflow: {uri}: {shorten_reason(f'{type(error).__name__}: {error}')}"]


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


def _gpus() -> tuple[list[tuple[str, str]], list[str]]:
    """List (GPU, its holder), and what hinders."""
    from blocks.local.gpus import list_holders

    try:
        held = list_holders()
    except UserError as error:
        return [], [f"GPUs: {shorten_reason(str(error))}"]
    return [
        (gpu, "free" if holder is None else f"{holder.what} (process {holder.pid})" if holder.pid else holder.what)
        for gpu, holder in held
    ], []


def _measure_store(store: Path) -> tuple[int, int, int]:
    """Count the artifacts in the store, their bytes, and the free bytes of its disk."""
    existing = next(folder for folder in (store, *store.parents) if folder.exists())
    kinds = [kind for kind in _folders(store) if not kind.name.startswith(".")]
    artifacts = [artifact for kind in kinds for artifact in _folders(kind)]
    return len(artifacts), sum(_bytes(artifact) for artifact in artifacts), shutil.disk_usage(existing).free


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _bytes(folder: Path) -> int:
    """Add up the sizes of all files in a folder. A file that is removed meanwhile does not count."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    total += _bytes(Path(entry.path))
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return total
    return total


def shorten_reason(message: str) -> str:
    """Shorten a reason to one line: of an error for the user place, field, finding and remedy, else its text."""
    text = re.sub(r"^(Flow|Task) run encountered an exception:? *", "", message.strip())
    parts = re.search(r"(?s)^(?:UserError: )?(.*?)\n  field: +(.*?)\n  found: +(.*?)\n  remedy: +(.*)", text)
    if parts:
        where, what, found, remedy = (" ".join(part.split()) for part in parts.groups())
        text = f"{where}, {what}: {found} → {remedy}"
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST else f"{flat[:_LONGEST].rstrip()} …"
