"""The stack of one machine: both servers, two workers and all deployments. `python -m deployments.local up`."""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from blocks.config import child_environment
from blocks.config.paths import data_folder
from blocks.config.pools import CPU, GPU
from blocks.config.settings import DEFAULT_DATA
from blocks.local.gpus import list_gpus
from blocks.services import stack as services
from blocks.services.workers import ensure_workers
from core.errors import UserError
from deployments.table import build_table


def up() -> None:
    """Start what does not run yet and register all deployments; a second `up` starts nothing twice.

    Raises UserError if a service does not start, a catalog entry does not fit, or nvidia-smi fails.
    """
    rows, at_once = build_table(), count_trainings_at_once()
    Console().print("starting what does not run yet of Prefect, MLflow and the workers (up to a minute)", style="dim")
    running = services.ensure_servers()
    child_environment.use_servers(running)
    # Only now: prefect reads its settings when it is imported.
    from deployments.register import create_work_pool, register

    create_work_pool(CPU)
    create_work_pool(GPU, at_once)
    new, changed, left = register(rows)
    ensure_workers(running)
    Console().print(_welcome(running))
    plain = Console(highlight=False)
    plain.print(f"{len(rows)} deployments: {len(new)} new, {len(changed)} changed", soft_wrap=True)
    if left:
        remark = "(`prefect deployment delete NAME` deletes one)"
        plain.print(f"in no catalog now, but kept: {', '.join(left)} {remark}", soft_wrap=True)


def count_trainings_at_once() -> int:
    """Return how many trainings a new work pool `gpu` runs at the same time here: one per GPU.

    Without a GPU half as many as there are cores, but two where there are two: each training computes on one core, and
    the other half is for what scores and serves meanwhile. `prefect work-pool update gpu --concurrency-limit N` changes
    it, and `up` keeps it. Raises UserError if nvidia-smi is installed and fails.
    """
    cores = os.cpu_count() or 1
    return len(list_gpus()) or min(cores, max(2, cores // 2))


def down() -> None:
    """Stop the workers and the servers that were started here, and nothing else."""
    stopped = services.stop()
    nothing = f"nothing was running with its data in {data_folder()} (CALIPERT_DATA)"
    Console().print(f"stopped: {', '.join(stopped)}" if stopped else nothing, soft_wrap=True)


def status() -> None:
    """Print the state of both servers and of the workers."""
    shown = Table("service", "state", "address", "process")
    shown.add_column("log", overflow="fold")
    for one in services.status():
        shown.add_row(one.name, one.state, one.url, str(one.pid or ""), str(one.log))
    Console().print(shown)


COMMANDS = {"up": up, "down": down, "status": status}


def main() -> None:
    """Run one of the commands; an error that the user can fix ends it with status 1."""
    parser = argparse.ArgumentParser(prog="python -m deployments.local", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args().command
    try:
        COMMANDS[command]()
    except UserError as error:
        sys.exit(str(error))


def _welcome(running: child_environment.Services) -> Panel:
    # The project's own folder has a prefect.toml for its own data only.
    first = [] if data_folder() == DEFAULT_DATA else ['  eval "$(calipert env)"']
    lines = [
        f"Prefect  {running.prefect}  to start, schedule and watch runs",
        f'MLflow   {running.mlflow}  to compare models: choose "Model training"',
        "",
        "Try, in this folder and with its environment active:",
        *first,
        "  prefect deployment run benchmark/demo",
    ]
    return Panel("\n".join(lines), title="calipert is up", expand=False)


if __name__ == "__main__":
    main()
