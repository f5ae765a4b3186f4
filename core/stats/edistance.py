"""E-distances between all conditions in closed form (`docs/science.md`, section 5)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy import linalg, sparse
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from core.arrays import Floats, Ints, fix_signs, limit_blas_threads, run_in_threads
from core.io.panels import read_float_panels
from core.progress import log_progress

COMPONENTS = 50
STRIP = 1024  # columns of the covariance that one thread works on
# Up to this width all eigenvectors are found at once; beyond it only the leading ones, to the same precision.
SMALL = 1000


def project_cells(X: Any, components: int = COMPONENTS, rows: Ints | None = None) -> Floats:
    """Project cells onto the first principal components, centred over all cells.

    Parameters
    ----------
    X : Any
        Cells x genes, log1p, CSR in memory or on disk.
    components : int
        How many, at most.
    rows : Ints | None
        The positions of the cells that take part, ascending; by default all.

    Returns
    -------
    Floats
        Cells x min(components, rank bound).
    """
    n, width = X.shape[0] if rows is None else len(rows), X.shape[1]
    k = min(components, width, n - 1)
    with limit_blas_threads():
        total, products = np.zeros(width), _strips(width)
        for _, panel in log_progress("principal components", read_float_panels(X, rows), n):
            # Sums of whole panels, strip by strip: no bit depends on the number of threads.
            dense = panel.toarray()
            total += dense.sum(axis=0)
            run_in_threads(partial(_add_products, dense), products)
        mean = total / n
        axes = fix_signs(_leading(_covariance(products, mean, n), k).T)
        coordinates = np.empty((n, k))
        for span, panel in log_progress("principal coordinates", read_float_panels(X, rows), n):
            coordinates[span] = panel @ axes.T - axes @ mean
    return coordinates


def _strips(width: int) -> list[Floats]:
    """Room for a symmetric matrix: for each strip of columns the rows down to its diagonal block."""
    stops = [min(start + STRIP, width) for start in range(0, width, STRIP)]
    return [np.zeros((stop, stop - start)) for start, stop in zip(range(0, width, STRIP), stops, strict=True)]


def _add_products(values: Floats, strip: Floats) -> None:
    stop, columns = strip.shape
    strip += values[:, :stop].T @ values[:, stop - columns : stop]


def _covariance(products: list[Floats], mean: Floats, n: int) -> Floats:
    """Genes x genes, from the sums of products; takes the strips out of the list, so that both need not be there."""
    width = len(mean)
    covariance = np.empty((width, width))
    while products:
        strip = products.pop()
        stop, columns = strip.shape
        strip -= n * np.outer(mean[:stop], mean[stop - columns : stop])
        strip /= max(n - 1, 1)
        covariance[:stop, stop - columns : stop] = strip
        covariance[stop - columns : stop, :stop] = strip.T
    return covariance


def _leading(matrix: Floats, k: int) -> Floats:
    """Return the eigenvectors of the k largest eigenvalues of a symmetric matrix, as columns, largest first."""
    if len(matrix) <= max(SMALL, 10 * k):
        return _decomposed(matrix, k)
    start, another = np.random.default_rng(0).standard_normal((2, len(matrix)))
    try:
        # Lanczos to machine precision, from a start that is the same everywhere.
        values, vectors = eigsh(matrix, k, which="LA", v0=start, ncv=4 * k, tol=0)
        # It can miss a copy of an eigenvalue that occurs several times: nothing as large may be left.
        rest = LinearOperator(matrix.shape, lambda x: matrix @ x - vectors @ (values * (vectors.T @ x)))
        left = eigsh(rest, 1, which="LA", v0=another, tol=1e-6, return_eigenvectors=False)
    except ArpackNoConvergence:
        # Many nearly equal eigenvalues: the whole decomposition takes longer, but always ends.
        return _decomposed(matrix, k)
    if left.max() > values.min():
        return _decomposed(matrix, k)
    return np.asarray(vectors[:, np.argsort(values)[::-1]])


def _decomposed(matrix: Floats, k: int) -> Floats:
    width = len(matrix)
    return np.asarray(linalg.eigh(matrix, subset_by_index=(width - k, width - 1))[1][:, ::-1])


def measure_edistances(coordinates: Floats, codes: Ints, names: list[str]) -> pd.DataFrame:
    """Measure the E-distance of all pairs of groups: 2 d(a, b) - d(a, a) - d(b, b).

    d are mean squared Euclidean distances (n-1 within).

    Parameters
    ----------
    coordinates : Floats
        Cells x components.
    codes : Ints
        The group of each cell.
    names : list[str]
        The groups. Equal to the sum over pairs of cells (Peidli et al. 2024, scPerturb), from each group's mean and
        variance alone. Groups below two cells are NaN.

    Returns
    -------
    pd.DataFrame
    """
    n = np.bincount(codes, minlength=len(names)).astype(np.float64)
    members = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(len(names), len(codes)))
    with limit_blas_threads(), np.errstate(invalid="ignore", divide="ignore"):
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
