"""Sums per group equal those of a loop over the groups."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from core.io.panels import split_rows
from core.stats.moments import add_group_sums, add_sums, code_groups, square_values, sum_groups


@pytest.fixture
def expression() -> sparse.csr_matrix:
    rng = np.random.default_rng(0)
    return sparse.csr_matrix((rng.gamma(1, 1, (60, 9)) * (rng.random((60, 9)) < 0.4)).astype(np.float32))


CODES = np.random.default_rng(1).integers(-1, 4, 60)  # the last of 5 groups is empty


def test_sums_means_and_squares(expression: sparse.csr_matrix) -> None:
    moments = sum_groups(expression, CODES, 5)
    x = expression.toarray().astype(np.float64)
    for group in range(5):
        own = x[group == CODES]
        assert moments.n[group] == len(own)
        np.testing.assert_allclose(moments.total[group], own.sum(axis=0), rtol=1e-13)
        np.testing.assert_allclose(moments.squares[group], (own**2).sum(axis=0), rtol=1e-13)
        expected = own.mean(axis=0) if len(own) else np.full(9, np.nan)
        np.testing.assert_allclose(moments.mean()[group], expected, rtol=1e-13)
    assert moments.total.dtype == moments.squares.dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_matrix_stays_as_it_is(dtype: type, expression: sparse.csr_matrix) -> None:
    x = expression.astype(dtype)
    before = x.data.copy()
    sum_groups(x, CODES, 5)
    np.testing.assert_array_equal(x.data, before)
    assert x.dtype == dtype


def test_some_of_the_groups(expression: sparse.csr_matrix) -> None:
    moments = sum_groups(expression, CODES, 5)
    for chosen in (np.array([3, 0]), np.array([True, False, True, False, False])):
        some = moments.of(chosen)
        np.testing.assert_array_equal(some.n, moments.n[chosen])
        np.testing.assert_array_equal(some.total, moments.total[chosen])
        np.testing.assert_array_equal(some.squares, moments.squares[chosen])


def test_codes_are_positions_among_the_keys() -> None:
    frame = pd.DataFrame({"covariate": list("xyyxz"), "half": 1, "condition": ["A", "A", "B", "B", "A"]})
    keys = pd.DataFrame({"covariate": ["x", "y", "y"], "condition": ["A", "B", "A"]})
    assert code_groups(frame, keys).tolist() == [0, 2, 1, -1, -1]
    assert code_groups(frame.astype("category"), keys.astype("category")).tolist() == [0, 2, 1, -1, -1]
    assert code_groups(frame, pd.DataFrame({"condition": ["B"]})).tolist() == [-1, -1, 0, 0, -1]


def test_one_pass_in_panels_on_disk(expression: sparse.csr_matrix, tmp_path: Path, monkeypatch) -> None:
    """Of a matrix and into arrays in files, 7 rows at a time."""
    ad.AnnData(expression).write_h5ad(tmp_path / "cells.h5ad")
    X = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r").X
    whole = sum_groups(expression, CODES, 5)
    monkeypatch.setattr("core.io.panels.split_rows", partial(split_rows, rows=7))
    pieces = sum_groups(X, CODES, 5)
    np.testing.assert_allclose(pieces.total, whole.total, rtol=1e-13)
    np.testing.assert_allclose(pieces.squares, whole.squares, rtol=1e-13)
    np.testing.assert_array_equal(pieces.n, whole.n)
    with h5py.File(tmp_path / "sums.h5", "w") as file:
        total, squares = (file.create_dataset(None, (5, 9), "f8") for _ in range(2))
        for start in range(0, 60, 7):
            rows = slice(start, start + 7)
            values = expression[rows].astype(np.float64)
            add_group_sums(total, CODES[rows], values)
            add_group_sums(squares, CODES[rows], square_values(values))
        np.testing.assert_array_equal(total[:], pieces.total)
        np.testing.assert_array_equal(squares[:], pieces.squares)


def test_sums_of_cells_that_belong_to_several_groups(expression: sparse.csr_matrix) -> None:
    members = np.random.default_rng(2).random((4, 60)) < 0.3
    members[2] = False
    total = np.zeros((4, 9))
    for start in range(0, 60, 25):
        rows = slice(start, start + 25)
        add_sums(total, sparse.csc_matrix(members[:, rows], dtype=np.float64), expression[rows].astype(np.float64))
    np.testing.assert_allclose(total, members @ expression.toarray().astype(np.float64), rtol=1e-13)
