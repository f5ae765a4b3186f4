"""What all tests share: where the golden and real data lie, and a data folder of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
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

# A shell lets its background jobs ignore SIGINT, and all that they start: tests interrupt what they have started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.helpers.leftovers"]

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in this hook too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of one file share its fixtures: one worker runs them, unless they are marked to run apart."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(ROOT))))
    # The longest test begins first: at the end, the other worker would have nothing to do.
    items.sort(key=lambda item: item.path.name != "test_end_to_end.py")


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


@pytest.fixture
def calipert(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line in a process of its own; without `data`, in a fresh data folder."""

    def run(*arguments: object, data: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flows.cli.main", *map(str, arguments)],
            env={**os.environ, "CALIPERT_DATA": str(data or tmp_path / "data"), "COLUMNS": "120"},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return run
