"""Calibration of the metrics on one file: our cells.h5ad, the layout of the preprocessed mirror, or any log1p h5ad."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from core.conditions import CONTROL, SEPARATOR
from core.errors import UserError
from core.io.faults import are_whole, require_log_expression
from core.io.h5ad import open_h5ad
from core.prepare.cells import FEWEST_CONDITIONS, SMALLEST_CONDITION, mask_small_conditions
from core.prepare.labels import harmonise_labels, require_controls
from core.prepare.mirror import is_mirror, take_mirror_cells
from core.prepare.plan import order_cells
from core.prepare.settings import Labels
from core.prepare.splits import Task, draw_folds, draw_halves
from core.reference.build import build_half_split, build_negatives, build_reference
from core.reference.cell_sums import sum_cells
from core.reference.stored_profiles import read_stored_reference
from core.scoring.calibration import CALIBRATING, build_calibration
from core.scoring.evaluation import score_controls

FOLDS: dict[Task, int] = {"single": 5, "combination": 2}


class FileOptions(NamedTuple):
    """How to read a file that is neither our cells.h5ad nor a mirror file.

    Attributes
    ----------
    column, covariate
        Columns of obs with the labels of the conditions and, where there is one, with the covariate.
    control
        The label of unperturbed cells.
    seed
        Of every draw.
    half_seeds
        How many half splits to draw.
    """

    column: str = "condition"
    control: str = CONTROL
    covariate: str | None = None
    seed: int = 42
    half_seeds: int = 5


def calibrate_file(path: Path, options: FileOptions, *, recompute: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score the controls of a file's own (or first drawn) halves, and calibrate the metrics by them.

    Parameters
    ----------
    path
        An h5ad file.
    options
        How to read it.
    recompute
        Recompute the profiles and the differential expression that a mirror file stores. The spread over half splits
        always comes from the file's cells.

    Returns
    -------
    scores : DataFrame
        model, covariate, condition, fold, metric, value.
    calibration : DataFrame
        As `core.scoring.calibration.build_calibration` gives it.

    Raises
    ------
    UserError
        For a file that cannot be used.
    """
    data = open_h5ad(path)
    where = str(path)
    check_file(data, where)
    if is_mirror(data.obs):
        cells = take_mirror_cells(data, where)
    elif {"condition", "covariate", "half", "fold_0"} <= set(data.obs.columns):
        cells = data
        cells.X = sparse.csr_matrix(cells.X)
    else:
        cells = arrange_cells(data, options, where)
    check_log_expression(cells, where)
    further = range(options.seed + 1, options.seed + options.half_seeds)
    halves = {options.seed: cells.obs["half"], **{seed: draw_halves(cells.obs, seed) for seed in further}}
    sums = sum_cells(cells, halves, options.seed)
    if is_mirror(data.obs) and not recompute:
        reference, negatives = read_stored_reference(data, cells, where)
    else:
        negatives = build_negatives(sums)
        reference = build_reference(sums, negatives, options.seed)
    own = score_controls(reference, negatives)
    tables = [own.assign(half_seed=options.seed)]
    for seed in further:
        split = build_half_split(sums, seed, negatives)
        tables.append(score_controls(reference, negatives, split, controls=CALIBRATING).assign(half_seed=seed))
    return own, build_calibration(pd.concat(tables, ignore_index=True), options.seed)


def arrange_cells(data: ad.AnnData, options: FileOptions, where: str) -> ad.AnnData:
    """Arrange the cells of any file as our cells.h5ad has them; draw halves and folds.

    Data with conditions that hold `+` are combination data. Conditions below 4 cells are left out.

    Parameters
    ----------
    data
        Cells x genes, X log1p of normalised counts.
    options
        The columns of obs.
    where
        What errors call the file.

    Returns
    -------
    AnnData
        Sorted cells with condition, covariate, half and folds.

    Raises
    ------
    UserError
        For missing columns, cells without a covariate, no control, a single combination, fewer than 10 conditions.
    """
    wanted = [options.column] + ([options.covariate] if options.covariate else [])
    for column in wanted:
        if column not in data.obs:
            columns = ", ".join(map(str, data.obs.columns)) or "none"
            found = f"no such column; there are: {columns}"
            raise UserError(where, f"obs[{column!r}]", found, "name it with --column or --covariate")
    rules = Labels(column=options.column, control=(options.control,))
    labels = harmonise_labels(data.obs[options.column], rules, where)
    unknown = int(data.obs.loc[labels.notna(), options.covariate].isna().sum()) if options.covariate else 0
    if unknown:
        found = f"{unknown:,} cells without a covariate"
        raise UserError(where, f"obs[{options.covariate!r}]", found, "fill the column, or leave them out")
    covariate = data.obs[options.covariate].astype(str) if options.covariate else "all"
    obs = pd.DataFrame({"condition": labels, "covariate": covariate}, index=data.obs_names)[labels.notna().to_numpy()]
    require_controls(obs, rules, where)
    obs = obs[~mask_small_conditions(obs, SMALLEST_CONDITION)]
    conditions = sorted(set(obs["condition"]) - {CONTROL})
    if len(conditions) < FEWEST_CONDITIONS:
        found = f"{len(conditions)} perturbed conditions of at least {SMALLEST_CONDITION} cells"
        raise UserError(where, f"obs[{options.column!r}]", found, f"{FEWEST_CONDITIONS} are needed")
    combinations = [condition for condition in conditions if SEPARATOR in condition]
    if len(combinations) == 1:
        found = f"one combination only ({combinations[0]}): it cannot be split into two folds"
        remedy = "leave its cells out, or give at least two combinations"
        raise UserError(where, f"obs[{options.column!r}]", found, remedy)
    task: Task = "combination" if combinations else "single"
    obs = obs.assign(half=draw_halves(obs, options.seed)).join(draw_folds(obs, task, FOLDS[task], options.seed))
    obs = obs.iloc[order_cells(obs)]
    matrix = sparse.csr_matrix(data.X)[data.obs_names.get_indexer(obs.index)]
    genes = np.argsort(data.var_names.to_numpy().astype(str), kind="stable")
    if (np.diff(genes) < 0).any():
        matrix = matrix[:, genes]
    matrix.sort_indices()
    return ad.AnnData(X=matrix.astype(np.float32), obs=obs, var=pd.DataFrame(index=data.var_names[genes]))


def check_file(data: ad.AnnData, where: str) -> None:
    """Check that a file has a matrix, and that no two cells or genes have the same name.

    Parameters
    ----------
    data
        Its content.
    where
        What the error calls it.

    Raises
    ------
    UserError
        If not.
    """
    if data.X is None or 0 in data.shape:
        raise UserError(where, "X", "no matrix, or an empty one", "put log1p of normalised counts into X")
    for field, names in (("obs_names", data.obs_names), ("var_names", data.var_names)):
        if names.has_duplicates:
            first = names[names.duplicated()][0]
            raise UserError(where, field, f"duplicated names (first: {first!r})", "make the names unique")


def check_log_expression(cells: ad.AnnData, where: str) -> None:
    """Check that X is finite, not negative, and not counts.

    Parameters
    ----------
    cells
        Cells x genes.
    where
        What the error calls the file.

    Raises
    ------
    UserError
        If not.
    """
    values = sparse.csr_matrix(cells.X).data
    if not np.isfinite(values).all():
        raise UserError(where, "X", "NaN or infinite values", "remove or correct these cells")
    if (values < 0).any():
        raise UserError(where, "X", "negative values", "give log1p of normalised counts, not scaled or centred values")
    require_log_expression(are_whole(values), values.max(initial=0.0), where)
