"""The layout of the public preprocessed mirror (`*_processed_complete.h5ad`): its cells, halves and folds.

Labels that start with `ctrl` are synthetic mean cells, not perturbations, and are left out.
"""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from core.conditions import CONTROL, KEYS
from core.errors import UserError, shown
from core.prepare.genes import choose_columns
from core.prepare.plan import Plan, order_cells, require_unique_cells

FOLD_PREFIX = "split_fold_"
REQUIRED_OBS = ("condition", "donor_id", "tech_dup_split", FOLD_PREFIX + "0")
HALVES = ("first_half", "second_half")
SPLITS = ("train", "val", "test")


def is_mirror(obs: pd.DataFrame) -> bool:
    """Tell whether a file's table of cells has the mirror's columns.

    Parameters
    ----------
    obs : pd.DataFrame
        The file's table of cells.

    Returns
    -------
    bool
    """
    return all(column in obs for column in REQUIRED_OBS)


def has_mirror_layout(path: Path) -> bool:
    """Tell whether a file has the mirror's columns, by their names alone; False for a file that cannot be read.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    bool
    """
    try:
        with h5py.File(path) as file:
            obs = file["obs"]
            return all(
                column in (obs.dtype.names or () if isinstance(obs, h5py.Dataset) else obs) for column in REQUIRED_OBS
            )
    except (OSError, KeyError):
        return False


def plan_mirror(obs: pd.DataFrame, var: pd.DataFrame, where: str) -> Plan:
    """Return which cells and genes of a mirror file to read, and what they are called.

    Parameters
    ----------
    obs, var : pd.DataFrame
        Its tables of cells and genes. The plan's `obs` has condition, covariate, half and fold_k as the file gives
        them, and its rows (unlike those of a raw file) are in the final order: by covariate, condition, cell name.
    where : str
        What the input is called in messages.

    Returns
    -------
    Plan

    Raises
    ------
    UserError
        For duplicated cell names, a missing or unknown half or split, perturbed conditions whose cells are in several
        splits of a fold or in one half only, and covariates without control.
    """
    require_unique_cells(obs, where)
    labels = obs["condition"].astype(str)
    synthetic = (labels.str.startswith("ctrl") & (labels != CONTROL)).to_numpy()
    own = obs[~synthetic]
    cells = pd.DataFrame({"condition": labels[~synthetic], "covariate": own["donor_id"].astype(str)})
    cells["half"] = _known(own["tech_dup_split"], HALVES, where)
    for fold in list_folds(obs):
        cells[f"fold_{fold}"] = _known(own[f"{FOLD_PREFIX}{fold}"], SPLITS, where)
    order = order_cells(cells)
    cells = cells.iloc[order]
    _require_whole_conditions(cells, where)
    without = sorted(set(cells["covariate"]) - set(cells.loc[cells["condition"] == CONTROL, "covariate"]))
    if without:
        remedy = "give a complete mirror file"
        raise UserError(where, "obs['condition']", f"no {CONTROL!r} cell in {shown(without)}", remedy)
    halves = cells[cells["condition"] != CONTROL].groupby(KEYS)["half"].nunique()
    if (halves < len(HALVES)).any():
        found = f"no cell of {halves.index[halves < len(HALVES)][0]} in one of the halves"
        raise UserError(
            where, "obs['tech_dup_split']", found, "leave the condition out: it has no truth or no duplicate"
        )
    columns, genes, dropped = choose_columns(pd.Index(var.index))
    report = {"cells in the file": len(obs), "synthetic control cells left out": int(synthetic.sum())}
    return Plan(np.flatnonzero(~synthetic)[order], cells, columns, genes, report | dropped)


def take_mirror_cells(data: ad.AnnData, where: str) -> ad.AnnData:
    """Return the mirror's cells in our layout: X log1p, obs covariate, condition, half, fold_k; sorted rows and genes.

    Parameters
    ----------
    data : ad.AnnData
        The mirror file.
    where : str
        What the input is called in messages.

    Returns
    -------
    ad.AnnData

    Raises
    ------
    UserError
        As `plan_mirror` does.
    """
    names = plan_mirror(data.obs, data.var, where)
    matrix = sparse.csr_matrix(data.X, dtype=np.float32)[names.rows][:, names.columns]
    matrix.sort_indices()
    return ad.AnnData(X=matrix, obs=names.obs, var=pd.DataFrame(index=names.genes))


def list_folds(obs: pd.DataFrame) -> list[int]:
    """Return the numbers of the file's folds.

    Parameters
    ----------
    obs : pd.DataFrame
        The file's table of cells.

    Returns
    -------
    list[int]
    """
    numbers = (c.removeprefix(FOLD_PREFIX) for c in obs.columns if c.startswith(FOLD_PREFIX))
    return sorted(int(number) for number in numbers if number.isdigit())


def _known(column: pd.Series, values: tuple[str, ...], where: str) -> pd.Series:
    text = column.astype(str)
    foreign = sorted(set(text) - set(values))
    if foreign:
        raise UserError(where, f"obs[{column.name!r}]", shown(foreign), f"only {', '.join(values)} are allowed there")
    return text


def _require_whole_conditions(cells: pd.DataFrame, where: str) -> None:
    perturbed = cells[cells["condition"] != CONTROL]
    for column in (c for c in cells.columns if c.startswith("fold_")):
        n = perturbed.groupby(KEYS)[column].nunique()
        if (n > 1).any():
            field, found = f"obs['split_{column}']", f"the cells of {n.index[n > 1][0]} are in several splits"
            raise UserError(where, field, found, "a condition is train, val or test as a whole")
