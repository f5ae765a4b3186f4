"""compose.yaml, its passwords and the image, as far as they can be checked without an engine."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from blocks.config import child_environment
from blocks.config.paths import PROJECT_ROOT
from blocks.config.pools import CPU, GPU
from core.errors import UserError
from deployments.secrets import EXAMPLE, fill_example, write

DEPLOYMENTS = PROJECT_ROOT / "deployments"
TEXT = (DEPLOYMENTS / "compose.yaml").read_text(encoding="utf-8")
OWN = ("calipert", "calipert-gpu")
WORKERS = ("cpu-worker", "gpu-worker")
PYTHON = ("prefect", "mlflow", "setup", *WORKERS)

Read = Callable[[Mapping[str, str]], dict[str, Any]]


@pytest.fixture(scope="session")
def stack(compose: Read, passwords: dict[str, str]) -> dict[str, Any]:
    return compose(passwords)


@pytest.fixture(scope="session")
def services(stack: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(stack["services"])


def test_the_services_are_those_of_the_guide(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "s3", *PYTHON}


def test_every_image_is_pinned(services: dict[str, Any]) -> None:
    version = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for name, service in services.items():
        image, _, tag = service["image"].rpartition(":")
        assert re.fullmatch(r"v?\d+(\.\d+)+", tag), name
        assert (image in OWN) == ("build" in service), name
        if image in OWN:
            assert tag == version
    assert re.search(r"^ARG BASE_IMAGE=python:\d+\.\d+\.\d+-slim$", _dockerfile(), re.MULTILINE)


@pytest.mark.parametrize("missing", ["POSTGRES_PASSWORD", "PREFECT_PASSWORD", "MLFLOW_SECRET_KEY", "S3_SECRET_KEY"])
def test_nothing_starts_without_passwords(compose: Read, passwords: dict[str, str], missing: str) -> None:
    with pytest.raises(ValueError, match=f"{missing}: run python3 -m deployments.secrets deployments/.env"):
        compose({**passwords, missing: ""})


def test_no_secret_stands_in_clear(services: dict[str, Any], passwords: dict[str, str]) -> None:
    secrets = {value for name, value in passwords.items() if value not in EXAMPLE.read_text(encoding="utf-8")}
    found = 0
    for name, service in services.items():
        assert not any(secret in str(service["command"]) for secret in secrets if "command" in service), name
        for variable, value in service["environment"].items():
            if re.search(r"PASSWORD|SECRET|ACCESS_KEY|AUTH_STRING", variable):
                found += 1
                assert str(value).removeprefix("calipert:") in secrets, (name, variable)
    assert found > 20
    # Each server's own: what one gives away opens no other.
    databases = {
        services[name]["environment"][variable]
        for name, variable in (
            ("postgres", "POSTGRES_PASSWORD"),
            ("prefect", "PREFECT_SERVER_DATABASE_PASSWORD"),
            ("mlflow", "PGPASSWORD"),
        )
    }
    assert len(databases) == 3


def test_ports_are_open_to_this_machine_alone_by_default(compose: Read, passwords: dict[str, str]) -> None:
    needed = {name: value for name, value in passwords.items() if f"${{{name}:?" in TEXT}
    ports = [port for service in compose(needed)["services"].values() for port in service.get("ports", [])]
    assert sorted(ports) == ["127.0.0.1:4200:4200", "127.0.0.1:5000:5000", "127.0.0.1:7070:7070"]
    opened = compose({**needed, "BIND_ADDRESS": "10.1.2.3"})["services"].values()
    assert {port.split(":")[0] for service in opened for port in service.get("ports", [])} == {"10.1.2.3"}


def test_both_servers_ask_for_passwords(services: dict[str, Any], passwords: dict[str, str]) -> None:
    prefect, mlflow = services["prefect"], services["mlflow"]
    assert prefect["environment"]["PREFECT_SERVER_API_AUTH_STRING"] == f"calipert:{passwords['PREFECT_PASSWORD']}"
    assert "--app-name=basic-auth" in mlflow["command"]
    assert mlflow["environment"]["MLFLOW_BASIC_AUTH_FAIL_CLOSED"] == "true"
    hosts = next(part for part in mlflow["command"] if part.startswith("--allowed-hosts="))
    assert not {"*", "0.0.0.0"} & set(hosts.partition("=")[2].split(","))  # noqa: S104
    for name in ("setup", *WORKERS):
        environment = services[name]["environment"]
        assert environment["PREFECT_API_AUTH_STRING"] == prefect["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
        assert environment["MLFLOW_TRACKING_USERNAME"] == "worker"
        assert environment["MLFLOW_TRACKING_PASSWORD"] == passwords["MLFLOW_WORKER_PASSWORD"]
    for name in WORKERS:
        assert passwords["MLFLOW_ADMIN_PASSWORD"] not in services[name]["environment"].values()


def test_the_example_names_every_variable_and_no_other() -> None:
    used = set(re.findall(r"\$\{(\w+)", TEXT)) | set(re.findall(r"^ +(\w+): # without a value", TEXT, re.MULTILINE))
    named = set(re.findall(r"^#?(\w+)=", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE))
    assert named == used
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", TEXT))
    example = dict(re.findall(r"^(\w+)=(.+)$", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE))
    assert example == defaults


def test_services_are_watched_restarted_and_have_few_rights(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert ("healthcheck" in service) == (name != "setup"), name
        assert service["restart"] == ("no" if name == "setup" else "unless-stopped"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service
        assert not any("docker.sock" in str(volume) for volume in service.get("volumes", [])), name


def test_the_databases_are_reached_by_the_servers_alone(stack: dict[str, Any], services: dict[str, Any]) -> None:
    assert stack["networks"]["databases"]["internal"] is True
    inside = {name for name, service in services.items() if "databases" in service.get("networks", [])}
    assert inside == {"postgres", "prefect", "mlflow"}
    assert services["postgres"]["networks"] == ["databases"]


def test_volumes_are_named(stack: dict[str, Any], services: dict[str, Any]) -> None:
    mounts = [mount.split(":") for service in services.values() for mount in service.get("volumes", [])]
    named = {source for source, *_ in mounts if not source.startswith((".", "/"))}
    assert named == set(stack["volumes"])
    for source, _, *mode in mounts:
        if source.startswith("."):
            assert mode == ["ro"], source


def test_workers_serve_the_pools_by_the_process_engine(services: dict[str, Any]) -> None:
    for name, pool in zip(WORKERS, (CPU, GPU), strict=True):
        command = services[name]["command"]
        assert {f"--pool={pool}", "--type=process"} < set(command)
        assert any(argument.startswith("--limit=") for argument in command), "the pool itself has no limit"
        # What a killed container left is removed by the next one of that name; temporary files go with it.
        assert services[name]["hostname"] == "calipert-worker"
        assert services[name]["environment"]["TMPDIR"] in services[name]["tmpfs"]
        assert services[name]["environment"]["CALIPERT_STORE"] == "s3://calipert/store"
        assert services[name]["depends_on"] == {"setup": {"condition": "service_completed_successfully"}}
    assert services["gpu-worker"]["profiles"] == ["gpu"]
    (device,) = services["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    # A training whose packages differ from those of the benchmark is refused.
    assert services["gpu-worker"]["build"] == services["cpu-worker"]["build"]
    assert services["gpu-worker"]["image"] == services["cpu-worker"]["image"]


def test_the_settings_are_those_of_the_local_stack(services: dict[str, Any]) -> None:
    elsewhere = {"CALIPERT_DATA", "MLFLOW_TRACKING_URI", "NO_PROXY", "no_proxy"} | {
        f"PREFECT_{name}" for name in ("API_URL", "HOME", "PROFILES_PATH")
    }
    local = child_environment.build_environment(child_environment.Services("http://a", "http://b"))
    for name in PYTHON:
        environment = services[name]["environment"]
        for variable in local.keys() - elsewhere:
            assert environment.get(variable) == local[variable], (name, variable)


@pytest.mark.skipif(
    subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0
    if shutil.which("docker")
    else True,
    reason="no `docker compose` on this machine",
)
def test_docker_compose_takes_the_file(passwords: dict[str, str]) -> None:
    command = ["docker", "compose", "-f", str(DEPLOYMENTS / "compose.yaml"), "--profile", "gpu", "config", "--quiet"]
    for variables, status in ((passwords, 0), ({}, 1)):
        environment = {"PATH": os.environ["PATH"], **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert min(done.returncode, 1) == status, done.stderr


# The passwords


def test_passwords_are_random_and_private(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    command = [sys.executable, "-m", "deployments.secrets", str(file)]
    # -S: without any package, as on a server that has nothing but Python.
    command.insert(1, "-S")
    subprocess.run(command, cwd=PROJECT_ROOT, check=True, capture_output=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text(encoding="utf-8")
    values = re.findall(r"^\w*(?:PASSWORD|KEY)=(.*)$", text, re.MULTILINE)
    assert len(values) == len(set(values)) == 9
    assert all(re.fullmatch(r"[A-Za-z0-9]{32}", value) for value in values)
    assert not set(values) & set(re.findall(r"=(.+)$", fill_example(EXAMPLE.read_text(encoding="utf-8")), re.MULTILINE))


def test_passwords_are_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("kept", encoding="utf-8")
    with pytest.raises(UserError, match="exists"):
        write(file)
    assert file.read_text(encoding="utf-8") == "kept"
    with pytest.raises(UserError, match="does not exist"):
        write(tmp_path / "nowhere" / ".env")


def test_passwords_are_kept_out_of_git_and_of_the_image() -> None:
    ignored = subprocess.run(["git", "check-ignore", "deployments/.env"], cwd=PROJECT_ROOT, check=False)
    assert ignored.returncode in (0, 128)  # 128: not a checkout
    assert not _is_sent("deployments/.env")


# The image


def test_everything_that_the_image_copies_is_there_and_sent() -> None:
    copied = [source for line in _instructions("COPY") for source in shlex.split(line)[:-1]]
    assert len(copied) > 8
    for source in copied:
        assert (PROJECT_ROOT / source).exists(), source
        assert _is_sent(source), source
    setup = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = setup["packages"]["find"]["include"]
    assert len(packages) > 3
    assert {package.removesuffix("*") for package in packages} <= set(copied)


def test_the_image_is_sent_what_it_needs_and_nothing_else() -> None:
    for needed in ("core/catalog/datasets/demo.yaml", "core/report/page.html", "model_containers/contract.py"):
        assert _is_sent(needed), needed
    assert _is_sent("deployments/mlflow-auth.ini")
    for unwanted in ("data/store", ".venv/bin/python", ".git/config", "tests/conftest.py", "core/__pycache__/x.pyc"):
        assert not _is_sent(unwanted), unwanted


def test_the_image_runs_as_somebody_without_rights() -> None:
    assert _instructions("USER") == ["calipert"]
    order = [line.split()[0] for line in _dockerfile().splitlines() if re.match(r"[A-Z]+ ", line)]
    assert order.index("USER") > max(index for index, word in enumerate(order) if word in ("COPY", "RUN"))


def _dockerfile() -> str:
    return (DEPLOYMENTS / "Dockerfile").read_text(encoding="utf-8")


def _instructions(word: str) -> list[str]:
    return re.findall(rf"^{word} (.+)$", _dockerfile(), re.MULTILINE)


def _is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path through; the last rule that fits it, or a folder above it, decides."""
    sent = True
    parts = path.split("/")
    for line in (PROJECT_ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        rule = line.removeprefix("!")
        above = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
        if rule.startswith("**/"):
            fits = any(fnmatch.fnmatchcase(part, rule[3:]) for part in parts)
        else:
            fits = any(fnmatch.fnmatchcase(folder, rule) for folder in above if "/" not in folder or "/" in rule)
        if fits:
            sent = line.startswith("!")
    return sent
