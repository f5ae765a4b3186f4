"""The controls and baselines: what every model is compared with. Each is one row of one table.

What computes them is in core.reference.control_profiles and core.reference.linear_baseline.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Role = Literal["positive control", "negative control", "baseline"]
Source = Literal["half split", "reference", "negatives"]


class Control(NamedTuple):
    """A control or baseline, which needs no training by a model (`docs/science.md`, section 3).

    name: in tables and files, and as shown with spaces. role: what it is for. source: the file whose layer of that name
    holds its profiles: each half split's own, the reference's, or the rows of that kind of negatives.h5ad.
    """

    name: str
    role: Role
    source: Source


CONTROLS = (
    # The mean of the second half of the condition's cells.
    Control("technical_duplicate", "positive control", "half split"),
    # The technical duplicate where a gene responds, the dataset mean where it does not.
    Control("interpolated_duplicate", "positive control", "half split"),
    # The mean of the fold's training perturbations, each weighing the same.
    Control("dataset_mean", "negative control", "negatives"),
    # The mean of all control cells.
    Control("control_mean", "negative control", "negatives"),
    # The mean of as many cells of the fold's training perturbations as the duplicate has.
    Control("sparse_mean", "negative control", "reference"),
    # Of a combination: control plus the sum of its single perturbations' effects.
    Control("additive", "baseline", "reference"),
    # The linear model of Ahlmann-Eltze et al. 2025.
    Control("linear", "baseline", "reference"),
)
# Whom a leaderboard ranks: what predicts, which of the controls are the baselines.
RANKED = ("model", "baseline")


def name_matched_control(control: str, model: str) -> str:
    """Return the name of a control's scores on the genes of a model that lacks some of the reference's.

    Parameters
    ----------
    control : str
        Its name.
    model : str
        Its name.

    Returns
    -------
    str
    """
    return f"{control} on the genes of {model}"
