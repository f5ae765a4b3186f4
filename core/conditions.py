"""The names that everything is keyed by: a cell context (covariate) and a perturbation (condition) in it."""

from __future__ import annotations

import pandas as pd

CONTROL = "control"
SEPARATOR = "+"  # between the genes of a combination
KEYS = ["covariate", "condition"]  # what a group of cells, and a row of every table, is keyed by


def genes_of(condition: str) -> list[str]:
    """The perturbed genes of a condition; none for control."""
    return [] if condition == CONTROL else condition.split(SEPARATOR)


def row_names(covariates: pd.Series, names: pd.Series) -> pd.Index:
    """What the rows of an AnnData over conditions are called: `covariate|condition`."""
    return pd.Index(covariates.astype(str) + "|" + names.astype(str))
