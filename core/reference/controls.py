"""The controls and baselines: what every model is compared with. Each is one row of one table.

What computes them is in core.reference.control_profiles and core.reference.linear_baseline.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Role = Literal["positive control", "negative control", "baseline"]
Source = Literal["half split", "reference", "negatives"]


class Control(NamedTuple):
    """A control or baseline, which needs no training by a model (`docs/science.md`, section 3).

    name: in tables and files. role: what it is for. source: the file whose layer of that name holds its profiles: each
    half split's own, the reference's, or the rows of that kind of negatives.h5ad. title, description: as shown.
    """

    name: str
    role: Role
    source: Source
    title: str
    description: str


CONTROLS = (
    Control(
        "technical_duplicate",
        "positive control",
        "half split",
        "technical duplicate",
        "mean of the second half of the condition's cells",
    ),
    Control(
        "interpolated_duplicate",
        "positive control",
        "half split",
        "interpolated duplicate",
        "technical duplicate where a gene responds, dataset mean where it does not",
    ),
    Control(
        "dataset_mean",
        "negative control",
        "negatives",
        "dataset mean",
        "mean of the fold's training perturbations, each weighing the same",
    ),
    Control("control_mean", "negative control", "negatives", "control mean", "mean of all control cells"),
    Control(
        "sparse_mean",
        "negative control",
        "reference",
        "sparse mean",
        "mean of as many cells of the fold's training perturbations as the duplicate has",
    ),
    Control(
        "additive",
        "baseline",
        "reference",
        "additive",
        "of a combination: control plus the sum of its single perturbations' effects",
    ),
    Control("linear", "baseline", "reference", "linear", "linear model of Ahlmann-Eltze et al. 2025"),
)


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
