"""Quality of a data set: cells, DEGs and E-distances of its conditions (`docs/science.md`, section 5)."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from core.energy import edistances, principal_coordinates
from core.harmonising import CONTROL
from core.moments import group_codes


def write_quality(cells: ad.AnnData, reference: ad.AnnData, folder: Path) -> None:
    """Write quality.parquet and edistance.parquet (covariate, condition, other, edistance) into `folder`."""
    energy = energy_by_covariate(cells)
    quality(reference, energy).to_parquet(folder / "quality.parquet", index=False)
    tables = [
        table.rename_axis(index="condition").reset_index().melt("condition", var_name="other", value_name="edistance")
        for table in energy.values()
    ]
    long = pd.concat(tables, keys=list(energy), names=["covariate"]).reset_index("covariate")
    long.to_parquet(folder / "edistance.parquet", index=False)


def read_edistances(folder: Path) -> dict[str, pd.DataFrame]:
    """For each covariate the square table of E-distances, from what `write_quality` wrote."""
    long = pd.read_parquet(folder / "edistance.parquet")
    tables = {}
    for covariate, rows in long.groupby("covariate", sort=True):
        names = rows["condition"].unique()
        tables[str(covariate)] = rows.pivot(index="condition", columns="other", values="edistance").loc[names, names]
    return tables


def energy_by_covariate(cells: ad.AnnData) -> dict[str, pd.DataFrame]:
    """For each covariate the E-distances between all its conditions, control first; square tables by condition.

    Principal components are those of the covariate's own cells, control included.
    """
    tables = {}
    for covariate in sorted(cells.obs["covariate"].astype(str).unique()):
        own = cells[(cells.obs["covariate"] == covariate).to_numpy()]
        names = [CONTROL, *sorted(set(own.obs["condition"].astype(str)) - {CONTROL})]
        codes = group_codes(own.obs, pd.DataFrame({"condition": names}))
        tables[covariate] = edistances(principal_coordinates(own.X), codes, names)
    return tables


def quality(reference: ad.AnnData, energy: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per (covariate, condition): n_cells, n_degs (first half), edistance_to_control."""
    table: pd.DataFrame = reference.obs[["covariate", "condition", "n_cells", "n_degs"]].reset_index(drop=True)
    table = table.astype({"covariate": str, "condition": str})
    table["edistance_to_control"] = np.array(
        [energy[a].loc[CONTROL, b] for a, b in zip(table["covariate"], table["condition"], strict=True)],
        dtype=np.float64,
    )
    return table
