"""Workers that do nothing, with slight servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from blocks.config.child_environment import Services
from blocks.local import gpus
from blocks.services import daemons, workers
from blocks.services import stack as services
from core.errors import UserError
from tests.helpers.slight_servers import recorded, running

IDLE = "import time; time.sleep(600)"


@pytest.fixture
def ensured(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, psutil.Process]]:
    """Ensures workers that do nothing, of all pools or of those given, and gives their processes."""
    launch = daemons.start_service

    def idle(name: str, arguments: list[str], *rest: object) -> object:
        script = ["-c", IDLE] if name.startswith("worker") else []
        return launch(name, [*script, *arguments], *rest)  # type: ignore[arg-type]

    def ensure(*pools: str, **options: Any) -> dict[str, psutil.Process]:
        if pools:
            options["pools"] = pools
        workers.ensure_workers(services.ensure_servers(), **options)
        return {name: process for name, process in recorded(fakes).items() if name.startswith("worker")}

    monkeypatch.setattr(daemons, "start_service", idle)
    monkeypatch.setattr(workers, "_heard_of", lambda *_: True)
    monkeypatch.setattr(workers, "_end_lost_runs", lambda *_: None)
    return ensure


@pytest.mark.parametrize(
    ("others", "ended"),
    [
        ([], {"a": "CRASHED", "b": "CRASHED", "c": "CANCELLED"}),
        ([{"name": "local-gpu-1234abcd", "status": "ONLINE"}], {"a": "CRASHED", "b": "CRASHED", "c": "CANCELLED"}),
        ([{"name": "elsewhere", "status": "OFFLINE"}], {"a": "CRASHED", "b": "CRASHED", "c": "CANCELLED"}),
        ([{"name": "elsewhere", "status": "ONLINE"}], {}),
    ],
)
def test_runs_of_a_killed_worker_are_ended_unless_they_may_be_of_another_one(
    monkeypatch: pytest.MonkeyPatch, others: list[dict[str, str]], ended: dict[str, str]
) -> None:
    runs = [
        {"id": "a", "state_type": "RUNNING"},
        {"id": "b", "state_type": "PENDING"},
        {"id": "c", "state_type": "CANCELLING"},
    ]
    said: dict[str, str] = {}

    def ask(url: str, body: dict[str, Any]) -> bytes:
        if url.endswith("/work_pools/gpu/workers/filter"):
            return json.dumps(others).encode()
        if url.endswith("/flow_runs/filter"):
            assert body["work_pools"] == {"name": {"any_": ["gpu"]}}
            return json.dumps(runs[body["offset"] :]).encode()
        assert body["force"] is True
        said[url.split("/")[-2]] = body["state"]["type"]
        return b"{}"

    monkeypatch.setattr(workers, "ask", ask)
    workers._end_lost_runs(Services("http://a", "http://b"), "gpu")
    assert said == ended


def test_every_pool_has_one_worker(ensured: Callable[..., dict[str, psutil.Process]]) -> None:
    cpu = ensured("cpu")
    assert set(cpu) == {"worker-cpu"}
    both = ensured()
    assert set(both) == {"worker-cpu", "worker-gpu"}
    assert both["worker-cpu"] == cpu["worker-cpu"]
    assert ensured() == both
    for name, process in both.items():
        command = process.cmdline()
        assert name == f"worker-{command[command.index('--pool') + 1]}"
    assert [(one.name, one.state) for one in services.status()][2:] == [
        ("worker-cpu", "running"),
        ("worker-gpu", "running"),
    ]
    assert sorted(services.stop()) == ["mlflow", "prefect", "worker-cpu", "worker-gpu"]
    assert running(list(both.values())) == []


def test_only_the_worker_that_died_is_replaced(ensured: Callable[..., dict[str, psutil.Process]]) -> None:
    before = ensured()
    before["worker-gpu"].kill()
    before["worker-gpu"].wait(10)
    after = ensured()
    assert after["worker-cpu"] == before["worker-cpu"]
    assert after["worker-gpu"] != before["worker-gpu"]


def test_a_worker_that_the_server_does_not_hear_of_is_ended_and_the_others_go_on(
    ensured: Callable[..., dict[str, psutil.Process]], fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_heard_of", lambda addresses, pool, name: pool == "cpu")
    with pytest.raises(UserError, match="worker-gpu service"):
        ensured(timeout=1)
    assert set(recorded(fakes)) == {"prefect", "mlflow", "worker-cpu"}
    assert running([recorded(fakes)["worker-cpu"]])


def test_a_worker_of_a_pool_that_is_no_more_is_stopped_too(
    ensured: Callable[..., dict[str, psutil.Process]],
) -> None:
    process = ensured("former")["worker-former"]
    assert sorted(services.stop()) == ["mlflow", "prefect", "worker-former"]
    assert running([process]) == []


@pytest.mark.parametrize(
    "variable", ["CALIPERT_CATALOG", "CALIPERT_SOURCE_NORMAN19", "CALIPERT_STORE", gpus.GPUS, gpus.LOCKS, gpus.VISIBLE]
)
def test_a_worker_is_replaced_when_the_users_files_are_named_otherwise(
    ensured: Callable[..., dict[str, psutil.Process]], fakes: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    def worker() -> psutil.Process:
        return ensured("cpu")["worker-cpu"]

    monkeypatch.delenv(variable, raising=False)
    first = worker()
    servers = [recorded(fakes)[name] for name in ("prefect", "mlflow")]
    monkeypatch.setenv("UNRELATED", "changed")
    assert worker() == first
    seen = [first]
    for value in ("/private/one", "/private/two"):
        monkeypatch.setenv(variable, value)
        seen.append(worker())
        assert worker() == seen[-1]
        assert seen[-1].environ()[variable] == value
        assert running(seen) == seen[-1:]
    assert "private" not in (fakes / "services.json").read_text(encoding="utf-8")
    monkeypatch.delenv(variable)
    last = worker()
    assert running(seen) == []
    assert variable not in last.environ()
    assert running(servers) == servers
