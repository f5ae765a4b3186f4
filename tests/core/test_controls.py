"""Controls and the additive baseline equal their formulas (docs/science.md, section 3)."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse

from core.controls import CONTROLS, additive, interpolate, sparse_means

PROFILE = arrays(np.float64, (3, 5), elements=st.floats(0, 9))


def test_names_and_roles() -> None:
    """The table of docs/science.md, section 3."""
    assert {control.name: control.role for control in CONTROLS} == {
        "technical_duplicate": "positive control",
        "interpolated_duplicate": "positive control",
        "dataset_mean": "negative control",
        "control_mean": "negative control",
        "sparse_mean": "negative control",
        "additive": "baseline",
        "linear": "baseline",
    }


@given(duplicate=PROFILE, mean=PROFILE, p=arrays(np.float64, (3, 5), elements=st.floats(0, 1)))
@settings(max_examples=50, deadline=None)
def test_interpolation(duplicate: np.ndarray, mean: np.ndarray, p: np.ndarray) -> None:
    expected = [
        [(1 - q) * d + q * m for q, d, m in zip(*rows, strict=True)] for rows in zip(p, duplicate, mean, strict=True)
    ]
    np.testing.assert_allclose(interpolate(duplicate, mean, p), expected, rtol=1e-12, atol=1e-12)


def test_interpolation_takes_the_mean_where_nothing_was_tested() -> None:
    duplicate, mean = np.full((1, 4), 5.0), np.full((1, 4), 1.0)
    p = np.array([[0.0, 1.0, np.nan, 0.25]])
    assert interpolate(duplicate, mean, p).tolist() == [[5.0, 1.0, 1.0, 4.0]]
    assert np.isnan(interpolate(duplicate, np.full((1, 4), np.nan), p)).all()


@pytest.fixture
def expression() -> tuple[sparse.csr_matrix, pd.DataFrame]:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(index=rng.permutation([f"cell{i:03d}" for i in range(80)]))
    return sparse.csr_matrix((rng.gamma(1, 1, (80, 6)) * (rng.random((80, 6)) < 0.5)).astype(np.float32)), obs


def drawn(obs: pd.DataFrame, pool: np.ndarray, condition: str, size: int) -> np.ndarray:
    """Positions of the cells of a sparse mean, by hand: a draw of its own from the names in sorted order."""
    digest = sha256(f"sparse_mean/x/{condition}".encode()).digest()
    rng = np.random.default_rng([42, int.from_bytes(digest[:8], "big")])
    names = np.array(sorted(obs.index[pool]))
    return np.array([obs.index.get_loc(name) for name in rng.choice(names, size=size, replace=False)])


def test_sparse_means_are_means_of_half_as_many_cells_of_the_pool(
    expression: tuple[sparse.csr_matrix, pd.DataFrame],
) -> None:
    X, obs = expression
    pool = np.arange(10, 70)
    tests = {"B": 21, "A": 8, "C": 4}
    found = sparse_means(X, obs, "x", tests, pool, 42)
    for row, (condition, n) in zip(found, tests.items(), strict=True):
        cells = drawn(obs, pool, condition, n // 2)
        assert len(set(cells)) == n // 2
        np.testing.assert_allclose(row, X[cells].toarray().mean(axis=0, dtype=np.float64), rtol=1e-12)


def test_sparse_means_do_not_hang_on_order_or_on_other_conditions(
    expression: tuple[sparse.csr_matrix, pd.DataFrame],
) -> None:
    X, obs = expression
    pool = np.arange(10, 70)
    found = sparse_means(X, obs, "x", {"A": 20, "B": 30}, pool, 42)
    np.testing.assert_array_equal(sparse_means(X, obs, "x", {"B": 30}, pool, 42)[0], found[1])
    order = np.random.default_rng(1).permutation(80)
    shuffled = sparse_means(X[order], obs.iloc[order], "x", {"A": 20, "B": 30}, np.argsort(order)[pool], 42)
    np.testing.assert_allclose(shuffled, found, rtol=1e-12)
    for seed, covariate in ((43, "x"), (42, "y")):
        assert not np.allclose(sparse_means(X, obs, covariate, {"A": 20}, pool, seed)[0], found[0])


def test_a_condition_of_more_cells_than_the_pool_takes_the_pool(
    expression: tuple[sparse.csr_matrix, pd.DataFrame],
) -> None:
    X, obs = expression
    found = sparse_means(X, obs, "x", {"A": 50}, np.arange(12), 42)
    np.testing.assert_allclose(found[0], X[:12].toarray().mean(axis=0, dtype=np.float64), rtol=1e-12)


def test_additive_by_hand() -> None:
    control = np.array([1.0, 2.0])
    singles = {"A": np.array([2.0, 2.0]), "B": np.array([0.5, 5.0]), "C": np.array([1.0, 1.0])}
    found = additive(["A+B", "A", "A+D", "A+B+C", "D+E"], singles, control)
    # 1 + 1 - 0.5 and 2 + 0 + 3; a single gene is no combination; D and E have no profile.
    np.testing.assert_allclose(found[0], [1.5, 5.0])
    np.testing.assert_allclose(found[3], [1.5, 4.0])
    assert np.isnan(found[[1, 2, 4]]).all()
