"""What all tests share: where the golden and real data lie, and a data folder of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import docker
import docker.errors
import hypothesis
import pandas as pd
import pytest

from core.catalog.schema import DatasetSpec
from core.prepare.cells import read_cells, write_cells
from core.prepare.splits import draw_halves
from core.reference.cell_sums import CellSums, sum_cells

# No property is timed: a loaded machine is slow at times.
hypothesis.settings.register_profile("untimed", hypothesis.settings(deadline=None))
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]
BASE_IMAGE = os.environ.get("CALIPERT_BASE_IMAGE", "calipert-base")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden and real data: CALIPERT_SHARED, by default ../shared beside the project.

    Skips without it, or fails where CALIPERT_REQUIRE_SHARED=1 forbids that.
    """
    folder = Path(os.environ.get("CALIPERT_SHARED", ROOT.parent / "shared")).resolve()
    if not (folder / "golden").is_dir() or not (folder / "data").is_dir():
        reason = f"no golden and real data in {folder} (CALIPERT_SHARED)"
        if os.environ.get("CALIPERT_REQUIRE_SHARED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ad.AnnData]:
    """The cells that are prepared from a raw file, in memory: `prepared(raw, spec, name_of_the_file)`."""

    def prepare(raw: ad.AnnData, spec: DatasetSpec, name: str = "raw.h5ad", **options: int) -> ad.AnnData:
        folder = tmp_path_factory.mktemp("prepared")
        raw.write_h5ad(folder / Path(name).name)
        write_cells(folder / Path(name).name, spec, {}, folder, **options)
        whole = read_cells(folder).to_memory()
        del whole.uns["provenance"]
        return whole

    return prepare


@pytest.fixture(scope="session")
def sums() -> Callable[..., CellSums]:
    """The sums of cells in memory, with the halves given, else their own as seed 42 and those drawn with seed 43."""

    def make(cells: ad.AnnData, halves: dict[int, pd.Series] | None = None) -> CellSums:
        return sum_cells(cells, halves or {42: cells.obs["half"], 43: draw_halves(cells.obs, 43)}, 42)

    return make


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
