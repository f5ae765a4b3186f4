"""Small screens that the tests of the science share: raw files as published, their entries, the cells made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata as ad
import numpy as np
import pytest

from core.catalog.schema import DatasetSpec
from core.simulate import SimulationSettings, simulate
from tests.helpers.mirror_files import mirror_of

Entry = Callable[..., DatasetSpec]
Prepare = Callable[..., ad.AnnData]

LINES = {"covariate_column": "cell_line"}
PAIRS = {"task": "combination"}


@pytest.fixture(scope="session")
def entry() -> Entry:
    """Makes the catalog entry of a small screen; fields differ from the defaults where given."""

    def make(**fields: Any) -> DatasetSpec:
        small: dict[str, Any] = {
            "name": "screen",
            "title": "a small screen",
            "task": "single",
            "source": {"kind": "local", "hint": "made by a test"},
            "labels": {"column": "perturbation"},
            "min_genes_per_cell": 20,
            "n_variable_genes": 120,
        }
        return DatasetSpec.model_validate(small | fields)

    return make


def raw_screen(shuffle: int, **settings: Any) -> ad.AnnData:
    """Raw counts of a simulated screen with cells and genes in no order, and without its last perturbed gene."""
    raw = simulate(SimulationSettings(genes=250, counts_per_gene=2.5, strength=4, **settings)).cells
    rng = np.random.default_rng(shuffle)
    unmeasured = sorted(label for label in raw.obs["perturbation"].unique() if label.startswith("G"))[-1].split("+")[-1]
    genes = rng.permutation(np.flatnonzero(raw.var_names != unmeasured))
    return raw[rng.permutation(raw.n_obs)][:, genes].copy()


@pytest.fixture(scope="session")
def single_raw() -> ad.AnnData:
    """14 single genes and control in one covariate; one perturbed gene is not measured."""
    return raw_screen(1, singles=14, cells_per_condition=30, cells_per_condition_sd=0.4, control_cells=90)


@pytest.fixture(scope="session")
def pairs_raw() -> ad.AnnData:
    """8 single genes (one more is perturbed in pairs only) and 14 pairs; one perturbed gene is not measured."""
    raw = raw_screen(
        2, singles=9, combinations=14, target_fold_change=4, cells_per_condition=24, cells_per_condition_sd=0.4
    )
    labels = raw.obs["perturbation"].astype(str)
    partner = next(label for label in sorted(set(labels)) if "+" in label).split("+")[0]
    return raw[(labels != partner).to_numpy()].copy()


@pytest.fixture(scope="session")
def lines_raw() -> ad.AnnData:
    """12 single genes in two cell lines, of which the second lacks one."""
    raw = raw_screen(3, singles=12, cells_per_condition=24, control_cells=60, cell_lines=("line_1", "line_2"))
    labels = raw.obs["perturbation"].astype(str)
    absent = sorted(set(labels))[0]
    return raw[((labels != absent) | (raw.obs["cell_line"] == "line_1")).to_numpy()].copy()


@pytest.fixture(scope="session")
def single_cells(prepared: Prepare, single_raw: ad.AnnData, entry: Entry) -> ad.AnnData:
    return prepared(single_raw, entry(), "single.h5ad")


@pytest.fixture(scope="session")
def pairs_cells(prepared: Prepare, pairs_raw: ad.AnnData, entry: Entry) -> ad.AnnData:
    return prepared(pairs_raw, entry(**PAIRS), "pairs.h5ad")


@pytest.fixture(scope="session")
def lines_cells(prepared: Prepare, lines_raw: ad.AnnData, entry: Entry) -> ad.AnnData:
    return prepared(lines_raw, entry(**LINES), "lines.h5ad")


@pytest.fixture(scope="session", params=["single", "pairs", "lines"])
def screen(request: pytest.FixtureRequest) -> ad.AnnData:
    """The cells of each small screen in turn; not to be changed."""
    cells: ad.AnnData = request.getfixturevalue(f"{request.param}_cells")
    return cells


@pytest.fixture(scope="session")
def stored_mirror(pairs_cells: ad.AnnData) -> ad.AnnData:
    """The combination data as a file in the layout of the preprocessed mirror."""
    return mirror_of(pairs_cells)


@pytest.fixture
def mirror(stored_mirror: ad.AnnData) -> ad.AnnData:
    """A copy for each test to change."""
    return stored_mirror.copy()
