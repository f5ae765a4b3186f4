"""The names that everything is keyed by: a cell context (covariate) and a perturbation (condition) in it."""

from __future__ import annotations

import pandas as pd

CONTROL = "control"
SEPARATOR = "+"  # between the genes of a combination
KEYS = ["covariate", "condition"]  # what a group of cells, and a row of every table, is keyed by


def genes_of(condition: str) -> list[str]:
    """Return the perturbed genes of a condition; none for control.

    Parameters
    ----------
    condition : str
        Its name.

    Returns
    -------
    list[str]
    """
    return [] if condition == CONTROL else condition.split(SEPARATOR)


def row_names(covariates: pd.Series, names: pd.Series) -> pd.Index:
    """Return what the rows of an AnnData over conditions are called: `covariate|condition`.

    Parameters
    ----------
    covariates : pd.Series
        The covariate of each row.
    names : pd.Series
        In the order in which they are shown.

    Returns
    -------
    pd.Index
    """
    return pd.Index(covariates.astype(str) + "|" + names.astype(str))
