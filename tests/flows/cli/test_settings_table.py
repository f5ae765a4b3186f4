"""What `calipert settings` shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from blocks.config.settings import LIBRARIES, Settings, list_library_variables, variable
from core.errors import UserError
from flows.cli.main import app


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The lines that the command prints: `show(VARIABLE=value)`, each by its first word."""
    for name in (*map(variable, Settings.model_fields), *list_library_variables()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("flows.cli.main.CONSOLE.width", 250)
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path))

    def show(**variables: str) -> dict[str, str]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        done = CliRunner().invoke(app, ["settings"], catch_exceptions=False)
        return {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines() if line.strip()}

    return show


def test_every_setting_with_its_value_origin_and_purpose(show, tmp_path: Path) -> None:
    lines = show(CALIPERT_MEMORY_GB="0.5", CALIPERT_SOURCE_NORMAN19="/data/n.h5ad")
    for field, about in Settings.model_fields.items():
        assert lines[variable(field)].endswith(about.description), field
    assert lines["CALIPERT_DATA"].startswith(f"{tmp_path} environment ")
    assert lines["CALIPERT_MEMORY_GB"].startswith("0.5 environment ")
    assert lines["CALIPERT_ENGINE"].startswith("process default ")
    assert lines["CALIPERT_STORE"].startswith("not set default ")
    assert lines["CALIPERT_SOURCE_NORMAN19"].startswith("/data/n.h5ad environment ")
    assert not any(name.startswith(LIBRARIES) for name in lines)


def test_no_password_is_shown(show) -> None:
    hidden = (
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "PREFECT_API_AUTH_STRING",
        "PREFECT_API_DATABASE_CONNECTION_URL",
        "PREFECT_CLIENT_CUSTOM_HEADERS",
    )
    addresses = {
        "AWS_ENDPOINT_URL": "http://ada:hunter2/hunter2@hunter2@server:7070",
        "CALIPERT_MLFLOW_URL": "https://ada:hunter2@pages",
    }
    lines = show(**addresses, **dict.fromkeys(hidden, "hunter2"))
    assert "hunter2" not in str(lines)
    assert lines["AWS_ENDPOINT_URL"] == "http://...@server:7070"
    assert lines["CALIPERT_MLFLOW_URL"].startswith("https://...@pages environment ")
    assert {lines[name] for name in hidden} == {"..."}


def test_a_wrong_value_is_named(show) -> None:
    with pytest.raises(UserError, match="CALIPERT_ENGINE"):
        show(CALIPERT_ENGINE="podman")
