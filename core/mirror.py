"""The layout of the public preprocessed mirror (`*_processed_complete.h5ad`) read as our cells and reference.

A mirror file holds cells, halves, folds, stored profiles (rows `<covariate>_<condition>`) and stored DE results. Labels
that start with `ctrl` are synthetic mean cells, not perturbations, and are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from core.arrays import Floats
from core.differential import deg_mask
from core.errors import UserError, shown
from core.harmonising import CONTROL
from core.reference import KEYS, by_condition, reference_keys

PROFILES = {
    "truth": "technical_duplicate_first_half_baseline",
    "technical_duplicate": "technical_duplicate_second_half_baseline",
    "interpolated_duplicate": "interpolated_duplicate_baseline",
    "additive": "additive_baseline",
}
OPTIONAL = ("additive",)  # files without combinations have none
CONTROL_MEAN = "ctrl_baseline"
FOLD_PREFIX = "split_fold_"
DATASET_MEAN = FOLD_PREFIX + "{fold}_split_mean_baseline"
DIFFERENTIAL = {"first": "_gt", "second": ""}
REQUIRED_OBS = ("condition", "donor_id", "tech_dup_split", FOLD_PREFIX + "0")


def is_mirror(data: ad.AnnData) -> bool:
    """Whether the file has the mirror's columns."""
    return all(column in data.obs for column in REQUIRED_OBS)


def mirror_cells(data: ad.AnnData) -> ad.AnnData:
    """The mirror's cells in our layout: X log1p, obs covariate, condition, half, fold_k; sorted rows and genes."""
    labels = data.obs["condition"].astype(str)
    cells = data[((labels == CONTROL) | ~labels.str.startswith("ctrl")).to_numpy()]
    obs = pd.DataFrame(
        {
            "condition": cells.obs["condition"].astype(str),
            "covariate": cells.obs["donor_id"].astype(str),
            "half": cells.obs["tech_dup_split"].astype(str),
        }
    )
    for fold in _folds(data):
        obs[f"fold_{fold}"] = cells.obs[f"{FOLD_PREFIX}{fold}"].astype(str)
    rows = np.lexsort([obs.index.to_numpy(str), obs["condition"].to_numpy(str), obs["covariate"].to_numpy(str)])
    genes = np.argsort(cells.var_names.to_numpy().astype(str), kind="stable")
    matrix = sparse.csr_matrix(cells.X, dtype=np.float32)[rows][:, genes]
    matrix.sort_indices()
    return ad.AnnData(X=matrix, obs=obs.iloc[rows], var=pd.DataFrame(index=cells.var_names[genes]))


def stored_reference(data: ad.AnnData, cells: ad.AnnData, where: str) -> tuple[ad.AnnData, ad.AnnData]:
    """(reference, negatives) from the file's stored profiles and DE results, as they are.

    data: the mirror file. cells: `mirror_cells` of it. Layers that the file does not store (linear, sparse_mean)
    are absent. Raises UserError where a stored table is missing or lacks genes, the truth of a test condition or the
    means of a covariate.
    """
    keys = reference_keys(cells)
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
        n_degs=deg_mask(layers["padj_first"]).sum(axis=1),
    )
    return by_condition(obs, layers, genes), _stored_negatives(data, genes, set(keys["covariate"]), where)


def _stored_negatives(data: ad.AnnData, genes: pd.Index, covariates: set[str], where: str) -> ad.AnnData:
    slots = [("control_mean", -1, CONTROL_MEAN)]
    slots += [("dataset_mean", fold, DATASET_MEAN.format(fold=fold)) for fold in _folds(data)]
    tables = [(kind, fold, _table(data, slot, genes, covariates, where)) for kind, fold, slot in slots]
    rows = [(str(covariate), kind, fold) for kind, fold, table in tables for covariate in table.index]
    obs = pd.DataFrame(rows, columns=["covariate", "kind", "fold"])
    obs.index = pd.Index(obs["covariate"] + "|" + obs["kind"] + "|" + obs["fold"].astype(str))
    values = np.vstack([table.to_numpy(np.float64) for _, _, table in tables])
    return ad.AnnData(X=values, obs=obs, var=pd.DataFrame(index=genes))


def _folds(data: ad.AnnData) -> list[int]:
    numbers = (c.removeprefix(FOLD_PREFIX) for c in data.obs.columns if c.startswith(FOLD_PREFIX))
    return sorted(int(number) for number in numbers if number.isdigit())


def _table(data: ad.AnnData, slot: str, genes: pd.Index, rows: Collection[str], where: str) -> pd.DataFrame:
    """A stored table with its genes in our order; `rows` are those that it must have."""
    table = data.uns.get(slot)
    if not isinstance(table, pd.DataFrame):
        raise UserError(where, f"uns[{slot!r}]", "no such table", "give a complete mirror file, or use --recompute")
    for what, wanted, there in (("genes of X", genes, table.columns), ("rows", pd.Index(sorted(rows)), table.index)):
        missing = wanted.difference(there)
        if len(missing):
            raise UserError(
                where,
                f"uns[{slot!r}]",
                f"{len(missing)} {what} are missing ({shown(list(missing))})",
                "use --recompute",
            )
    return table[genes]


def _differential(
    uns: Mapping[str, Any], slot: str, names: str, stored: pd.Index, genes: pd.Index, where: str
) -> Floats:
    """Stored per-gene values of each condition, aligned by gene name; NaN where the file has none."""
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
