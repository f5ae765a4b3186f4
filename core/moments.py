"""Sums per group of cells: one pass over the matrix, whatever the number of groups."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from core.arrays import Bools, Floats, Ints


class Moments(NamedTuple):
    """Per group (row) and gene (column): what means, variances and tests need.

    n: cells in each group (groups,). total, squares: sum of x and of x^2 (groups x genes), float64.
    """

    n: Ints
    total: Floats
    squares: Floats

    def mean(self) -> Floats:
        """Groups x genes; NaN where a group is empty."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.total / self.n[:, None])

    def of(self, groups: Bools | Ints) -> Moments:
        """The moments of some groups (a mask, or their positions)."""
        return Moments(self.n[groups], self.total[groups], self.squares[groups])


def group_codes(frame: pd.DataFrame, keys: pd.DataFrame) -> Ints:
    """For each row of `frame` the position of its columns' values in `keys` (same columns), -1 if not there."""
    columns = list(keys.columns)
    index = pd.MultiIndex.from_frame(keys.astype(str))
    return np.asarray(index.get_indexer(pd.MultiIndex.from_frame(frame[columns].astype(str))), dtype=np.int64)


def group_moments(X: sparse.csr_matrix, codes: Ints, n_groups: int) -> Moments:
    """Sums of x and x^2 of the cells of each group, in float64.

    X: cells x genes, CSR, log1p. codes: the group of each cell (0 .. n_groups - 1); -1 belongs to none.
    """
    indicator = _indicator(codes, n_groups)
    values = X.astype(np.float64)
    total = (indicator @ values).toarray()
    values.data **= 2
    squares = (indicator @ values).toarray()
    return Moments(np.bincount(codes[codes >= 0], minlength=n_groups).astype(np.int64), total, squares)


def group_means(X: sparse.csr_matrix, codes: Ints, n_groups: int) -> Floats:
    """Mean of the cells of each group (groups x genes), float64; NaN for an empty group."""
    n = np.bincount(codes[codes >= 0], minlength=n_groups)
    total = (_indicator(codes, n_groups) @ X.astype(np.float64)).toarray()
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / n[:, None])


def _indicator(codes: Ints, n_groups: int) -> sparse.csr_matrix:
    cells = np.flatnonzero(codes >= 0)
    # Cells in row order within each group: sums do not depend on how the matrix was stored.
    order = cells[np.argsort(codes[cells], kind="stable")]
    pointers = np.concatenate([[0], np.cumsum(np.bincount(codes[order], minlength=n_groups))])
    return sparse.csr_matrix((np.ones(len(order)), order, pointers), shape=(n_groups, len(codes)))
