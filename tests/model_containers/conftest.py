"""The models' modules and small screens, and a data folder of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.models import _processor_as_found, load, panel, planted, planted_pairs, two_lines


@pytest.fixture(autouse=True, scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A data folder of the tests' own: the engine keeps its scratch there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALIPERT_DATA", str(tmp_path_factory.mktemp("data")))
        yield
