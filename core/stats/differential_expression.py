"""Differential expression of every condition against the rest, from moments alone (`docs/science.md`, section 2)."""

from __future__ import annotations

import numpy as np
from scipy import special

from core.arrays import Bools, Floats, run_in_threads
from core.stats.moments import Moments

FEWEST_CELLS = 4
SIGNIFICANCE = 0.05
BLOCK = 16  # conditions at once: their arrays stay in cache


def compare_with_rest(groups: Moments) -> tuple[Floats, Floats]:
    """Welch's t with overestimated variance of each group against all other groups together.

    Parameters
    ----------
    groups : Moments
        Moments of the perturbed conditions of one half and one covariate (conditions x genes, log1p); control is in
        none of them. The rest's n in the standard error and the degrees of freedom is the group's n (scanpy's
        `t-test_overestim_var`).

    Returns
    -------
    tuple[Floats, Floats]
        (t, adjusted p), conditions x genes: p two-sided, Benjamini-Hochberg over genes. 0/0 is t = 0, p = 1; a
        difference without any variance is t = +-inf, p = 0. A condition below 4 cells was not tested: NaN, and its
        cells belong to no rest.
    """
    tested = np.flatnonzero(groups.n >= FEWEST_CELLS)
    shape = groups.total.shape
    t, padj = np.full(shape, np.nan), np.full(shape, np.nan)
    if len(tested) < 2:
        return t, padj
    all_tested = groups if len(tested) == len(groups.n) else groups.of(tested)
    whole = Moments(all_tested.n.sum(), all_tested.total.sum(axis=0), all_tested.squares.sum(axis=0))

    def block(start: int) -> None:
        rows = tested[start : start + BLOCK]
        t[rows], padj[rows] = _against(groups.of(rows), whole)

    run_in_threads(block, range(0, len(tested), BLOCK))
    return t, padj


def _against(own: Moments, whole: Moments) -> tuple[Floats, Floats]:
    """Return (t, adjusted p) of some groups against what is left of the whole without each."""
    rest = Moments(whole.n - own.n, whole.total - own.total, whole.squares - own.squares)
    n = own.n[:, None].astype(np.float64)
    error_own, error_rest = _variance(own) / n, _variance(rest) / n
    variance = error_own + error_rest
    with np.errstate(invalid="ignore", divide="ignore"):
        score = (own.mean() - rest.mean()) / np.sqrt(variance)
        freedom = variance**2 * (n - 1) / (error_own**2 + error_rest**2)
    # Without variance the degrees of freedom do not matter: t is 0 or infinite.
    p = 2 * special.stdtr(np.where(np.isnan(freedom), 1.0, freedom), -np.abs(score))
    undefined = np.isnan(score)
    return np.where(undefined, 0.0, score), adjust_p_values(np.where(undefined, 1.0, p))


def adjust_p_values(p: Floats) -> Floats:
    """Return p-values adjusted for the false discovery rate along the last axis (Benjamini and Hochberg 1995).

    Parameters
    ----------
    p : Floats
        p-values; the last axis is genes.

    Returns
    -------
    Floats
    """
    n = p.shape[-1]
    # Equal p-values get the same adjusted one, in whatever order they come.
    order = np.argsort(p, axis=-1)
    scaled = np.take_along_axis(p, order, axis=-1) * (n / np.arange(1, n + 1))
    monotone = np.minimum(np.minimum.accumulate(scaled[..., ::-1], axis=-1)[..., ::-1], 1.0)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, monotone, axis=-1)
    return adjusted


def mask_degs(padj: Floats) -> Bools:
    """Return differentially expressed genes: adjusted p below 0.05; an untested gene (NaN) is none.

    Parameters
    ----------
    padj : Floats
        Adjusted p-values, conditions x genes.

    Returns
    -------
    Bools
    """
    return np.asarray(padj < SIGNIFICANCE)


def weigh_effects(t: Floats) -> Floats:
    """Return the DEG weights of each condition: |t| scaled to 0..1 over genes, then squared; undefined ones are 0.

    Parameters
    ----------
    t : Floats
        Conditions x genes. A row of zeros means that no weight is defined (DE missing, or |t| the same everywhere).

    Returns
    -------
    Floats
    """
    size = np.abs(t)
    low, high = size.min(axis=-1, keepdims=True), size.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = (size - low) / (high - low)
    return np.asarray(np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0) ** 2)


def _variance(groups: Moments) -> Floats:
    """Return sample variance (n-1) per group and gene; rounding below zero, or below what float64 resolves, is zero."""
    n = groups.n[:, None].astype(np.float64)
    mean = groups.total / n
    mean_square = groups.squares / n
    spread = mean_square - mean**2
    return np.asarray(np.where(spread > 4e-16 * n * mean_square, spread, 0.0) * (n / (n - 1)))
