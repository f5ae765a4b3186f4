"""`calipert model` with a container engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blocks.engines.docker.engine import DockerEngine
from core.errors import UserError
from flows.cli.main import app

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("CALIPERT_ENGINE", raising=False)


def check(*arguments: str) -> tuple[int, list[str], str]:
    """Exit status, what was found wrong, and all that was printed."""
    done = RUNNER.invoke(app, ["model", "check", *arguments])
    if isinstance(done.exception, UserError):
        raise done.exception
    fails = [line.removeprefix("fails ") for line in done.output.splitlines() if line.startswith("fails ")]
    return done.exit_code, fails, done.output


def test_build_and_list(docker_client, tmp_path, base_image):
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "model.py").write_text("")
    (folder / "Dockerfile").write_text(
        "ARG BASE_IMAGE=nothing\nFROM ${BASE_IMAGE}\nCOPY contract.py built/model.py /model/\nRUN ls /model\n"
    )
    try:
        done = RUNNER.invoke(app, ["model", "build", str(folder), "--arg", f"BASE_IMAGE={base_image}"])
        assert done.exit_code == 0, done.output
        assert "contract.py" in done.output
        identity = DockerEngine().identity(folder)
        assert f"built: {identity}" in done.output
        (folder / "model.py").write_text("changed")
        with pytest.raises(UserError, match=r"built before .* was last changed"):
            DockerEngine().identity(folder)
    finally:
        docker_client.images.remove("calipert-built", force=True)
    done = RUNNER.invoke(app, ["model", "list"])
    assert "ridge" in done.output


def test_a_build_that_fails_shows_its_end(docker_client, tmp_path, base_image):
    folder = tmp_path / "unbuilt"
    folder.mkdir()
    (folder / "model.py").write_text("")
    (folder / "Dockerfile").write_text("ARG BASE_IMAGE=nothing\nFROM ${BASE_IMAGE}\nRUN echo before; exit 7\n")
    done = RUNNER.invoke(app, ["model", "build", str(folder), "--arg", f"BASE_IMAGE={base_image}"])
    assert isinstance(done.exception, UserError)
    assert re.search(r"(?s)unbuilt/Dockerfile.*before.*non-zero code: 7", str(done.exception))


def test_check_in_a_container(docker_image, monkeypatch):
    """Of a model that does nothing: the check goes through the engine that is chosen."""
    monkeypatch.setenv("CALIPERT_ENGINE", "docker")
    folder = docker_image("idle", "raise SystemExit(7)")
    status, _, output = check(str(folder))
    assert status == 1
    assert "idle describe ended with exit code 7" in output
