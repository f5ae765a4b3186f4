"""Positive and negative controls and the additive baseline (`docs/science.md`, section 3)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from core.arrays import Floats, Ints
from core.draws import generator
from core.harmonising import genes_of
from core.moments import group_means

Role = Literal["positive control", "negative control", "baseline"]


class Control(NamedTuple):
    """A control or baseline that needs no training by a model: its name and what it is for."""

    name: str
    role: Role


CONTROLS = (
    Control("technical_duplicate", "positive control"),
    Control("interpolated_duplicate", "positive control"),
    Control("dataset_mean", "negative control"),
    Control("control_mean", "negative control"),
    Control("sparse_mean", "negative control"),
    Control("additive", "baseline"),
    Control("linear", "baseline"),
)


def counterpart(control: str, model: str) -> str:
    """The name of a control's scores on the genes of a model that lacks some of the reference's."""
    return f"{control} on the genes of {model}"


def interpolate(duplicate: Floats, dataset_mean: Floats, padj_second: Floats) -> Floats:
    """The interpolated duplicate: per gene a * duplicate + (1 - a) * dataset_mean with a = 1 - adjusted p.

    All conditions x genes, log1p; the p-values are those of the second half; untested (NaN) is a = 0.
    """
    share = np.nan_to_num(1.0 - padj_second, nan=0.0)
    return share * duplicate + (1.0 - share) * dataset_mean


def sparse_means(
    X: sparse.csr_matrix, obs: pd.DataFrame, covariate: str, tests: dict[str, int], pool: Ints, seed: int
) -> Floats:
    """For each test condition the mean of floor(n/2) cells drawn from the fold's training perturbations.

    X, obs: all cells (log1p). tests: condition -> its number of cells n. pool: the positions of the perturbed
    training cells of the fold and covariate. A condition of which half is more than the pool takes the whole pool.
    Returns conditions x genes in the order of `tests`.
    """
    names = obs.index[pool].astype(str)
    ranked = pool[np.argsort(names, kind="stable")]
    chosen = [
        np.sort(
            generator(seed, "sparse_mean", covariate, condition).choice(
                ranked, size=min(n // 2, len(ranked)), replace=False
            )
        )
        for condition, n in tests.items()
    ]
    rows = np.concatenate(chosen)
    codes = np.repeat(np.arange(len(chosen)), [len(c) for c in chosen])
    return group_means(X[rows], codes, len(chosen))


def additive(conditions: list[str], single_means: dict[str, Floats], training_control: Floats) -> Floats:
    """Control plus the sum of the single effects, for each condition that is a combination of known singles.

    single_means: gene -> mean profile of its single-gene training condition. training_control: mean of the fold's
    training control cells. Returns conditions x genes; NaN rows for single genes and where a single is missing.
    """
    profiles = np.full((len(conditions), len(training_control)), np.nan)
    for row, condition in enumerate(conditions):
        genes = genes_of(condition)
        if len(genes) > 1 and all(gene in single_means for gene in genes):
            profiles[row] = training_control + sum(single_means[gene] - training_control for gene in genes)
    return profiles
