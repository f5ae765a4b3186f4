"""A small screen laid out as the contract hands it to a model, and the models' modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from model_containers import contract
from tasks.model_panel import Panel, write_panel

# What models share they import by the names that it has in their containers.
sys.modules["contract"] = contract
from model_containers import neural  # noqa: E402

sys.modules["neural"] = neural

MODELS = Path(contract.__file__).parent


@pytest.fixture(autouse=True, scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A data folder of the tests' own: the engine keeps its scratch there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALIPERT_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def panel(tmp_path_factory: pytest.TempPathFactory) -> Panel:
    """A screen in one covariate."""
    return write_panel(tmp_path_factory.mktemp("panel"), ("line",))


@pytest.fixture(scope="session")
def two_lines(tmp_path_factory: pytest.TempPathFactory) -> Panel:
    """A screen in two covariates."""
    return write_panel(tmp_path_factory.mktemp("two_lines"), ("K562", "RPE1"))


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    """Imports the model.py of a folder of model_containers, as its own process would."""

    def module(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_model", MODELS / name / "model.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded  # dataclasses look their module up
        spec.loader.exec_module(loaded)
        return loaded

    return module


@pytest.fixture(autouse=True)
def _processor_as_found() -> Iterator[None]:
    """A model that trains within the tests' process may have told the processor to flush the smallest numbers to 0."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
