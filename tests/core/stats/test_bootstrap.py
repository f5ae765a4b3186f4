"""The bootstrap over conditions: what a loop over resamples gives, and what theory says of it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from core.rng import generator
from core.stats import bootstrap as module
from core.stats.bootstrap import bootstrap_means, bootstrap_sums, interval


@pytest.fixture
def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.column_stack([rng.standard_normal(37), rng.gamma(1.0, 1.0, 37)])


def test_sums_are_those_of_a_loop_over_the_same_draws(values: np.ndarray) -> None:
    rng = generator(7, "bootstrap")
    expected = []
    for size in (module.CHUNK, module.CHUNK, 100):
        expected += [values[rows].sum(axis=0) for rows in rng.integers(37, size=(size, 37))]
    found = bootstrap_sums(values, 2 * module.CHUNK + 100, 7, "bootstrap")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


def test_draws_hang_on_seed_step_and_number_of_rows_only(values: np.ndarray) -> None:
    plain = bootstrap_sums(values, 300, 7, "bootstrap")
    np.testing.assert_array_equal(bootstrap_sums(values, 300, 7, "bootstrap"), plain)
    np.testing.assert_allclose(bootstrap_sums(values[:, [1]], 300, 7, "bootstrap"), plain[:, [1]], rtol=0, atol=1e-11)
    np.testing.assert_array_equal(bootstrap_sums(values, 20, 7, "bootstrap"), plain[:20])
    for seed, step in ((8, "bootstrap"), (7, "comparison")):
        assert not np.isclose(bootstrap_sums(values, 300, seed, step), plain).any(axis=1).all()


def test_means_are_over_the_values_that_are_there(values: np.ndarray) -> None:
    values[::3, 0] = np.nan
    rng = generator(1, "bootstrap")
    drawn = [values[rows] for rows in rng.integers(37, size=(200, 37))]
    found = bootstrap_means(values, 200, 1, "bootstrap")
    np.testing.assert_allclose(found, [np.nanmean(rows, axis=0) for rows in drawn], rtol=0, atol=1e-12)


def test_a_resample_without_any_value_has_no_mean() -> None:
    values = np.full((4, 2), np.nan)
    values[2, 0] = 5.0
    found = bootstrap_means(values, 500, 1, "bootstrap")
    # One row of four is missed by a resample of four with probability 0.75^4.
    missed = np.isnan(found[:, 0])
    assert stats.binomtest(int(missed.sum()), 500, 0.75**4).pvalue > 1e-3
    assert (found[~missed, 0] == 5.0).all()
    assert np.isnan(found[:, 1]).all()


def test_the_interval_is_the_central_95_percent() -> None:
    resampled = np.random.default_rng(0).permuted(np.tile(np.arange(1001.0)[:, None], 2), axis=0)
    resampled[:, 1] = np.nan
    low, high = interval(resampled)
    np.testing.assert_allclose(low, [25, np.nan])
    np.testing.assert_allclose(high, [975, np.nan])
    some = np.concatenate([resampled[:, :1], np.full((400, 1), np.nan)])
    np.testing.assert_allclose(interval(some), [[25], [975]])


def test_intervals_of_a_normal_mean_are_those_of_theory() -> None:
    n = 60
    values = stats.norm(3, 2).rvs((n, 400), random_state=0)
    low, high = interval(bootstrap_means(values, 2000, 0, "bootstrap"))
    width = 2 * stats.norm.ppf(0.975) * values.std(axis=0) / np.sqrt(n)
    # 2.5 % tails of 2,000 resamples: each end is known to about 3 % of the width.
    np.testing.assert_allclose(high - low, width, rtol=0.15)
    assert np.mean((high - low) / width) == pytest.approx(1, abs=0.01)
    # A percentile interval of 60 values is a little short of 95 %: t and n-1 against z and n.
    expected = 1 - 2 * stats.t.sf(stats.norm.ppf(0.975) * np.sqrt((n - 1) / n), n - 1)
    covered = int(((low < 3) & (high > 3)).sum())
    assert stats.binomtest(covered, 400, expected).pvalue > 1e-3
