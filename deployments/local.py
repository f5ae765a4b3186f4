"""The stack of one machine: both servers, a worker and all deployments. `python -m deployments.local up`."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from blocks import services, settings
from blocks.paths import DEFAULT_DATA, data_folder
from core.errors import UserError
from deployments.table import POOL, table


def up() -> None:
    """Starts what does not run yet and registers all deployments; a second `up` starts nothing twice.

    Raises UserError if a service does not start or a catalog entry does not fit.
    """
    rows = table()
    running = services.ensure_servers()
    settings.adopt(running)
    # Only now: prefect reads its settings when it is imported.
    from deployments.register import create_pool, register

    create_pool(POOL)
    register(rows)
    services.ensure_worker(running, POOL)
    Console().print(_welcome(running))


def down() -> None:
    """Stops the worker and the servers that were started here, and nothing else."""
    stopped = services.stop()
    Console().print(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


def status() -> None:
    """Prints the state of both servers and of the worker."""
    shown = Table("service", "state", "address", "process")
    shown.add_column("log", overflow="fold")
    for one in services.status():
        shown.add_row(one.name, one.state, one.url, str(one.pid or ""), str(one.log))
    Console().print(shown)


COMMANDS = {"up": up, "down": down, "status": status}


def main() -> None:
    """Runs one of the commands; an error that the user can mend ends it with status 1."""
    parser = argparse.ArgumentParser(prog="python -m deployments.local", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args().command
    try:
        COMMANDS[command]()
    except UserError as error:
        sys.exit(str(error))


def _welcome(running: settings.Services) -> Panel:
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
