"""The engine that runs models, and where their containers lie."""

from __future__ import annotations

from pathlib import Path

from blocks.engines import ENGINES, ProcessEngine
from blocks.paths import PROJECT_ROOT
from core.catalog.schema import ResolvedModel

MODELS = PROJECT_ROOT / "model_containers"


def engine() -> ProcessEngine:
    """The engine in use."""
    return ENGINES["process"]()


def engine_identity(model: ResolvedModel) -> str:
    """What trains a model: the identity of its container under the engine in use."""
    return engine().identity(container(model))


def container(model: ResolvedModel) -> Path:
    """The folder of a model under model_containers."""
    if model.container is None:
        raise ValueError(f"{model.name} is computed by the project itself and has no container")
    return MODELS / model.container
