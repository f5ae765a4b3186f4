"""compose.yaml as the tests read it, and a Prefect server without MLflow's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.compose import compose, passwords


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """An empty Prefect server, which this process uses."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield
