"""Quality of a data set: cells, DEGs and E-distances of its conditions (`docs/science.md`, section 5)."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from core.conditions import CONTROL, KEYS
from core.reference.quality_files import EDISTANCES, QUALITY
from core.stats.edistance import measure_edistances, project_cells
from core.stats.moments import code_groups


def write_quality(cells: ad.AnnData, keys: pd.DataFrame, folder: Path) -> None:
    """Write quality.parquet and edistance.parquet (covariate, condition, other, edistance) into `folder`.

    Parameters
    ----------
    cells : ad.AnnData
        In memory or on disk.
    keys : pd.DataFrame
        `obs` of the reference.
    folder : Path
        Where the files lie, or go.
    """
    energy = measure_covariates(cells)
    summarise_quality(keys, energy).to_parquet(folder / QUALITY, index=False)
    long = pd.concat([_long(covariate, table) for covariate, table in energy.items()], ignore_index=True)
    long.to_parquet(folder / EDISTANCES, index=False)


def _long(covariate: str, table: pd.DataFrame) -> pd.DataFrame:
    names, n = table.index, len(table)
    columns = {"covariate": pd.Index([covariate] * n), "condition": names, "other": names}
    codes = {"covariate": np.zeros(n * n), "condition": np.repeat(range(n), n), "other": np.tile(range(n), n)}
    long = {name: pd.Categorical.from_codes(codes[name].astype(np.int32), columns[name].unique()) for name in columns}
    return pd.DataFrame(long).assign(edistance=table.to_numpy().ravel())


def measure_covariates(cells: ad.AnnData) -> dict[str, pd.DataFrame]:
    """Return for each covariate the E-distances between all its conditions, control first; square tables by condition.

    Principal components are those of the covariate's own cells, control included.

    Parameters
    ----------
    cells : ad.AnnData
        Cells x genes.

    Returns
    -------
    dict[str, pd.DataFrame]
    """
    tables = {}
    covariates = cells.obs["covariate"].astype(str).to_numpy()
    for covariate in sorted(set(covariates)):
        rows = np.flatnonzero(covariates == covariate)
        obs = cells.obs.iloc[rows]
        names = [CONTROL, *sorted(set(obs["condition"].astype(str)) - {CONTROL})]
        codes = code_groups(obs, pd.DataFrame({"condition": names}))
        tables[covariate] = measure_edistances(project_cells(cells.X, rows=rows), codes, names)
    return tables


def summarise_quality(keys: pd.DataFrame, energy: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return one row per (covariate, condition): n_cells, n_degs (first half), edistance_to_control.

    Parameters
    ----------
    keys : pd.DataFrame
        `obs` of the reference.
    energy : dict[str, pd.DataFrame]
        By covariate, as `measure_covariates` gives it.

    Returns
    -------
    pd.DataFrame
    """
    table: pd.DataFrame = keys[[*KEYS, "n_cells", "n_degs"]].reset_index(drop=True)
    table = table.astype(dict.fromkeys(KEYS, str))
    to_control = pd.concat({covariate: square.loc[CONTROL] for covariate, square in energy.items()})
    table["edistance_to_control"] = to_control.reindex(pd.MultiIndex.from_frame(table[KEYS])).to_numpy(np.float64)
    return table
