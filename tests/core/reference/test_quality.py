"""Quality of a data set: counts of cells and DEGs, and E-distances between all conditions of each covariate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from core.reference.build import build_negatives, build_reference
from core.reference.cell_sums import CellSums
from core.reference.quality import measure_covariates, summarise_quality, write_quality
from core.reference.quality_files import read_edistances
from core.stats.edistance import measure_edistances, project_cells


@pytest.fixture(scope="module")
def reference(screen: ad.AnnData, sums: Callable[..., CellSums]) -> ad.AnnData:
    return build_reference(sums(screen), build_negatives(sums(screen)), 42)


def test_distances_within_each_covariate(screen: ad.AnnData) -> None:
    """Of its own cells, control included, in principal components of their own."""
    tables = measure_covariates(screen)
    assert list(tables) == sorted(screen.obs["covariate"].unique())
    for covariate, table in tables.items():
        own = screen[(screen.obs["covariate"] == covariate).to_numpy()].copy()
        labels = own.obs["condition"].astype(str)
        names = ["control", *sorted(set(labels) - {"control"})]
        assert list(table.index) == list(table.columns) == names
        codes = labels.map({name: i for i, name in enumerate(names)}).to_numpy()
        expected = measure_edistances(project_cells(own.X), codes, names)
        np.testing.assert_allclose(table, expected, rtol=1e-9, atol=1e-9)


def test_one_row_per_condition(screen: ad.AnnData, reference: ad.AnnData) -> None:
    energy = measure_covariates(screen)
    table = summarise_quality(reference.obs, energy)
    assert list(table.columns) == ["covariate", "condition", "n_cells", "n_degs", "edistance_to_control"]
    assert list(zip(table["covariate"], table["condition"], strict=True)) == list(
        zip(reference.obs["covariate"], reference.obs["condition"], strict=True)
    )
    counted = screen.obs.groupby(["covariate", "condition"], observed=True).size()
    for row in table.itertuples():
        assert row.n_cells == counted[row.covariate, row.condition]
        expected = energy[row.covariate].loc[row.condition, "control"]
        assert row.edistance_to_control == pytest.approx(expected, rel=1e-12)
    assert list(table["n_degs"]) == list(reference.obs["n_degs"])


def test_written_tables_are_read_back(screen: ad.AnnData, reference: ad.AnnData, tmp_path: Path) -> None:
    write_quality(screen, reference.obs, tmp_path)
    energy = measure_covariates(screen)
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "quality.parquet"), summarise_quality(reference.obs, energy)
    )
    read = read_edistances(tmp_path)
    assert list(read) == list(energy)
    for covariate, table in energy.items():
        pd.testing.assert_frame_equal(read[covariate], table, check_names=False)


def test_a_single_control_cell_has_no_distance_but_keeps_its_place(
    sums: Callable[..., CellSums], single_cells: ad.AnnData, tmp_path: Path
) -> None:
    control = np.flatnonzero(single_cells.obs["condition"] == "control")
    cells = single_cells[np.setdiff1d(np.arange(single_cells.n_obs), control[1:])].copy()
    own = sums(cells)
    write_quality(cells, build_reference(own, build_negatives(own), 42).obs, tmp_path)
    table = read_edistances(tmp_path)["all"]
    assert table.index[0] == table.columns[0] == "control"
    assert table["control"].isna().all()
    assert table.loc["control"].isna().all()
    assert table.iloc[1:, 1:].notna().all(axis=None)
    assert pd.read_parquet(tmp_path / "quality.parquet")["edistance_to_control"].isna().all()
