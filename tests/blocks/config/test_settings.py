"""The settings: what the environment says, what holds without it, and what is no value."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from blocks.config.paths import PROJECT_ROOT, data_folder
from blocks.config.settings import DEFAULT_DATA, Settings, read_settings, read_source, variable
from core.errors import UserError


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(variable(field), raising=False)


def test_without_variables_the_defaults_hold() -> None:
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    assert read_settings().model_dump() == defaults
    assert defaults["data"] == DEFAULT_DATA == PROJECT_ROOT / "data"


def test_every_setting_says_what_it_is_for() -> None:
    assert all(field.description and field.description.endswith(".") for field in Settings.model_fields.values())


def test_a_change_of_the_environment_counts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        monkeypatch.setenv("CALIPERT_DATA", str(folder))
        assert read_settings().data == data_folder() == folder


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("CALIPERT_LOCKS", "locks")
    monkeypatch.setenv("CALIPERT_DOCKER", "~/limits.yaml")
    assert (read_settings().locks, read_settings().docker) == (tmp_path / "locks", Path("/home/ada/limits.yaml"))


def test_an_empty_variable_is_as_good_as_none_but_names_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        if field != "memory_gb":
            monkeypatch.setenv(variable(field), "")
    assert read_settings() == Settings.model_construct(**{**read_settings().model_dump(), "gpus": ""})
    assert (read_settings().data, read_settings().store, read_settings().engine) == (DEFAULT_DATA, None, "process")


@pytest.mark.parametrize(("text", "expected"), [(None, 2.0), ("0.5", 0.5), ("16", 16.0)])
def test_gigabytes(text: str | None, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        monkeypatch.setenv("CALIPERT_MEMORY_GB", text)
    assert read_settings().memory_gb == expected


@pytest.mark.parametrize(
    ("field", "text"),
    [("engine", "podman"), *(("memory_gb", text) for text in ["", "2 GB", "0", "-1", "nan", "inf", "0.001"])],
)
def test_a_wrong_value_is_named_with_its_variable(field: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable(field), text)
    with pytest.raises(UserError, match="Unset it for the default") as error:
        read_settings()
    assert (error.value.where, error.value.field, error.value.found) == ("environment", variable(field), repr(text))


def test_a_wrong_value_does_not_hide_where_the_data_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"CALIPERT_DATA": str(tmp_path), "CALIPERT_ENGINE": "podman", "CALIPERT_MEMORY_GB": "x"}.items():
        monkeypatch.setenv(name, text)
    assert data_folder() == tmp_path


def test_the_file_of_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALIPERT_SOURCE_NORMAN19", "/data/n.h5ad")
    assert (read_source("norman19"), read_source("norman19_small")) == ("/data/n.h5ad", None)


# Who touches the environment itself, and for which variables.
OTHERS = {
    "blocks/config/child_environment.py": "those that servers, workers and this process get",
    "blocks/config/secrets.py": "MLFLOW_TRACKING_USERNAME and _PASSWORD, which come before the Secret blocks",
    "blocks/engines/kubernetes/api.py": "KUBERNETES_SERVICE_HOST and _PORT, which a cluster sets",
    "blocks/engines/process.py": "those that a model may see",
    "blocks/local/gpus.py": "CUDA_VISIBLE_DEVICES",
    "blocks/services/workers.py": "a hash of what a worker was started with",
    "blocks/store/bucket.py": "AWS_ENDPOINT_URL",
    "blocks/tracking/client.py": "those of MLflow's client, set",
    "blocks/tracking/running.py": "those of MLflow's client",
    "core/__init__.py": "the number of BLAS's threads, set",
    "deployments/group.py": "those of MLflow's client, and its administrator's",
    "flows/cli/session.py": "Prefect's log on the console, set",
    "flows/cli/status.py": "PREFECT_API_URL and MLFLOW_TRACKING_URI",
    "tasks/record.py": "MLFLOW_TRACKING_URI",
}


def test_no_other_module_reads_the_environment() -> None:
    packages = ("core", "blocks", "tasks", "flows", "deployments")
    sources = [path for package in packages for path in (PROJECT_ROOT / package).rglob("*.py")]
    touching = {str(path.relative_to(PROJECT_ROOT)) for path in sources if "os.environ" in path.read_text()}
    assert touching - {"blocks/config/settings.py"} <= OTHERS.keys()
    for path in touching & OTHERS.keys():
        for node in ast.walk(ast.parse((PROJECT_ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call | ast.Subscript) and ast.unparse(node).startswith("os.environ"):
                assert not re.search("CALIPERT_|GPUS|LOCKS", ast.unparse(node)), f"{path}:{node.lineno}"
