"""What a catalog entry would do with a file, by the file's names alone: no matrix is read, nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from core.conditions import CONTROL, KEYS, SEPARATOR, genes_of
from core.io.h5ad import read_names
from core.prepare.cells import FEWEST_CONDITIONS, SMALLEST_CONDITION
from core.prepare.mirror import is_mirror, plan_mirror
from core.prepare.plan import plan_preparation
from core.prepare.settings import PreparationSettings


class DatasetCheck(NamedTuple):
    """labels: label of the file, condition that it becomes, cells. conditions: covariate, condition, cells, kept.

    cells count those that pass the entry's own filters. report: what is dropped on the way, as in cells.h5ad.
    faults: what would make the preparation refuse the file.
    """

    labels: pd.DataFrame
    conditions: pd.DataFrame
    report: dict[str, Any]
    faults: list[str]


def check_dataset(path: Path, spec: PreparationSettings) -> DatasetCheck:
    """Read the names in the published file `path` as the entry says, or as its own, if it has a mirror's layout.

    The filters that need the counts (genes per cell, cells per gene) are not applied: conditions may still lose cells
    to them.

    Parameters
    ----------
    path : Path
        The file.
    spec : PreparationSettings
        What decides how the cells are prepared; an entry of the catalog is that.

    Returns
    -------
    DatasetCheck

    Raises
    ------
    UserError
        For a file or labels that cannot be used.
    """
    obs, var = read_names(path)
    mirror = is_mirror(obs)
    names = plan_mirror(obs, var, str(path)) if mirror else plan_preparation(obs, var, spec, str(path))
    groups = names.obs.groupby(KEYS, observed=True, sort=True).size()
    conditions = groups.rename("cells").reset_index()
    # A mirror's cells are taken as they are.
    fewest = 0 if mirror else max(spec.min_cells_per_condition, SMALLEST_CONDITION)
    conditions["kept"] = (conditions["condition"] == CONTROL) | (conditions["cells"] >= fewest)
    label = obs["condition" if mirror else spec.labels.column].iloc[names.rows].astype(str)
    labels = pd.DataFrame({"label": label.to_numpy(), "condition": names.obs["condition"].to_numpy()})
    labels = labels.groupby(["condition", "label"], sort=True).size().rename("cells").reset_index()
    perturbed = {gene for condition in conditions["condition"] for gene in genes_of(condition)}
    report = names.report | {"perturbed genes that are not measured": sorted(perturbed - set(names.genes))}
    return DatasetCheck(labels[["label", "condition", "cells"]], conditions, report, _faults(conditions, spec))


def _faults(conditions: pd.DataFrame, spec: PreparationSettings) -> list[str]:
    kept = set(conditions.loc[conditions["kept"], "condition"]) - {CONTROL}
    combined = sorted(condition for condition in kept if SEPARATOR in condition)
    faults = []
    if len(kept) < FEWEST_CONDITIONS:
        faults.append(f"{len(kept)} conditions with enough cells: {FEWEST_CONDITIONS} are needed")
    if spec.task == "single" and combined:
        faults.append(f"{len(combined)} combinations ({combined[0]}, ...) in a data set with `task: single`")
    if spec.task == "combination" and len(combined) < 2:
        faults.append(f"{len(combined)} combinations in a data set with `task: combination`: 2 are needed")
    return faults
