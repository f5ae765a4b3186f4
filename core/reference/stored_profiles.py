"""The profiles and DE results that a preprocessed mirror file stores, read as our reference: taken as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from core.arrays import Floats
from core.conditions import KEYS
from core.errors import UserError, shown
from core.prepare.mirror import FOLD_PREFIX, list_folds
from core.reference.build import frame_by_condition, frame_negatives
from core.reference.cell_sums import list_reference_keys
from core.stats.differential_expression import mask_degs

PROFILES = {
    "truth": "technical_duplicate_first_half_baseline",
    "technical_duplicate": "technical_duplicate_second_half_baseline",
    "interpolated_duplicate": "interpolated_duplicate_baseline",
    "additive": "additive_baseline",
}
OPTIONAL = ("additive",)  # files without combinations have none
CONTROL_MEAN = "ctrl_baseline"
DATASET_MEAN = FOLD_PREFIX + "{fold}_split_mean_baseline"
DIFFERENTIAL = {"first": "_gt", "second": ""}


def read_stored_reference(data: ad.AnnData, cells: ad.AnnData, where: str) -> tuple[ad.AnnData, ad.AnnData]:
    """Return (reference, negatives) from the file's stored profiles and DE results, as they are.

    Parameters
    ----------
    data : ad.AnnData
        The mirror file.
    cells : ad.AnnData
        `take_mirror_cells` of it. Layers that the file does not store (linear, sparse_mean) are absent.
    where : str
        What the input is called in messages.

    Returns
    -------
    tuple[ad.AnnData, ad.AnnData]

    Raises
    ------
    UserError
        Where a stored table is missing or lacks genes, the truth of a test condition or the means of a covariate.
    """
    keys, _ = list_reference_keys(cells.obs)
    genes = cells.var_names
    stored = pd.Index(keys["covariate"] + "_" + keys["condition"])
    tested = stored[keys["test_fold"] >= 0]
    layers = {
        name: _table(data, slot, genes, tested if name == "truth" else (), where).reindex(stored).to_numpy(np.float64)
        for name, slot in PROFILES.items()
        if slot in data.uns or name not in OPTIONAL
    }
    for half, suffix in DIFFERENTIAL.items():
        for layer, slot in (("t", "scores_df_dict"), ("padj", "pvals_adj_df_dict")):
            layers[f"{layer}_{half}"] = _differential(
                data.uns, slot + suffix, "names_df_dict" + suffix, stored, genes, where
            )
    size = cells.obs.groupby([*KEYS, "half"], observed=True).size().unstack("half", fill_value=0)
    size = size.reindex(pd.MultiIndex.from_frame(keys[KEYS]))
    obs = keys.assign(
        n_first=size["first_half"].to_numpy(),
        n_second=size["second_half"].to_numpy(),
        n_degs=mask_degs(layers["padj_first"]).sum(axis=1),
    )
    return frame_by_condition(obs, layers, genes), _stored_negatives(data, genes, set(keys["covariate"]), where)


def _stored_negatives(data: ad.AnnData, genes: pd.Index, covariates: set[str], where: str) -> ad.AnnData:
    slots = [("control_mean", -1, CONTROL_MEAN)]
    slots += [("dataset_mean", fold, DATASET_MEAN.format(fold=fold)) for fold in list_folds(data.obs)]
    tables = [(kind, fold, _table(data, slot, genes, covariates, where)) for kind, fold, slot in slots]
    rows = [(str(covariate), kind, fold) for kind, fold, table in tables for covariate in table.index]
    return frame_negatives(rows, np.vstack([table.to_numpy(np.float64) for _, _, table in tables]), genes)


def _table(data: ad.AnnData, slot: str, genes: pd.Index, rows: Collection[str], where: str) -> pd.DataFrame:
    """Return a stored table with its genes in our order; `rows` are those that it must have."""
    table = data.uns.get(slot)
    if not isinstance(table, pd.DataFrame):
        raise UserError(where, f"uns[{slot!r}]", "no such table", "give a complete mirror file, or use --recompute")
    for what, wanted, there in (("genes of X", genes, table.columns), ("rows", pd.Index(sorted(rows)), table.index)):
        missing = wanted.difference(there)
        if len(missing):
            found = f"{len(missing)} {what} are missing ({shown(list(missing))})"
            raise UserError(where, f"uns[{slot!r}]", found, "use --recompute")
    return table[genes]


def _differential(
    uns: Mapping[str, Any], slot: str, names: str, stored: pd.Index, genes: pd.Index, where: str
) -> Floats:
    """Return stored per-gene values of each condition, aligned by gene name; NaN where the file has none."""
    if slot not in uns or names not in uns:
        raise UserError(where, f"uns[{slot!r}]", "no such results", "give a complete mirror file, or use --recompute")
    values = np.full((len(stored), len(genes)), np.nan)
    for row, key in enumerate(stored):
        if key in uns[slot]:
            of_gene = pd.Series(
                np.asarray(uns[slot][key], dtype=np.float64), index=np.asarray(uns[names][key]).astype(str)
            )
            values[row] = of_gene.reindex(genes).to_numpy()
    return values
