"""The linear baseline of Ahlmann-Eltze et al. 2025 (`docs/science.md`, section 3)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import linalg

from core.arrays import Floats, fix_signs, limit_blas_threads

COMPONENTS = 10
RIDGE = 0.1


def predict_linear(singles: list[str], pseudobulks: Floats, genes: pd.Index, wanted: list[str]) -> Floats:
    """Return predicted profiles of the single-gene conditions `wanted`.

    Parameters
    ----------
    singles : list[str]
        The fold's single-gene training conditions, sorted.
    pseudobulks : Floats
        Their means (conditions x genes, log1p).
    genes : pd.Index
        The measured genes. Y ~ G W P + b with G the leading right singular vectors of the gene-centred pseudobulks, P
        the rows of G of the perturbed genes.
    wanted : list[str]
        Conditions to predict.

    Returns
    -------
    Floats
        Wanted x genes; NaN rows for genes that are not measured, for combinations, and everywhere when fewer than two
        training conditions or none with a measured gene remain.
    """
    predictions = np.full((len(wanted), len(genes)), np.nan)
    rows = genes.get_indexer(pd.Index(singles))
    known = rows >= 0
    if len(singles) < 2 or not known.any():
        return predictions
    k = min(COMPONENTS, len(singles) - 1)
    with limit_blas_threads():
        centred = pseudobulks - pseudobulks.mean(axis=0)
        G = fix_signs(linalg.svd(centred, full_matrices=False)[2][:k]).T
        Y = pseudobulks[known].T
        b = Y.mean(axis=1)
        P = G[rows[known]].T
        left = linalg.solve(G.T @ G + RIDGE * np.eye(k), G.T @ (Y - b[:, None]), assume_a="pos")
        W = linalg.solve(P @ P.T + RIDGE * np.eye(k), (left @ P.T).T, assume_a="sym").T
        targets = genes.get_indexer(pd.Index(wanted))
        measured = targets >= 0
        predictions[measured] = G[targets[measured]] @ W.T @ G.T + b
    return predictions
