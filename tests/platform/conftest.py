"""What the tests of the platform share: servers for the whole session, a container engine, a small screen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import docker.errors
import pytest
import yaml

from blocks.config import child_environment
from blocks.services import stack as services
from tests.helpers.tiny_screen import ENTRY, SETTINGS


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[child_environment.Services]:
    """Prefect's and MLflow's servers with a data folder of the session's own; stopped at the end."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALIPERT_DATA", str(folder))
        try:
            yield services.ensure_servers()
        finally:
            services.stop()


@pytest.fixture(scope="session")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw counts of 12 knock-downs x 250 genes."""
    from core.simulate import SimulationSettings, simulate

    path = tmp_path_factory.mktemp("raw") / "screen.h5ad"
    simulate(SimulationSettings(**SETTINGS)).cells.write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def tiny() -> dict[str, object]:
    """A user's own catalog entry of that screen, as it is written."""
    return ENTRY


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """A user's own catalog entry of that screen."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(ENTRY))
    return path


@pytest.fixture(scope="session")
def run_benchmark(servers: child_environment.Services, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run the benchmark flow in a process of its own, with a data folder of its own; the folder of the results."""
    entry = tmp_path_factory.mktemp("entry") / "tiny.yaml"
    entry.write_text(yaml.safe_dump(ENTRY))

    def run(raw: Path, data: Path, models: list[str], **environment: str) -> Path:
        parameters = {"dataset": str(entry), "models": models, "sources": {"tiny": str(raw)}}
        code = (
            "import json, sys\n"
            "from flows.benchmark import benchmark\n"
            "print('RESULT', benchmark(**json.loads(sys.argv[1])))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(parameters)],
            env=child_environment.build_child_environment(servers) | {"CALIPERT_DATA": str(data)} | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return Path(done.stdout.rpartition("RESULT ")[2].strip())

    return run


BASE_IMAGE = os.environ.get("CALIPERT_BASE_IMAGE", "calipert-base")


@pytest.fixture(scope="session")
def docker_client() -> Iterator[docker.DockerClient]:
    """A client of the container engine, which has the image CALIPERT_BASE_IMAGE, by default `calipert-base`.

    Skips without them, or fails where CALIPERT_REQUIRE_DOCKER=1 forbids that.
    """
    try:
        client = docker.from_env(version="auto")
        client.images.get(BASE_IMAGE)
    except docker.errors.DockerException as error:
        reason = f"NO CONTAINER ENGINE, the walls around models are not tested (.ci/docker-engine start): {error}"
        if os.environ.get("CALIPERT_REQUIRE_DOCKER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    yield client
    client.close()


@pytest.fixture(scope="session")
def base_image(docker_client: docker.DockerClient) -> str:
    """The image that tests build theirs from: Debian or the like with Python."""
    return BASE_IMAGE


@pytest.fixture(scope="session")
def docker_image(docker_client: docker.DockerClient, tmp_path_factory) -> Iterator[Callable[..., Path]]:
    """Builds the image of a model that needs Python alone: `docker_image(name, model.py, *lines_of_the_Dockerfile)`.

    Returns the model's folder. The image is removed in the end.
    """
    made: list[str] = []

    def make(name: str, model: str, *lines: str) -> Path:
        folder = tmp_path_factory.mktemp("image") / name
        folder.mkdir()
        (folder / "model.py").write_text(model)
        dockerfile = [f"FROM {BASE_IMAGE}", "COPY model.py /model/model.py", *lines]
        dockerfile += ['ENTRYPOINT ["python3", "/model/model.py"]']
        (folder / "Dockerfile").write_text("\n".join(dockerfile))
        made.append(f"calipert-{name}:latest")
        docker_client.images.build(path=str(folder), tag=made[-1], rm=True)
        return folder

    yield make
    for name in made:
        docker_client.images.remove(name, force=True)


@pytest.fixture
def nothing_left(
    docker_client: docker.DockerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], list[str]]]:
    """A data folder of the test's own, of which no container, volume or scratch folder is there in the end.

    The function says which containers and volumes are there now.
    """
    data = tmp_path / "data"
    monkeypatch.setenv("CALIPERT_DATA", str(data))
    label = {"label": f"calipert.data={data}"}

    def left() -> list[str]:
        containers = [each["Names"][0] for each in docker_client.api.containers(all=True, filters=label)]
        return containers + [each["Name"] for each in docker_client.api.volumes(filters=label)["Volumes"] or []]

    yield left
    assert left() == []
    assert not (data / "scratch").exists() or list((data / "scratch").iterdir()) == []
