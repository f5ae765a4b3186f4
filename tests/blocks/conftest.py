"""Slight servers in a data folder of their own: the machinery around them is what most tests are about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.services import stack as services
from tests.helpers.slight_servers import fake, serve_with


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data folder of its own; whatever a test starts there is ended with it."""
    folder = tmp_path / "data"
    monkeypatch.setenv("CALIPERT_DATA", str(folder))
    yield folder
    services.stop()


@pytest.fixture
def fakes(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slight servers on any free port in place of Prefect's and MLflow's."""
    serve_with(monkeypatch, fake)
    return data
