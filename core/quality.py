"""Quality of a data set: cells, DEGs and E-distances of its conditions (`docs/science.md`, section 5)."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

from core.energy import edistances, principal_coordinates
from core.harmonising import CONTROL
from core.moments import group_codes


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
