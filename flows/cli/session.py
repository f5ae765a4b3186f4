"""A run of a flow from the command line: the servers, the progress on the console, the result."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler

from core.errors import UserError, shown

if TYPE_CHECKING:
    from blocks.config.child_environment import Services

CONSOLE = Console(highlight=False)


def start_servers() -> Services:
    """Start the local servers if they do not run, and use them in this process."""
    from blocks.config.child_environment import use_servers
    from blocks.services.stack import ensure_servers

    with CONSOLE.status("starting the local Prefect and MLflow servers (about ten seconds, once)"):
        services = ensure_servers()
    use_servers(services)
    # The console shows our own progress, and a failure once; Prefect's whole log is in its UI.
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    return services


def run_flow(flow: Any, **parameters: object) -> Any:
    """Run a flow in this process, with our own progress on the console; Prefect's log is in its UI."""
    handler = RichHandler(console=CONSOLE, show_path=False, show_level=False, log_time_format="%H:%M:%S")
    logging.getLogger("calipert").addHandler(handler)
    from blocks.engines.base import ModelFailed

    try:
        return flow(**parameters)
    except ModelFailed as error:
        what, users = ("embedding", "models that use it") if error.stage == "embed" else ("model", "it")
        remedy = f"correct the {what}, or leave {users} out with --models; the whole log is in Prefect"
        raise UserError(what, "output", str(error), remedy) from error


def show_results(results: Path, services: Services) -> None:
    """Print the result table, then where to look further."""
    import pandas as pd

    from core.report.files import LEADERBOARD
    from core.scoring.files import UNPREDICTED
    from flows.cli.console import make_result_table

    CONSOLE.print(make_result_table(pd.read_parquet(results / LEADERBOARD), CONSOLE.width))
    unpredicted = pd.read_parquet(results / UNPREDICTED)
    for model, rows in unpredicted.groupby("model", observed=True):
        reasons = shown(sorted(set(rows["reason"])), 3)
        CONSOLE.print(f"{model} did not predict {len(rows)} conditions: {reasons}", style="yellow")
    CONSOLE.print(f"\nReport:  {results / 'report.html'}", end="", soft_wrap=True)
    show_addresses(services)


def show_addresses(services: Services) -> None:
    """Print the addresses of both servers."""
    text = (
        f"\nPrefect: {services.prefect}\nMLflow:  {services.mlflow} (choose “Model training”)\n"
        "Both servers keep running on this machine only; `make down` stops them."
    )
    CONSOLE.print(text, soft_wrap=True)
