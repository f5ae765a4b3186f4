"""Differential expression equals scanpy's and statsmodels', constant genes and small groups included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse
from statsmodels.stats.multitest import multipletests

from core.catalog.registry import Catalog
from core.io.h5ad import open_h5ad
from core.stats.differential_expression import adjust_p_values, compare_with_rest, mask_degs, weigh_effects
from core.stats.moments import Moments, sum_groups

Prepare = Callable[..., ad.AnnData]


def by_scanpy(x: np.ndarray, labels: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(t, adjusted p), groups x genes, of `rank_genes_groups` on these cells."""
    genes = [f"g{i:04d}" for i in range(x.shape[1])]
    # The values as stored, but in float64: of float32 values scanpy takes the squares in float32, which alone moves
    # small p-values by 1e-5.
    obs = pd.DataFrame({"label": pd.Categorical(labels)}, index=[str(i) for i in range(len(labels))])
    cells = ad.AnnData(
        sparse.csr_matrix(x.astype(np.float32), dtype=np.float64), obs=obs, var=pd.DataFrame(index=genes)
    )
    cells.uns["log1p"] = {"base": None}  # what scanpy looks for after its own log1p
    sc.tl.rank_genes_groups(cells, "label", method="t-test_overestim_var", reference="rest")
    t, padj = {}, {}
    for group in cells.obs["label"].cat.categories:
        table = sc.get.rank_genes_groups_df(cells, group).set_index("names").loc[genes]
        t[group], padj[group] = table["scores"], table["pvals_adj"]
    return pd.DataFrame(t).T, pd.DataFrame(padj).T


def ours(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = np.unique(labels, return_inverse=True)[1]
    matrix = sparse.csr_matrix(x.astype(np.float32))
    return compare_with_rest(sum_groups(matrix, codes.astype(np.int64), codes.max() + 1))


def screen(sizes: list[int], genes: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """log1p expression with real differences, and labels a, b, c, ..."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([chr(97 + i) for i in range(len(sizes))], sizes)
    mean = rng.gamma(0.6, 2, genes) * np.exp(0.5 * rng.standard_normal((len(sizes), genes)))
    return np.log1p(rng.poisson(np.repeat(mean, sizes, axis=0))), labels


def assert_equal_to_scanpy(x: np.ndarray, labels: np.ndarray) -> None:
    t, padj = ours(x, labels)
    expected_t, expected_padj = by_scanpy(x, labels)
    # scanpy stores t in float32; its p-values are float64. Means that differ by rounding alone have no t to compare.
    np.testing.assert_allclose(t, expected_t.to_numpy(), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(padj, expected_padj.to_numpy(), rtol=1e-6, atol=1e-300)


def test_equal_to_scanpy_on_one_half(single_cells: ad.AnnData) -> None:
    obs = single_cells.obs
    for half in ("first_half", "second_half"):
        mine = ((obs["half"] == half) & (obs["condition"] != "control")).to_numpy()
        assert_equal_to_scanpy(single_cells.X[mine].toarray(), obs["condition"].astype(str).to_numpy()[mine])


@pytest.mark.parametrize("sizes", [[20, 30, 40], [4, 100, 7, 5], [50, 50], [4, 4]])
def test_equal_to_scanpy_for_groups_of_all_sizes(sizes: list[int]) -> None:
    x, labels = screen(sizes)
    x[:, 0] = 0  # expressed nowhere
    x[:, 1] = np.log1p(2.0)  # the same everywhere
    x[labels == "a", 2] = 0  # silent in one group
    x[labels != "a", 3] = 0  # heard in one group only
    x[:, 4] = 0
    x[0, 4] = 1.5  # one cell
    assert_equal_to_scanpy(x, labels)
    t, padj = ours(x, labels)
    assert (t[:, :2] == 0).all()
    assert (padj[:, :2] == 1).all()


def test_equal_to_scanpy_for_tiny_p_values() -> None:
    x, labels = screen([400, 400, 400])
    x[labels == "a", :5] += 1
    assert_equal_to_scanpy(x, labels)
    padj = ours(x, labels)[1]
    assert 0 < padj[0, :5].max() < 1e-50


def test_a_difference_without_any_variance() -> None:
    x, labels = screen([6, 8, 10])
    x[:, 0] = np.where(labels == "b", 2.0, 1.0)
    t, padj = ours(x, labels)
    assert t[1, 0] == np.inf
    assert padj[1, 0] == 0
    assert_equal_to_scanpy(x[labels != "c"], labels[labels != "c"])
    # No other gene can be weighed against an infinite one: no weight is defined.
    assert not weigh_effects(t)[1].any()


@given(low=st.floats(1, 4, width=32), high=st.floats(5, 9, width=32), n=st.integers(4, 60))
@settings(max_examples=40)
def test_rounding_is_no_variance(low: float, high: float, n: int) -> None:
    """However the sums of squares are rounded, groups of equal values have no variance between them."""
    t, padj = ours(np.repeat([[low], [high]], n, axis=0), np.repeat([0, 1], n))
    assert t.ravel().tolist() == [-np.inf, np.inf]
    assert padj.ravel().tolist() == [0, 0]


@given(value=st.floats(2**-10, 12, width=32), n=st.lists(st.integers(4, 300), min_size=2, max_size=4))
@settings(max_examples=40)
def test_a_constant_gene_is_no_difference_however_it_is_rounded(value: float, n: list[int]) -> None:
    labels = np.repeat(np.arange(len(n)), n)
    x = np.column_stack([np.full(len(labels), value), np.random.default_rng(0).random(len(labels))])
    t, padj = ours(x, labels)
    assert (t[:, 0] == 0).all()
    assert (padj[:, 0] == 1).all()


def test_small_groups_are_not_tested_and_are_in_no_rest() -> None:
    x, labels = screen([3, 20, 25, 1, 30])
    t, padj = ours(x, labels)
    assert np.isnan(t[[0, 3]]).all()
    assert np.isnan(padj[[0, 3]]).all()
    large = np.isin(labels, ["b", "c", "e"])
    alone = ours(x[large], labels[large])
    np.testing.assert_array_equal(t[[1, 2, 4]], alone[0])
    np.testing.assert_array_equal(padj[[1, 2, 4]], alone[1])
    assert_equal_to_scanpy(x[large], labels[large])
    assert not mask_degs(padj)[[0, 3]].any()
    assert not weigh_effects(t)[[0, 3]].any()


def test_one_group_has_no_rest() -> None:
    x, labels = screen([3, 20])
    assert all(np.isnan(values).all() for values in ours(x, labels))


@given(p=arrays(np.float64, (3, 11), elements=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.5, 1.0]))))
@settings(max_examples=50)
def test_adjusted_p_equals_statsmodels(p: np.ndarray) -> None:
    expected = np.array([multipletests(row, method="fdr_bh")[1] for row in p])
    np.testing.assert_allclose(adjust_p_values(p), expected, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(adjust_p_values(p[0]), expected[0], rtol=1e-12, atol=1e-300)


def test_degs_are_below_five_per_cent() -> None:
    assert mask_degs(np.array([0.0, 0.049, 0.05, 1.0, np.nan])).tolist() == [True, True, False, False, False]


def test_effect_weights_by_hand() -> None:
    t = np.array([[-4.0, 0.0, 2.0], [1.0, -3.0, 5.0], [2.0, -2.0, 2.0], [np.nan] * 3, [0.0, 0.0, 0.0]])
    expected = np.array([[1, 0, 0.25], [0, 0.25, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(weigh_effects(t), expected, rtol=1e-15)


@pytest.mark.shared
@pytest.mark.filterwarnings("ignore:DataFrame is highly fragmented")
def test_equal_to_scanpy_on_real_data(prepared: Prepare, shared: Path) -> None:
    raw = open_h5ad(shared / "data" / "papalexi21.h5ad")
    cells = prepared(raw, Catalog().dataset("papalexi21_panel"), "papalexi21")
    first = ((cells.obs["half"] == "first_half") & (cells.obs["condition"] != "control")).to_numpy()
    assert_equal_to_scanpy(cells.X[first].toarray(), cells.obs["condition"].astype(str).to_numpy()[first])


def test_blocks_and_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    n = rng.integers(2, 9, 40)
    total = rng.gamma(2.0, 1.0, (40, 30)) * n[:, None]
    groups = Moments(n, total, total**2 / n[:, None] + rng.gamma(1.0, 1.0, (40, 30)))
    whole = compare_with_rest(groups)
    assert np.isnan(whole[0]).any()
    assert not np.isnan(whole[0]).all()
    for block, workers in ((1, 3), (7, 1), (1000, 2)):
        monkeypatch.setattr("core.stats.differential_expression.BLOCK", block)
        monkeypatch.setattr("core.arrays.cpu_count", partial(int, workers))
        for found, expected in zip(compare_with_rest(groups), whole, strict=True):
            np.testing.assert_array_equal(found, expected)
