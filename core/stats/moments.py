"""Sums per group of cells: one pass over the matrix, whatever the number of groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from core.arrays import Bools, Floats, Ints, run_in_threads
from core.io.panels import read_float_panels


class Moments(NamedTuple):
    """Per group (row) and gene (column): what means, variances and tests need.

    n: cells in each group (groups,). total, squares: sum of x and of x^2 (groups x genes), float64.
    """

    n: Ints
    total: Floats
    squares: Floats

    def mean(self) -> Floats:
        """Return groups x genes; NaN where a group is empty.

        Returns
        -------
        Floats
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.total / self.n[:, None])

    def of(self, groups: Bools | Ints) -> Moments:
        """Return the moments of some groups (a mask, or their positions).

        Parameters
        ----------
        groups : Bools | Ints
            Which groups.

        Returns
        -------
        Moments
        """
        return Moments(self.n[groups], self.total[groups], self.squares[groups])


def code_groups(frame: pd.DataFrame, keys: pd.DataFrame) -> Ints:
    """Return for each row of `frame` the position of its columns' values in `keys` (same columns), -1 if not there.

    Parameters
    ----------
    frame : pd.DataFrame
        A table with at least the columns of `keys`.
    keys : pd.DataFrame
        The values to find, each row once.

    Returns
    -------
    Ints
    """
    columns = list(keys.columns)
    index = pd.MultiIndex.from_frame(keys.astype(str))
    return np.asarray(index.get_indexer(pd.MultiIndex.from_frame(frame[columns].astype(str))), dtype=np.int64)


def add_group_sums(total: Any, codes: Ints, values: sparse.csr_matrix) -> None:
    """Add the sums of some cells to those of their groups.

    Parameters
    ----------
    total : Any
        Groups x genes, float64, an array or an HDF5 dataset.
    codes : Ints
        The group of each cell, -1 for none. Only the groups between the first and the last one that occurs are read and
        written: sorted cells touch few.
    values : sparse.csr_matrix
        Cells x genes, float64.
    """
    if (codes < 0).all():
        return
    low, high = int(codes[codes >= 0].min()), int(codes.max()) + 1
    groups = _indicator(np.where(codes < 0, -1, codes - low), high - low)
    total[low:high] += (groups @ values).toarray()


def add_sums(total: Floats, members: sparse.csc_matrix, values: sparse.csr_matrix) -> None:
    """Add the sums of x of some cells to those of the groups that hold them; a cell may be in several.

    Parameters
    ----------
    total : Floats
        Groups x genes, contiguous.
    members : sparse.csc_matrix
        Groups x cells, 1 for each cell of a group.
    values : sparse.csr_matrix
        Cells x genes, float64.
    """
    sums = (members.tocsr() @ values).tocoo()
    # Many groups have few of these cells: only what is not zero is touched.
    total.reshape(-1)[sums.row.astype(np.int64) * total.shape[1] + sums.col] += sums.data


def square_values(values: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return x^2, of the same shape.

    Parameters
    ----------
    values : sparse.csr_matrix
        The stored values.

    Returns
    -------
    sparse.csr_matrix
    """
    return sparse.csr_matrix((values.data**2, values.indices, values.indptr), shape=values.shape)


def sum_groups(X: Any, codes: Ints, n_groups: int) -> Moments:
    """Return sums of x and x^2 of the cells of each group, in float64; one pass over the cells.

    Parameters
    ----------
    X : Any
        Cells x genes, CSR in memory or on disk, log1p.
    codes : Ints
        The group of each cell (0 .. n_groups - 1); -1 belongs to none.
    n_groups : int
        Number of groups.

    Returns
    -------
    Moments
    """
    total, squares = np.zeros((n_groups, X.shape[1])), np.zeros((n_groups, X.shape[1]))
    for span, values in read_float_panels(X):
        run_in_threads(
            lambda work: add_group_sums(work[0], codes[span], work[1]),  # noqa: B023 - done before the next panel
            [(total, values), (squares, square_values(values))],
        )
    return Moments(count_group_cells(codes, n_groups), total, squares)


def count_group_cells(codes: Ints, n_groups: int) -> Ints:
    """Return number of cells in each group; -1 belongs to none.

    Parameters
    ----------
    codes : Ints
        The group of each cell.
    n_groups : int
        Number of groups.

    Returns
    -------
    Ints
    """
    return np.bincount(codes[codes >= 0], minlength=n_groups).astype(np.int64)


def _indicator(codes: Ints, n_groups: int) -> sparse.csr_matrix:
    cells = np.flatnonzero(codes >= 0)
    # Cells in row order within each group: sums do not depend on how the matrix was stored.
    order = cells[np.argsort(codes[cells], kind="stable")]
    pointers = np.concatenate([[0], np.cumsum(np.bincount(codes[order], minlength=n_groups))])
    return sparse.csr_matrix((np.ones(len(order)), order, pointers), shape=(n_groups, len(codes)))
