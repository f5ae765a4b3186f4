"""Highly variable genes are scanpy's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

from core.catalog.registry import Catalog
from core.io.h5ad import open_h5ad
from core.prepare.cells import normalise_counts
from core.prepare.genes import choose_variable_genes, measure_expression

Prepare = Callable[..., ad.AnnData]


def by_scanpy(log_expression: sparse.csr_matrix, genes: pd.Index, n_top: int) -> set[str]:
    cells = ad.AnnData(log_expression.copy(), var=pd.DataFrame(index=genes))
    sc.pp.highly_variable_genes(cells, n_top_genes=n_top, flavor="seurat")
    return set(genes[cells.var["highly_variable"]])


def ours(log_expression: sparse.csr_matrix, genes: pd.Index, n_top: int) -> set[str]:
    return set(genes[choose_variable_genes(*measure_expression([log_expression], len(genes)), genes, n_top)])


@pytest.fixture(scope="module")
def simulated(single_raw: ad.AnnData) -> tuple[sparse.csr_matrix, pd.Index]:
    return normalise_counts(single_raw.X, None, 1e4), single_raw.var_names


@pytest.mark.parametrize("n_top", [1, 10, 50, 130, 200, 248])
def test_equal_to_scanpy(n_top: int, simulated: tuple[sparse.csr_matrix, pd.Index]) -> None:
    found = ours(*simulated, n_top)
    assert found == by_scanpy(*simulated, n_top)
    assert len(found) == n_top


def test_moments_are_those_of_the_expression(simulated: tuple[sparse.csr_matrix, pd.Index]) -> None:
    x = np.expm1(simulated[0].toarray()).astype(np.float64)
    mean, variance = measure_expression([simulated[0]], simulated[0].shape[1])
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(variance, x.var(axis=0, ddof=1), rtol=1e-9)


def ranked_by_scanpy(log_expression: sparse.csr_matrix, genes: pd.Index) -> list[str]:
    """Genes by scanpy's normalised dispersion, the highest first, equal ones by name; those without one left out."""
    cells = ad.AnnData(log_expression.copy(), var=pd.DataFrame(index=genes))
    sc.pp.highly_variable_genes(cells, n_top_genes=1, flavor="seurat")
    table = cells.var["dispersions_norm"].astype(np.float64).dropna()
    return sorted(table.index, key=lambda gene: (-table[gene], gene))


def test_genes_alone_in_their_bin_and_genes_without_variance() -> None:
    """Alone in its bin a gene counts as 1 whatever its dispersion; an absent or constant gene is never variable."""
    rng = np.random.default_rng(0)
    x = rng.poisson(np.geomspace(0.1, 800, 25), (200, 25)).astype(np.float32)
    x[:, 0], x[:, 7] = 0, 3
    genes = pd.Index([f"g{i:02d}" for i in range(25)])
    log_expression = sparse.csr_matrix(np.log1p(x))
    ranking = ranked_by_scanpy(log_expression, genes)
    assert len(ranking) == 23
    for n_top in range(1, 25):
        assert ours(log_expression, genes, n_top) == set(ranking[:n_top])


def test_ties_at_the_cut_go_by_name(simulated: tuple[sparse.csr_matrix, pd.Index]) -> None:
    """A gene and its twins have the same dispersion: scanpy takes all three, here the first names."""
    log_expression, genes = simulated
    best = ranked_by_scanpy(log_expression, genes)[0]
    column = log_expression[:, genes.get_loc(best)]
    with_twins = sparse.csr_matrix(sparse.hstack([column, log_expression, column]))
    names = pd.Index(["z twin", *genes, "a twin"])
    ranking = ranked_by_scanpy(with_twins, names)
    first = min(ranking.index(name) for name in (best, "a twin", "z twin"))
    assert ranking[first : first + 3] == sorted([best, "a twin", "z twin"])
    for n_top in range(first, first + 4):
        assert ours(with_twins, names, n_top) == set(ranking[:n_top])
    assert by_scanpy(with_twins, names, first + 1) == set(ranking[: first + 3])


def test_few_genes_are_all_kept(simulated: tuple[sparse.csr_matrix, pd.Index]) -> None:
    log_expression, genes = simulated
    assert ours(log_expression, genes, len(genes)) == set(genes)
    assert ours(log_expression, genes, 8192) == set(genes)


@pytest.mark.shared
def test_equal_to_scanpy_on_real_data(prepared: Prepare, shared: Path) -> None:
    raw = open_h5ad(shared / "data" / "papalexi21.h5ad")
    cells = prepared(raw, Catalog().dataset("papalexi21_panel"), "papalexi21")
    for n_top in (20, 100, 250):
        assert ours(cells.X, cells.var_names, n_top) == by_scanpy(cells.X, cells.var_names, n_top)
