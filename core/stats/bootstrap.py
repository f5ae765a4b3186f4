"""Bootstrap over conditions: one set of resamples for all columns of a table."""

from __future__ import annotations

import numpy as np

from core.arrays import Floats, limit_blas_threads
from core.rng import generator

CHUNK = 250  # resamples at once: bounds the memory of the resampling weights


def bootstrap_sums(values: Floats, resamples: int, seed: int, step: str) -> Floats:
    """Return sums of the rows of each resample (resamples x columns).

    Parameters
    ----------
    values : Floats
        Conditions x columns without NaN. Rows are drawn with replacement, as many as there are; the draw depends on
        (seed, step) and the number of rows only.
    resamples : int
        How many to draw.
    seed : int
        Seed of the draws.
    step : str
        What is drawn, by name.

    Returns
    -------
    Floats
    """
    n = len(values)
    rng = generator(seed, step)
    sums = np.empty((resamples, values.shape[1]))
    with limit_blas_threads():
        for start in range(0, resamples, CHUNK):
            size = min(CHUNK, resamples - start)
            drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
            sums[start : start + size] = weights @ values
    return sums


def bootstrap_means(values: Floats, resamples: int, seed: int, step: str) -> Floats:
    """Return means of each resample (resamples x columns) over the rows where the column is not NaN.

    NaN where a resample holds no such row.

    Parameters
    ----------
    values : Floats
        Conditions x columns; NaN is left out.
    resamples : int
        How many to draw.
    seed : int
        Seed of the draws.
    step : str
        What is drawn, by name.

    Returns
    -------
    Floats
    """
    usable = ~np.isnan(values)
    sums = bootstrap_sums(np.hstack([np.where(usable, values, 0.0), usable.astype(np.float64)]), resamples, seed, step)
    total, count = np.hsplit(sums, 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / count)


def interval(resampled: Floats) -> tuple[Floats, Floats]:
    """Return the central 95 % of the resampled values of each column (low, high), percentile method; NaN: no value.

    Parameters
    ----------
    resampled : Floats
        Resamples x columns.

    Returns
    -------
    tuple[Floats, Floats]
    """
    low, high = np.full(resampled.shape[1], np.nan), np.full(resampled.shape[1], np.nan)
    some = ~np.isnan(resampled).all(axis=0)
    if some.any():
        low[some], high[some] = np.nanpercentile(resampled[:, some], [2.5, 97.5], axis=0)
    return low, high
