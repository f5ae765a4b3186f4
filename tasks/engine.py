"""The engine that runs models and makers of embeddings, where their containers lie, and what they compute on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path

from blocks.engines.base import Engine
from blocks.engines.checkpoints import checkpoint
from blocks.engines.process import ProcessEngine
from blocks.local.gpus import Gpu, lease
from core import catalog
from core.catalog.schema import EmbeddingSpec, ResolvedModel
from core.errors import UserError
from tasks.artifacts import made
from tasks.inputs import container_folder

ENGINE = "CALIPERT_ENGINE"
THREADS = 1  # bits may change with the number of threads; folds run beside each other instead
PROCESS, DOCKER, KUBERNETES = "process", "docker", "kubernetes"


def engine() -> Engine:
    """The engine in use: the environment's CALIPERT_ENGINE, by default `process`. Raises UserError for another name."""
    name = _name()
    if name == DOCKER:
        from blocks.engines.docker.engine import DockerEngine

        return DockerEngine()
    if name == KUBERNETES:
        from blocks.engines.kubernetes.engine import KubernetesEngine

        return KubernetesEngine()
    return ProcessEngine()


def runs_elsewhere() -> bool:
    """Whether models run on other machines, so that no GPU of this one is leased for them."""
    return _name() == KUBERNETES


def _name() -> str:
    name = os.environ.get(ENGINE) or PROCESS
    if name not in (PROCESS, DOCKER, KUBERNETES):
        remedy = f"set it to {PROCESS}, {DOCKER} or {KUBERNETES}, or not at all, which means {PROCESS}"
        raise UserError("environment", ENGINE, f"{name!r}, which is no engine", remedy)
    return name


def engine_identity(container: Path) -> str:
    """What a container's results follow from: its identity under the engine in use, as it is at the first call.

    container: a folder under model_containers.
    """
    return _identity(container)


def require_same(container: Path) -> None:
    """Raise UserError where a container is another one by now than when this process first looked at it: what it made
    would be kept under the key of the former."""
    if engine().identity(container) != engine_identity(container):
        remedy = "let the flow run end before you change a model, and start it again now"
        raise UserError(f"model {container.name}", "folder or image", "changed while the flow runs", remedy)


@cache
def _identity(container: Path) -> str:
    return engine().identity(container)


def check_containers(models: Iterable[ResolvedModel], embeddings: Iterable[EmbeddingSpec] = ()) -> None:
    """Raise UserError, before any work, where the engine in use cannot run a model or what makes an embedding: there is
    no such folder, no image, or a package is missing. embeddings: beside those of the models."""
    chosen = list(models)
    wanted = [*embeddings, *(model.embedding for model in chosen if model.embedding)]
    needed: list[ResolvedModel | EmbeddingSpec] = [*chosen, *(part for spec in wanted for part in catalog.parts(spec))]
    faults: dict[str, UserError] = {}
    for container in dict.fromkeys(container_of(one) for one in needed if one.container):
        try:
            engine_identity(container)
        except UserError as error:
            faults[container.name] = error
    if faults:
        first, *others = faults.values()
        also = f"; {', '.join(list(faults)[1:])} cannot run either" if others else ""
        raise UserError(first.where, first.field, f"{first.found}{also}", first.remedy) from first


def container_of(entry: ResolvedModel | EmbeddingSpec) -> Path:
    """The folder of a model, or of what makes an embedding. Raises UserError if there is none."""
    if entry.container is None:
        raise ValueError(f"{entry.name} is computed by the project itself and has no container")
    return container_folder(entry.container, f"catalog entry {entry.name}")


def device(container: Path, name: str) -> AbstractContextManager[Gpu | None]:
    """A GPU of this machine for a container that runs here and uses one; None where there is none, and for others.

    name: what the lease is for, as others who wait for a GPU are told.
    """
    return nullcontext() if runs_elsewhere() or not _uses_gpu(container) else lease(name)


@contextmanager
def resumable(key: str) -> Iterator[str | None]:
    """The folder from which a stage goes on that was killed (blocks.engines.checkpoints); None where models run on
    other machines. key: of the artifact that it makes."""
    if runs_elsewhere():
        yield None
        return
    with checkpoint(key) as folder:
        yield str(folder)


def _uses_gpu(container: Path) -> bool:
    def build(folder: Path) -> None:
        description = engine().describe(container)
        (folder / "describe.json").write_text(json.dumps(asdict(description), sort_keys=True), encoding="utf-8")

    found = made(
        "description",
        build,
        inputs={},
        parameters={"container": container.name},
        code=engine_identity(container),
        label=f"the description of {container.name}",
    )
    return bool(json.loads((found / "describe.json").read_text(encoding="utf-8"))["gpu"])
