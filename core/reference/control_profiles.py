"""The profiles of controls and of the additive baseline (`docs/science.md`, section 3)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse

from core.arrays import Floats
from core.conditions import KEYS, genes_of
from core.rng import generator
from core.stats.moments import code_groups


def interpolate_duplicate(duplicate: Floats, dataset_mean: Floats, padj_second: Floats) -> Floats:
    """Return the interpolated duplicate: per gene a * duplicate + (1 - a) * dataset_mean with a = 1 - adjusted p.

    All conditions x genes, log1p; the p-values are those of the second half; untested (NaN) is a = 0.

    Parameters
    ----------
    duplicate, dataset_mean : Floats
        Profiles, conditions x genes, log1p.
    padj_second : Floats
        Adjusted p-values of the second half; NaN: not tested.

    Returns
    -------
    Floats
    """
    share = np.nan_to_num(1.0 - padj_second, nan=0.0)
    return share * duplicate + (1.0 - share) * dataset_mean


def draw_sparse_mean(obs: pd.DataFrame, keys: pd.DataFrame, splits: pd.DataFrame, seed: int) -> sparse.csr_matrix:
    """Draw the cells of which sparse_mean is the mean.

    For each test condition floor(n/2) cells of its fold's training perturbations, in its covariate.

    Parameters
    ----------
    obs : pd.DataFrame
        All cells.
    keys : pd.DataFrame
        Covariate, condition, n_cells, test_fold.
    splits : pd.DataFrame
        Their split in each fold.
    seed : int
        Seed of the draws.

    Returns
    -------
    sparse.csr_matrix
        Keys x cells, 1 where a cell was drawn; no cell for a condition that is never test. A condition of which half is
        more than there are to draw from takes all of them.
    """
    by_name = np.argsort(obs.index.to_numpy(str), kind="stable")
    row_of_cell = code_groups(obs, keys[KEYS])[by_name]
    rows, chosen = [], []
    for (covariate, fold), tests in keys[keys["test_fold"] >= 0].groupby(["covariate", "test_fold"], sort=True):
        in_training = ((keys["covariate"] == covariate) & (splits[f"fold_{fold}"] == "train")).to_numpy()
        # Control cells have no row among the keys.
        pool = by_name[(row_of_cell >= 0) & in_training[row_of_cell]]
        for row in tests.index:
            draw = generator(seed, "sparse_mean", str(covariate), keys["condition"][row])
            n = min(int(keys["n_cells"][row]) // 2, len(pool))
            chosen.append(pool[draw.choice(len(pool), size=n, replace=False)])
            rows.append(np.full(n, row))
    cells = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
    at = np.concatenate(rows) if rows else cells
    drawn = sparse.csr_matrix((np.ones(len(cells)), (at, cells)), shape=(len(keys), len(obs)))
    drawn.sort_indices()
    return drawn


def predict_additive(conditions: list[str], single_means: dict[str, Floats], training_control: Floats) -> Floats:
    """Return control plus the sum of the single effects, for each condition that is a combination of known singles.

    Parameters
    ----------
    conditions : list[str]
        Names of the conditions.
    single_means : dict[str, Floats]
        Gene -> mean profile of its single-gene training condition.
    training_control : Floats
        Mean of the fold's training control cells.

    Returns
    -------
    Floats
        Conditions x genes; NaN rows for single genes and where a single is missing.
    """
    profiles = np.full((len(conditions), len(training_control)), np.nan)
    for row, condition in enumerate(conditions):
        genes = genes_of(condition)
        if len(genes) > 1 and all(gene in single_means for gene in genes):
            profiles[row] = training_control + sum(single_means[gene] - training_control for gene in genes)
    return profiles
