"""One pass over the prepared cells for all sums that truth, controls and differential expression are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from core.arrays import Bools, Floats, run_in_threads
from core.conditions import CONTROL, KEYS, genes_of
from core.io.panels import read_float_panels
from core.prepare.splits import list_fold_columns
from core.progress import log_progress
from core.reference.control_profiles import draw_sparse_mean
from core.stats.moments import Moments, add_group_sums, add_sums, code_groups, count_group_cells, square_values


class CellSums(NamedTuple):
    """Sums over cells, float64, of the expression (log1p) of (covariate, condition) groups.

    keys: the perturbed groups, sorted, with `n_cells` and `test_fold` (-1: never test); rows below are these.
    splits: the split of each row in each fold. genes: the columns. halves: for each seed the moments of the first and
    second halves, read when called. mean: of all cells of a group. sparse_mean: of the cells drawn for it (the
    negative control of that name), NaN where it is never test. control: covariate -> mean of its control cells.
    training_control: (covariate, fold) -> mean of those that train in the fold, where a combination is tested.
    """

    keys: pd.DataFrame
    splits: pd.DataFrame
    genes: pd.Index
    halves: Mapping[int, Callable[[], tuple[Moments, Moments]]]
    mean: Floats
    sparse_mean: Floats
    control: dict[str, Floats]
    training_control: dict[tuple[str, int], Floats]


def list_reference_keys(obs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (keys, splits) of the perturbed conditions of some cells, one row each, sorted.

    keys: covariate, condition, `n_cells` and `test_fold` (-1: never test). splits: `train`, `val` or `test` in each
    fold, as the cells' columns `fold_k` say.

    Parameters
    ----------
    obs : pd.DataFrame
        The table of cells, with `covariate` and `condition`.

    Returns
    -------
    tuple[pd.DataFrame, pd.DataFrame]
    """
    table = obs.loc[obs["condition"] != CONTROL, [*KEYS, *list_fold_columns(obs)]].astype(str)
    keys = table.groupby(KEYS, sort=True).size().rename("n_cells").reset_index()
    # All cells of a condition are in one split: the first tells.
    splits = table.drop_duplicates(KEYS).sort_values(KEYS, ignore_index=True)[list_fold_columns(obs)]
    is_test = splits.to_numpy() == "test"
    keys["test_fold"] = np.where(is_test.any(axis=1), is_test.argmax(axis=1), -1) if splits.shape[1] else -1
    return keys, splits


def sum_cells(
    cells: ad.AnnData, halves: Mapping[int, pd.Series], seed: int, room: Callable[[tuple[int, int]], Any] = np.zeros
) -> CellSums:
    """Pass once over the cells, in memory or on disk.

    Parameters
    ----------
    cells : ad.AnnData
        Cells x genes.
    halves : Mapping[int, pd.Series]
        For each seed `first_half` or `second_half` for each cell.
    seed : int
        Of the draws of sparse_mean.
    room : Callable[[tuple[int, int]], Any]
        Makes an array of zeros (float64) of a shape; for many seeds on disk.

    Returns
    -------
    CellSums
    """
    obs, genes = cells.obs, cells.var_names
    keys, splits = list_reference_keys(obs)
    # Control is a group like the others; sorted by name, so that a panel of sorted cells touches few groups.
    groups = obs[KEYS].astype(str).drop_duplicates().sort_values(KEYS, ignore_index=True)
    codes = code_groups(obs, groups)
    is_first = {number: (half == "first_half").to_numpy() for number, half in halves.items()}
    half_codes = {number: 2 * codes + np.where(first, 0, 1) for number, first in is_first.items()}
    shape = 2 * len(groups), len(genes)
    moments = {number: (room(shape), room(shape)) for number in halves}
    draws = draw_sparse_mean(obs, keys, splits, seed)
    training = _training_controls(obs, keys)
    members = sparse.vstack([draws, *training.values()], format="csc")
    sums = np.zeros((members.shape[0], len(genes)))
    for span, values in log_progress("sums of conditions and halves", read_float_panels(cells.X), cells.n_obs):
        parts = values, square_values(values)
        works = [
            partial(add_group_sums, room_of, half_codes[number][span], part)
            for number in halves
            for room_of, part in zip(moments[number], parts, strict=True)
        ]
        run_in_threads(lambda work: work(), [*works, partial(add_sums, sums, members[:, span], values)])

    perturbed = np.flatnonzero(groups["condition"] != CONTROL)

    def read_half(number: int, half: int) -> Moments:
        n = count_group_cells(half_codes[number], shape[0])
        total, squares = (np.asarray(array[half::2]) for array in moments[number])
        return Moments(n[half::2], total, squares).of(perturbed)

    def read_halves(number: int) -> tuple[Moments, Moments]:
        return read_half(number, 0), read_half(number, 1)

    of_any = next(iter(halves))
    sizes = count_group_cells(half_codes[of_any], shape[0]).reshape(-1, 2).sum(axis=1)
    mean = np.array(moments[of_any][0][0::2])
    mean += moments[of_any][0][1::2]
    mean /= sizes[:, None]
    control = np.setdiff1d(np.arange(len(groups)), perturbed)
    controls = {str(covariate): mean[row].copy() for row, covariate in groups["covariate"].iloc[control].items()}
    drawn = np.asarray(members.sum(axis=1)).ravel()
    with np.errstate(invalid="ignore"):
        sums /= drawn[:, None]
    return CellSums(
        keys,
        splits,
        genes,
        {number: partial(read_halves, number) for number in halves},
        mean[perturbed],
        sums[: len(keys)],
        controls,
        dict(zip(training, sums[len(keys) :], strict=True)),
    )


def _training_controls(obs: pd.DataFrame, keys: pd.DataFrame) -> dict[tuple[str, int], sparse.csr_matrix]:
    """Return (covariate, fold) -> mask (1 x cells) of its training control cells, where a combination is tested."""
    combined = keys[(keys["test_fold"] >= 0) & keys["condition"].map(lambda name: len(genes_of(name)) > 1)]
    is_control = (obs["condition"] == CONTROL).to_numpy()
    masks: dict[tuple[str, int], Bools] = {}
    for covariate, fold in sorted(set(zip(combined["covariate"], combined["test_fold"], strict=True))):
        in_training = (obs[f"fold_{fold}"] == "train").to_numpy() & (obs["covariate"] == covariate).to_numpy()
        masks[covariate, int(fold)] = is_control & in_training
    return {key: sparse.csr_matrix(mask[None, :], dtype=np.float64) for key, mask in masks.items()}
