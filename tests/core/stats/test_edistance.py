"""E-distances equal the explicit sum over pairs of cells, in coordinates equal to scikit-learn's."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.linalg import ArpackNoConvergence
from sklearn.decomposition import PCA

from core.io.panels import split_rows
from core.stats.edistance import COMPONENTS, SMALL, _leading, measure_edistances, project_cells


def by_pairs(x: np.ndarray, codes: np.ndarray, n_groups: int) -> np.ndarray:
    """2 d(a, b) - d(a, a) - d(b, b): mean squared distances over pairs of cells, within a group over n (n - 1)."""
    squared = np.array([[np.sum((a - b) ** 2) for b in x] for a in x])
    d = np.zeros((n_groups, n_groups))
    for a, b in product(range(n_groups), repeat=2):
        block = squared[np.ix_(codes == a, codes == b)]
        n, m = block.shape
        d[a, b] = block.sum() / (n * (n - 1) if a == b else n * m)
    distance = 2 * d - np.diag(d)[:, None] - np.diag(d)[None, :]
    np.fill_diagonal(distance, 0)
    return distance


@pytest.fixture
def expression() -> sparse.csr_matrix:
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.8, 1, 70) * np.exp(0.6 * rng.standard_normal((4, 70)))
    return sparse.csr_matrix(np.log1p(rng.poisson(np.repeat(rate, [30, 20, 25, 15], axis=0))).astype(np.float32))


CODES = np.repeat(np.arange(4), [30, 20, 25, 15])
NAMES = ["control", "A", "A+B", "B"]


def test_equal_to_the_sum_over_pairs(expression: sparse.csr_matrix) -> None:
    coordinates = project_cells(expression)
    order = np.random.default_rng(1).permutation(90)
    table = measure_edistances(coordinates[order], CODES[order], NAMES)
    assert list(table.index) == list(table.columns) == NAMES
    np.testing.assert_allclose(table.to_numpy(), by_pairs(coordinates, CODES, 4), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(table.to_numpy(), table.to_numpy().T, rtol=1e-12)


def test_far_from_the_origin_nothing_is_lost(expression: sparse.csr_matrix) -> None:
    coordinates = project_cells(expression)
    expected = measure_edistances(coordinates, CODES, NAMES).to_numpy()
    np.testing.assert_allclose(
        measure_edistances(coordinates + 50, CODES, NAMES).to_numpy(), expected, rtol=1e-6, atol=1e-8
    )


def test_groups_of_one_cell_or_none_have_no_distance() -> None:
    x = np.random.default_rng(0).standard_normal((7, 3))
    table = measure_edistances(x, np.array([0, 0, 0, 1, 2, 2, 2]), ["a", "one", "b", "none"])
    assert table.loc[["a", "b"], ["a", "b"]].notna().all(axis=None)
    assert table.loc[["one", "none"]].isna().all(axis=None)
    assert table[["one", "none"]].isna().all(axis=None)


@pytest.mark.parametrize("components", [50, 5])
def test_coordinates_equal_scikit_learn(components: int, expression: sparse.csr_matrix) -> None:
    found = project_cells(expression, components)
    model = PCA(components, svd_solver="full").fit(expression.toarray().astype(np.float64))
    expected = model.transform(expression.toarray().astype(np.float64))
    largest = model.components_[np.arange(components), np.abs(model.components_).argmax(axis=1)]
    assert found.shape == (90, components)
    np.testing.assert_allclose(found, expected * np.sign(largest), atol=1e-8)


def test_there_are_no_more_components_than_the_data_have(expression: sparse.csr_matrix) -> None:
    assert project_cells(expression).shape == (90, COMPONENTS)
    few_cells = project_cells(expression[:8])
    assert few_cells.shape == (8, 7)
    few_genes = project_cells(expression[:, :6])
    assert few_genes.shape == (90, 6)
    for x, found in ((expression[:8], few_cells), (expression[:, :6], few_genes)):
        dense = x.toarray().astype(np.float64)
        # All of them together keep all distances.
        np.testing.assert_allclose(found @ found.T, (dense - dense.mean(0)) @ (dense - dense.mean(0)).T, atol=1e-9)


@pytest.fixture(scope="module")
def wide() -> sparse.csr_matrix:
    """More genes than are decomposed at once, and than a strip has."""
    rng = np.random.default_rng(3)
    rate = rng.gamma(0.5, 1, SMALL + 300) * np.exp(0.5 * rng.standard_normal((6, SMALL + 300)))
    return sparse.csr_matrix(np.log1p(rng.poisson(np.repeat(rate, 60, axis=0))).astype(np.float32))


def test_many_genes_equal_scikit_learn(wide: sparse.csr_matrix) -> None:
    dense = wide.toarray().astype(np.float64)
    found = project_cells(wide, 20)
    expected = PCA(20, svd_solver="full").fit_transform(dense)
    np.testing.assert_allclose(found * np.sign((found * expected).sum(axis=0)), expected, rtol=1e-7, atol=1e-9)


def test_equal_eigenvalues_end_in_the_whole_decomposition(wide: sparse.csr_matrix, monkeypatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise ArpackNoConvergence("no convergence", np.zeros(0), np.zeros((0, 0)))

    expected = project_cells(wide, 20)
    monkeypatch.setattr("core.stats.edistance.eigsh", never)
    np.testing.assert_allclose(project_cells(wide, 20), expected, rtol=1e-7, atol=1e-9)


def test_an_eigenvalue_that_occurs_many_times_is_found_as_often() -> None:
    """Lanczos alone converges with some copies missing, and says nothing."""
    width = SMALL + 200
    basis = np.linalg.qr(np.random.default_rng(5).standard_normal((width, width)))[0]
    values = np.concatenate([np.full(30, 10.0), np.linspace(1, 0.1, width - 30)])
    matrix = (basis * values) @ basis.T
    found = _leading((matrix + matrix.T) / 2, 30)
    np.testing.assert_allclose(np.einsum("ij,ij->j", found, matrix @ found), 10.0, rtol=1e-10)


def test_threads_strips_and_disk_change_nothing(wide: sparse.csr_matrix, monkeypatch, tmp_path: Path) -> None:
    expected = project_cells(wide, 20)
    ad.AnnData(wide).write_h5ad(tmp_path / "cells.h5ad")
    on_disk = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r").X
    np.testing.assert_array_equal(project_cells(on_disk, 20), expected)
    with monkeypatch.context() as one:
        one.setattr("core.arrays.cpu_count", partial(int, 1))
        np.testing.assert_array_equal(project_cells(wide, 20), expected)
    monkeypatch.setattr("core.io.panels.split_rows", partial(split_rows, rows=50))
    np.testing.assert_allclose(project_cells(wide, 20), expected, rtol=1e-9, atol=1e-11)
    some = np.concatenate([np.arange(50, 200), np.arange(210, 300)])
    np.testing.assert_array_equal(project_cells(on_disk, 20, some), project_cells(wide[some], 20))


def test_the_order_of_cells_and_genes_does_not_matter(expression: sparse.csr_matrix) -> None:
    rng = np.random.default_rng(2)
    rows, genes = rng.permutation(90), rng.permutation(70)
    found = project_cells(expression[rows][:, genes])
    np.testing.assert_allclose(found, project_cells(expression)[rows], atol=1e-8)
