"""The engine that runs models, and where their containers lie."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from blocks.engines import Engine, ProcessEngine
from blocks.paths import MODEL_CONTAINERS
from core.catalog.schema import ResolvedModel
from core.errors import UserError

ENGINE = "CALIPERT_ENGINE"
PROCESS, DOCKER, KUBERNETES = "process", "docker", "kubernetes"


def engine() -> Engine:
    """The engine in use: the environment's CALIPERT_ENGINE, by default `process`. Raises UserError for another name."""
    name = _name()
    if name == DOCKER:
        from blocks.docker_engine import DockerEngine

        return DockerEngine()
    if name == KUBERNETES:
        from blocks.kubernetes_engine import KubernetesEngine

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


def engine_identity(model: ResolvedModel) -> str:
    """What trains a model: the identity of its container under the engine in use, as it is at the first call."""
    return _identity(container(model))


def require_same(model: ResolvedModel) -> None:
    """Raise UserError where a model's container is another one by now than when this process first looked at it: what
    it trained would be kept under the key of the former."""
    if engine().identity(container(model)) != engine_identity(model):
        remedy = "let the flow run end before you change a model, and start it again now"
        raise UserError(f"model {model.template}", "folder or image", "changed while the flow runs", remedy)


@cache
def _identity(folder: Path) -> str:
    return engine().identity(folder)


def container(model: ResolvedModel) -> Path:
    """The folder of a model under model_containers."""
    if model.container is None:
        raise ValueError(f"{model.name} is computed by the project itself and has no container")
    return MODEL_CONTAINERS / model.container
