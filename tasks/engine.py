"""The engine that runs models, and where their containers lie."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from blocks.engines import ENGINES, ProcessEngine
from blocks.paths import MODEL_CONTAINERS
from core.catalog.schema import ResolvedModel


def engine() -> ProcessEngine:
    """The engine in use."""
    return ENGINES["process"]()


def engine_identity(model: ResolvedModel) -> str:
    """What trains a model: the identity of its container under the engine in use, as it is at the first call."""
    return _identity(container(model))


@cache
def _identity(folder: Path) -> str:
    return engine().identity(folder)


def container(model: ResolvedModel) -> Path:
    """The folder of a model under model_containers."""
    if model.container is None:
        raise ValueError(f"{model.name} is computed by the project itself and has no container")
    return MODEL_CONTAINERS / model.container
