"""The files of a data set's quality: their names, and how they are read."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

QUALITY = "quality.parquet"
EDISTANCES = "edistance.parquet"


def read_edistances(folder: Path) -> dict[str, pd.DataFrame]:
    """Return for each covariate the square table of E-distances, from what `write_quality` wrote.

    Parameters
    ----------
    folder : Path
        Where the files lie, or go.

    Returns
    -------
    dict[str, pd.DataFrame]
    """
    long = pd.read_parquet(folder / EDISTANCES)
    tables = {}
    for covariate, rows in long.groupby("covariate", sort=True, observed=True):
        names = pd.Index(rows["condition"].unique().astype(str))
        values = rows["edistance"].to_numpy().reshape(len(names), len(names))
        tables[str(covariate)] = pd.DataFrame(values, index=names, columns=names)
    return tables
