"""Variables that make Prefect and MLflow use the private local servers, and no others.

Imports neither prefect nor mlflow, which take seconds and read these settings when they are imported.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from blocks.config.paths import PROJECT_ROOT, data_folder, prefect_folder
from blocks.config.settings import DEFAULT_DATA
from blocks.local.files import replace_file
from core.errors import UserError

HOST = "127.0.0.1"
# Prefect reads this file in the working directory.
PREFECT_TOML = PROJECT_ROOT / "prefect.toml"
TOML_HEADER = "# Written by calipert whenever its servers start: `prefect` in this folder talks to them.\n"


@dataclass(frozen=True)
class Services:
    """Where the two servers answer: the addresses of their web pages, `http://127.0.0.1:<port>`."""

    prefect: str
    mlflow: str

    @property
    def prefect_api(self) -> str:
        """Address of Prefect's API."""
        return f"{self.prefect}/api"


def build_environment(services: Services) -> dict[str, str]:
    """Build the variables that make Prefect and MLflow use these servers and this data folder, without statistics."""
    home = prefect_folder()
    lease_storage = "prefect.server.concurrency.lease_storage.filesystem"
    return {
        "CALIPERT_DATA": str(data_folder()),
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Job execution is for language models: eight idle processes of 250 MB each.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_TRACKING_URI": services.mlflow,
        # A proxy meant for the internet cannot reach this machine's own loopback.
        "NO_PROXY": _without_proxy("NO_PROXY"),
        "PREFECT_API_URL": services.prefect_api,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_HOME": str(home),
        # What core, tasks and blocks log is among the logs of the run.
        "PREFECT_LOGGING_EXTRA_LOGGERS": "calipert",
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Leases in memory would be lost for good with a restart of the server.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": lease_storage,
        # Without a server Prefect would start one for each process and lose most of its records.
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # The second version of the pages asks a company for statistics what to report, even where nothing is reported.
        "PREFECT_SERVER_UI_V2_ENABLED": "false",
        # Ten by default: what was submitted would wait for the worker five seconds on average.
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "no_proxy": _without_proxy("no_proxy"),
    }


def build_child_environment(services: Services) -> dict[str, str]:
    """Build the environment of a child process that uses these servers.

    It is this one's, without the user's own PREFECT_ and MLFLOW_ settings, and with `build_environment(services)`.
    """
    kept = {name: value for name, value in os.environ.items() if not _is_users_own(name)}
    return kept | build_environment(services)


def use_servers(services: Services) -> None:
    """Make this process use the servers. Call it before prefect is imported, which reads its settings then.

    Raises RuntimeError if prefect has been imported with other settings.
    """
    ours = build_environment(services)
    foreign = [name for name in os.environ if _is_users_own(name) and name not in ours]
    differing = [*foreign, *(name for name, value in ours.items() if os.environ.get(name) != value)]
    if "prefect" in sys.modules and any(name.startswith("PREFECT_") for name in differing):
        raise RuntimeError(f"prefect was imported before these were set: {', '.join(sorted(differing))}")
    for name in foreign:
        del os.environ[name]
    os.environ.update(ours)


def format_exports(services: Services) -> str:
    """Format lines that make a shell use the servers: `eval` them to type `prefect` and `mlflow` anywhere."""
    ours = build_environment(services)
    foreign = sorted(name for name in os.environ if _is_users_own(name) and name not in ours)
    lines = [f"unset {name}" for name in foreign]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(ours.items())]
    return "\n".join(lines) + "\n"


def require_own_toml() -> None:
    """Raise UserError where the prefect.toml of the project's folder is not one that was written here."""
    text = _read_toml()
    if text is not None and not text.startswith(TOML_HEADER):
        raise UserError(
            PREFECT_TOML,
            "first line",
            "a file that calipert did not write",
            "move it elsewhere: calipert keeps the address of its own server under this name",
        )


def remove_toml() -> None:
    """Remove the prefect.toml of servers that no longer run; one that the user wrote stays."""
    if (_read_toml() or "").startswith(TOML_HEADER):
        PREFECT_TOML.unlink()


def write_toml(services: Services) -> None:
    """Write prefect.toml, so that `prefect deployment run ...` works as typed in the project's folder.

    Does nothing with another data folder than the project's own: which of several servers is meant cannot be known.
    """
    if data_folder() != DEFAULT_DATA:
        return
    home = prefect_folder()
    text = f"""{TOML_HEADER}home = {json.dumps(str(home))}
profiles_path = {json.dumps(str(home / "profiles.toml"))}

[api]
url = {json.dumps(services.prefect_api)}

[server]
analytics_enabled = false

[server.ephemeral]
enabled = false
"""
    if _read_toml() != text:
        require_own_toml()
        replace_text(PREFECT_TOML, text)


def _read_toml() -> str | None:
    """Read prefect.toml; None if it is missing, or the data folder is another one than the project's own."""
    return PREFECT_TOML.read_text(encoding="utf-8") if data_folder() == DEFAULT_DATA and PREFECT_TOML.exists() else None


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old text or the new one."""
    with replace_file(path, str(os.getpid())) as new:
        new.write_text(text, encoding="utf-8")


def _is_users_own(name: str) -> bool:
    # Two underscores: what Prefect itself tells the process of a flow run, not a setting.
    return name.startswith(("PREFECT_", "MLFLOW_")) and not name.startswith("PREFECT__")


def _without_proxy(name: str) -> str:
    return ",".join(dict.fromkeys([*filter(None, os.environ.get(name, "").split(",")), HOST, "localhost"]))
