"""What all tests share: where the golden and real data lie, and a data folder of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
