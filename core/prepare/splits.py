"""Halves and folds (`docs/science.md`, section 1): who is truth and who duplicate, who trains and who is test.

Every draw has its own generator, keyed by step, covariate and condition, over names in sorted order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pandas as pd

from core.conditions import CONTROL, SEPARATOR
from core.errors import UserError
from core.rng import generator

VALIDATION_SHARE = 0.1375

Task = Literal["single", "combination"]


def iterate_groups(obs: pd.DataFrame) -> Iterator[tuple[str, str, pd.Index]]:
    """Return (covariate, condition, cell names in sorted order) of each group, in sorted order.

    Parameters
    ----------
    obs : pd.DataFrame
        The table of cells, with `covariate` and `condition`.

    Yields
    ------
    Iterator[tuple[str, str, pd.Index]]
    """
    groups = obs.groupby([obs["covariate"].astype(str), obs["condition"].astype(str)], observed=True, sort=True).groups
    for (covariate, condition), names in groups.items():
        yield covariate, condition, pd.Index(sorted(names.astype(str)))


def draw_halves(obs: pd.DataFrame, seed: int) -> pd.Series:
    """Return `first_half` or `second_half` for each cell: of a seeded permutation the first floor(n/2) are first.

    Parameters
    ----------
    obs : pd.DataFrame
        Cells with `covariate` and `condition`; control is halved too. Index and order as in obs.
    seed : int
        Seed of the draws.

    Returns
    -------
    pd.Series
    """
    half = pd.Series("second_half", index=obs.index, dtype=object, name="half")
    for covariate, condition, names in iterate_groups(obs):
        order = generator(seed, "half", covariate, condition).permutation(len(names))
        half.loc[names[order[: len(names) // 2]]] = "first_half"
    return half


def draw_folds(obs: pd.DataFrame, task: Task, folds: int | Literal["leave-one-out"], seed: int) -> pd.DataFrame:
    """Return one column `fold_k` per fold, `train`, `val` or `test` for each cell.

    A condition has the same split in all covariates; control cells are split one by one within their covariate.

    Parameters
    ----------
    obs : pd.DataFrame
        The table of cells, with `covariate` and `condition`.
    task : Task
        `single` or `combination`.
    folds : int | Literal['leave-one-out']
        Number of folds.
    seed : int
        Seed of the draws.

    Returns
    -------
    pd.DataFrame

    Raises
    ------
    UserError
        Where the data cannot be split as asked.
    """
    conditions = sorted(set(obs["condition"].astype(str)) - {CONTROL})
    plan_folds = _single_plans if task == "single" else _combination_plans
    plans = plan_folds(conditions, folds, seed)
    columns: dict[str, pd.Series] = {}
    of_cell = obs["condition"].astype(str)
    controls = [(covariate, names) for covariate, condition, names in iterate_groups(obs) if condition == CONTROL]
    for fold, plan in enumerate(plans):
        split = of_cell.map(plan)
        for covariate, names in controls:
            order = generator(seed, "control_folds", covariate, CONTROL).permutation(len(names))
            split.loc[names[order]] = _control_plan(len(names), fold, len(plans), task)
        columns[f"fold_{fold}"] = split
    return pd.DataFrame(columns, index=obs.index)


def list_fold_columns(obs: pd.DataFrame) -> list[str]:
    """Return the names of the fold columns, in the order of the folds.

    Parameters
    ----------
    obs : pd.DataFrame
        The table of cells, with `covariate` and `condition`.

    Returns
    -------
    list[str]
    """
    return sorted((c for c in obs.columns if c.startswith("fold_")), key=lambda c: int(c.removeprefix("fold_")))


def _single_plans(conditions: list[str], folds: int | Literal["leave-one-out"], seed: int) -> list[dict[str, str]]:
    combined = [c for c in conditions if SEPARATOR in c]
    if combined:
        found = f"single, but {len(combined)} conditions are combinations (first: {combined[0]})"
        raise UserError("catalog entry", "task", found, "set `task: combination`")
    n_folds = len(conditions) if folds == "leave-one-out" else folds
    if not 2 <= n_folds <= len(conditions):
        found = f"{n_folds} folds for {len(conditions)} conditions"
        raise UserError("catalog entry", "folds", found, "choose between 2 and the number of conditions")
    order = [conditions[i] for i in generator(seed, "folds").permutation(len(conditions))]
    plans = []
    for block in np.array_split(np.arange(len(order)), n_folds):
        test = {order[i] for i in block}
        rest = [c for c in order if c not in test]
        n_val = int(VALIDATION_SHARE * len(rest))
        plan = dict.fromkeys(test, "test") | dict.fromkeys(rest[:n_val], "val") | dict.fromkeys(rest[n_val:], "train")
        plans.append(plan)
    return plans


def _combination_plans(conditions: list[str], folds: int | Literal["leave-one-out"], seed: int) -> list[dict[str, str]]:
    if folds != 2:
        raise UserError(
            "catalog entry", "folds", f"{folds} folds for combination data", "combination data have 2 folds"
        )
    singles = [c for c in conditions if SEPARATOR not in c]
    combinations = [c for c in conditions if SEPARATOR in c]
    if len(combinations) < 2:
        found = f"combination, but the data hold {len(combinations)} combinations"
        raise UserError("catalog entry", "task", found, "set `task: single`, or check `labels.separator`")
    order = [combinations[i] for i in generator(seed, "folds").permutation(len(combinations))]
    halves = [order[: len(order) // 2], order[len(order) // 2 :]]
    plans = []
    for fold in (0, 1):
        test, rest = halves[fold], halves[1 - fold]
        n_val = len(rest) // 2
        plan = dict.fromkeys(singles, "train") | dict.fromkeys(test, "test")
        plans.append(plan | dict.fromkeys(rest[:n_val], "val") | dict.fromkeys(rest[n_val:], "train"))
    return plans


def _control_plan(n: int, fold: int, n_folds: int, task: Task) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    """Return the split of the n control cells in their permuted order.

    Single-gene data: block `fold` of `n_folds` is test, of the rest the first 13.75 % are val. Combination data: a
    quarter is test (another one in each fold), the next quarter in the cycle is val, one half is train.
    """
    split = np.full(n, "train", dtype=object)
    if task == "single":
        test = np.array_split(np.arange(n), n_folds)[fold]
        rest = np.setdiff1d(np.arange(n), test)
        split[test] = "test"
        split[rest[: int(VALIDATION_SHARE * len(rest))]] = "val"
        return split
    quarter = n // 4
    split[fold * quarter : (fold + 1) * quarter] = "test"
    split[(fold + 1) * quarter : (fold + 2) * quarter] = "val"
    return split
