"""What the platform itself costs: a benchmark whose every artifact is in the store already, and a task.

    python -m benchmarks.overhead

A private local stack is started in a temporary data folder, and stopped at the end. The benchmark runs once to fill the
store; then it is timed in a process of its own, as `calipert run` does it, and through a worker, as `prefect
deployment run` does it. There is no peer.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from unittest import mock

import typer

from benchmarks.comparison import CONSOLE, Timing, machine, show_times
from blocks.config import child_environment
from blocks.config.pools import CPU, GPU
from blocks.services import stack as services
from blocks.services.workers import ensure_workers

POLL_S = 0.1
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def main(
    dataset: Annotated[
        str, typer.Option(help="Data set of the catalog; simulated, so that there is no file.")
    ] = "demo",
    models: Annotated[str, typer.Option(help="Models of the benchmark, separated by commas.")] = "demo",
    tasks: Annotated[int, typer.Option(help="Tasks of the flow that does nothing.")] = 100,
    repeats: Annotated[int, typer.Option(help="Runs of each, of which the fastest counts.")] = 3,
) -> None:
    """Print what the platform adds to the work itself."""
    parameters = {"dataset": dataset, "models": models.split(",")}
    with TemporaryDirectory(prefix="calipert-") as folder, _stack(Path(folder), dataset) as running:
        CONSOLE.print(machine("prefect", "mlflow"))
        with CONSOLE.status("a first benchmark fills the store"):
            _in_fresh_process(_benchmark, parameters)
        cached = [_in_fresh_process(_benchmark, parameters) for _ in range(repeats)]
        through = [_through_worker(running, parameters) for _ in range(repeats)]
        alone = min(_in_fresh_process(_tasks, tasks) for _ in range(repeats))
    imports, flow = min(cached, key=sum)
    waited, ran = min(through, key=sum)
    show_times(
        f"benchmark/{dataset} with {models}, everything in the store",
        [
            Timing("in process, the flow", flow, aim="at most 5 s"),
            Timing("  importing it before", imports),
            Timing("through a worker, from submission to end", waited + ran, aim="at most 15 s"),
            Timing("  until it runs", waited),
            Timing("  running", ran),
        ],
    )
    show_times(f"A flow of {tasks} tasks", [Timing("one task", alone, aim="at most 0.1 s")])


@contextmanager
def _stack(folder: Path, dataset: str) -> Iterator[child_environment.Services]:
    """Servers, workers and deployments of its own, which this process and its children use; gone afterwards."""
    with mock.patch.dict(os.environ, CALIPERT_DATA=str(folder)):
        try:
            running = services.ensure_servers()
            with mock.patch.dict(os.environ, child_environment.build_child_environment(running), clear=True):
                os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
                _in_fresh_process(_register, [f"benchmark/{dataset}", "train-fold/any"])
                ensure_workers(running)
                yield running
        finally:
            services.stop()


def _in_fresh_process(work: Callable[..., None], argument: object) -> Any:
    """Receive what `work` sends, from a new process, because Prefect reads its settings when imported."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(argument, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{work.__name__} failed") from None
    finally:
        process.join()


def _register(names: Sequence[str], sender: Connection) -> None:
    """Create the work pools, and of the deployments those of these names."""
    from deployments.local import count_trainings_at_once
    from deployments.register import create_work_pool, register
    from deployments.table import build_table

    create_work_pool(CPU)
    create_work_pool(GPU, count_trainings_at_once())
    register(row for row in build_table() if row.full_name in names)
    sender.send(None)


def _benchmark(parameters: dict[str, Any], sender: Connection) -> None:
    """Send the seconds that importing the flow took, and those of the flow."""
    start = time.perf_counter()
    from flows.benchmark import benchmark

    imported = time.perf_counter()
    benchmark(**parameters)
    sender.send((imported - start, time.perf_counter() - imported))


def _tasks(number: int, sender: Connection) -> None:
    """Send the seconds of one task that does nothing, among so many in a flow."""
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE

    @task(cache_policy=NO_CACHE)
    def nothing() -> None:
        return

    @flow(name="overhead")
    def many() -> float:
        start = time.perf_counter()
        for _ in range(number):
            nothing()
        return time.perf_counter() - start

    sender.send(many() / number)


def _through_worker(running: child_environment.Services, parameters: dict[str, Any]) -> tuple[float, float]:
    """Seconds from submission until the flow runs, and from there to its end; waits for a busy server count."""
    # Only now: prefect reads its settings when it is imported. Its client asks a busy server again, as `prefect` does.
    from prefect.client.base import PrefectHttpxSyncClient

    with PrefectHttpxSyncClient(base_url=running.prefect_api, timeout=60) as api:
        deployment = api.get(f"/deployments/name/benchmark/{parameters['dataset']}").json()["id"]
        wanted: dict[str, Any] = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        # Asked again after a broken answer, the server makes no second run.
        wanted["idempotency_key"] = secrets.token_hex(8)
        submitted = time.time()
        run = api.post(f"/deployments/{deployment}/create_flow_run", json=wanted).json()
        while run["state_type"] not in ENDED:
            time.sleep(POLL_S)
            run = api.get(f"/flow_runs/{run['id']}").json()
    if run["state_type"] != "COMPLETED":
        raise SystemExit(f"the flow run ended as {run['state_name']}: {run['state']['message']}")
    begun, ended = (datetime.fromisoformat(run[name]).timestamp() for name in ("start_time", "end_time"))
    return begun - submitted, ended - begun


if __name__ == "__main__":
    typer.run(main)
