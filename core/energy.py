"""E-distances between all conditions in closed form (`docs/science.md`, section 5)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import linalg, sparse

from core.arrays import Floats, Ints, fixed_signs, one_blas_thread

COMPONENTS = 50


def principal_coordinates(X: sparse.csr_matrix, components: int = COMPONENTS) -> Floats:
    """Cells in the first principal components, centred over all cells (cells x min(components, rank bound)).

    X: cells x genes, log1p. Exact: eigenvectors of the genes' covariance, on one thread, signs fixed.
    """
    values = sparse.csr_matrix(X, dtype=np.float64)
    n, width = values.shape
    mean = np.asarray(values.mean(axis=0)).ravel()
    k = min(components, width, n - 1)
    with one_blas_thread():
        covariance = ((values.T @ values).toarray() - n * np.outer(mean, mean)) / max(n - 1, 1)
        vectors = linalg.eigh(covariance, subset_by_index=(width - k, width - 1))[1][:, ::-1]
        axes = fixed_signs(vectors.T)
        return np.asarray(values @ axes.T - axes @ mean)


def edistances(coordinates: Floats, codes: Ints, names: list[str]) -> pd.DataFrame:
    """Pairwise E-distance of groups: 2 d(a, b) - d(a, a) - d(b, b), mean squared Euclidean distances (n-1 within).

    coordinates: cells x components. codes: the group of each cell. names: the groups. Equal to the sum over pairs of
    cells (Peidli et al. 2024, scPerturb), from each group's mean and variance alone. Groups below two cells are NaN.
    """
    n = np.bincount(codes, minlength=len(names)).astype(np.float64)
    members = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(len(names), len(codes)))
    with one_blas_thread(), np.errstate(invalid="ignore", divide="ignore"):
        means = np.asarray(members @ coordinates) / n[:, None]
        scatter = members @ np.einsum("ij,ij->i", coordinates - means[codes], coordinates - means[codes])
        # Mean squared distance to the own mean; between two cells of a group it is twice that, with n-1.
        spread = scatter / n
        within = 2.0 * scatter / (n - 1.0)
        squares = np.einsum("ij,ij->i", means, means)
        between = squares[:, None] + squares[None, :] - 2.0 * means @ means.T
        distance = 2.0 * (between + spread[:, None] + spread[None, :]) - within[:, None] - within[None, :]
    np.fill_diagonal(distance, np.where(n > 1, 0.0, np.nan))
    return pd.DataFrame(distance, index=pd.Index(names), columns=pd.Index(names))
