"""The linear baseline equals a literal transcription of its formulas (docs/science.md, section 3)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from core.reference.linear_baseline import predict_linear


def literally(singles: list[str], pseudobulks: np.ndarray, genes: list[str], wanted: list[str]) -> np.ndarray:
    """W = (G'G + 0.1 I)^-1 G' (Y - b) P (P'P + 0.1 I)^-1; prediction for gene g: G W G_g + b."""
    n = len(singles)
    k = min(10, n - 1)
    centred = pseudobulks - np.mean(pseudobulks, axis=0)  # conditions x genes, each gene centred
    eigenvalues, eigenvectors = np.linalg.eigh(centred.T @ centred)
    G = eigenvectors[:, np.argsort(eigenvalues)[::-1][:k]]  # genes x k
    measured = [i for i, gene in enumerate(singles) if gene in genes]
    Y = pseudobulks[measured].T  # genes x p
    b = Y.mean(axis=1, keepdims=True)
    P = np.array([G[genes.index(singles[i])] for i in measured])  # p x k
    ridge = 0.1 * np.eye(k)
    W = np.linalg.inv(G.T @ G + ridge) @ G.T @ (Y - b) @ P @ np.linalg.inv(P.T @ P + ridge)
    rows = [
        (G @ W @ G[genes.index(gene)][:, None] + b)[:, 0] if gene in genes else np.full(len(genes), np.nan)
        for gene in wanted
    ]
    return np.array(rows)


def screen(n: int, genes: int = 40, seed: int = 0) -> tuple[list[str], np.ndarray, list[str]]:
    """n perturbed genes, of which every fifth is not measured; pseudobulks; the measured genes."""
    rng = np.random.default_rng(seed)
    measured = [f"g{i:02d}" for i in range(genes)]
    singles = sorted(f"u{i:02d}" if i % 5 == 4 else measured[2 * i] for i in range(n))
    return singles, rng.gamma(1, 1, genes) + 0.3 * rng.standard_normal((n, genes)), measured


@pytest.mark.parametrize("n", [2, 5, 11, 12, 19])
def test_equal_to_its_formulas(n: int) -> None:
    singles, pseudobulks, genes = screen(n)
    wanted = ["g01", "g39", "u99", "g01+g03", singles[0]]
    found = predict_linear(singles, pseudobulks, pd.Index(genes), wanted)
    np.testing.assert_allclose(found, literally(singles, pseudobulks, genes, wanted), rtol=1e-8, atol=1e-10)
    assert np.isfinite(found[[0, 1]]).all()
    assert np.isnan(found[[2, 3]]).all()


def test_all_single_genes_shape_the_components_measured_or_not() -> None:
    singles, pseudobulks, genes = screen(12)
    known = [i for i, gene in enumerate(singles) if gene in genes]
    without = predict_linear([singles[i] for i in known], pseudobulks[known], pd.Index(genes), ["g01"])
    assert not np.allclose(predict_linear(singles, pseudobulks, pd.Index(genes), ["g01"]), without, rtol=1e-3)


def test_the_order_of_genes_does_not_matter() -> None:
    singles, pseudobulks, genes = screen(12)
    order = np.random.default_rng(1).permutation(len(genes))
    found = predict_linear(singles, pseudobulks[:, order], pd.Index(genes)[order], ["g01", "g03"])
    np.testing.assert_allclose(
        found, predict_linear(singles, pseudobulks, pd.Index(genes), ["g01", "g03"])[:, order], rtol=1e-9
    )


def test_too_little_to_learn_from_predicts_nothing() -> None:
    singles, pseudobulks, genes = screen(12)
    few = predict_linear(singles[:1], pseudobulks[:1], pd.Index(genes), ["g01"])
    none = predict_linear([], np.empty((0, len(genes))), pd.Index(genes), ["g01"])
    unmeasured = predict_linear(["u1", "u2", "u3"], pseudobulks[:3], pd.Index(genes), ["g01", "g02"])
    for found, rows in ((few, 1), (none, 1), (unmeasured, 2)):
        assert found.shape == (rows, len(genes))
        assert np.isnan(found).all()
