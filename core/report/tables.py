"""The tables that people read, in the terminal and in the report, from those that a benchmark writes.

Pure functions; `docs/outputs.md` describes the columns of the tables that come in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from core.conditions import CONTROL, KEYS
from core.reference.controls import RANKED
from core.scoring.calibration import FEWEST_CONDITIONS, VARIANTS
from core.scoring.comparison import ALPHA, STRATA

VARIANT_NAMES = [variant.name for variant in VARIANTS]
STRATUM_NAMES = [name for name, _, _ in STRATA if name != "all"]


def list_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """List the rows of a table as dictionaries by column.

    Parameters
    ----------
    table
        Any table.

    Returns
    -------
    list of dict
        One for each row, in their order.
    """
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def find_stratum(n_degs: float) -> str:
    """Find the stratum of effect size that a number of DEGs belongs to (docs/science.md, section 6).

    Parameters
    ----------
    n_degs
        NaN, where differential expression was not tested, counts as 0.

    Returns
    -------
    str
        `0`, `1-9`, `10-99` or `>=100`.
    """
    return next((name for name, low, high in STRATA if name != "all" and low <= n_degs <= high), STRATUM_NAMES[0])


# Calibration


def tabulate_verdicts(calibration: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the quoted variant of the dynamic range (`drf_interpolated`), which carries the verdict.

    Parameters
    ----------
    calibration
        Of all metrics and variants.

    Returns
    -------
    DataFrame
        One row per metric in the order of the calibration; a missing verdict is "none".
    """
    table = calibration[calibration["variant"] == VARIANT_NAMES[0]].drop(columns="variant")
    return table.assign(verdict=table["verdict"].fillna("none")).reset_index(drop=True)


def tabulate_variants(calibration: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the mean Dynamic Range Fraction in all its variants.

    Parameters
    ----------
    calibration
        Of all metrics and variants.

    Returns
    -------
    DataFrame
        One row per metric with the columns `<variant>`, `<variant>_low` and `<variant>_high`.
    """
    wide = calibration.pivot(index="metric", columns="variant", values=["drf", "drf_low", "drf_high"])
    wide = wide.reindex(columns=pd.MultiIndex.from_product([["drf", "drf_low", "drf_high"], VARIANT_NAMES]))
    wide.columns = [variant + value.removeprefix("drf") for value, variant in wide.columns]
    return wide.reindex(calibration["metric"].unique()).astype(float)


# Leaderboard


def list_ranked_metrics(leaderboard: pd.DataFrame) -> list[str]:
    """List the metrics by which models are ranked.

    Parameters
    ----------
    leaderboard
        Of all metrics.

    Returns
    -------
    list of str
        The calibrated ones, in the table's order.
    """
    return list(leaderboard.loc[leaderboard["calibrated"].astype(bool), "metric"].unique())


def order_metrics(leaderboard: pd.DataFrame) -> list[str]:
    """Order all metrics as they are shown: calibrated ones first.

    Parameters
    ----------
    leaderboard
        Of all metrics.

    Returns
    -------
    list of str
        Otherwise in the table's order.
    """
    first = list_ranked_metrics(leaderboard)
    return first + [metric for metric in leaderboard["metric"].unique() if metric not in first]


def list_entries(leaderboard: pd.DataFrame) -> pd.DataFrame:
    """List models and controls in the order in which they are shown.

    Models and baselines by mean rank over the calibrated metrics, then by name; then positive, then negative controls;
    models and baselines below the coverage limit last.

    Parameters
    ----------
    leaderboard
        Of all metrics.

    Returns
    -------
    DataFrame
        One row for each: model, kind, coverage, in_panel, mean_rank (NaN for those that have no rank).
    """
    groups = leaderboard.groupby("model", sort=False)
    table = pd.DataFrame(
        {
            "kind": groups["kind"].first(),
            "coverage": groups["coverage"].max(),
            "in_panel": groups["in_panel"].any(),
            "mean_rank": groups["rank"].mean(),
        }
    ).reset_index()
    predictor = table["kind"].isin(RANKED)
    below = predictor & ~table["in_panel"].astype(bool)
    group = np.select([below, predictor, table["kind"] == "positive control"], [3, 0, 1], 2)
    table = table.assign(group=group).sort_values(["group", "mean_rank", "model"], na_position="last", kind="stable")
    return table.drop(columns="group").reset_index(drop=True)


def list_panel_models(leaderboard: pd.DataFrame) -> list[str]:
    """List models and baselines of sufficient coverage.

    Parameters
    ----------
    leaderboard
        Of all metrics.

    Returns
    -------
    list of str
        Best mean rank first.
    """
    table = list_entries(leaderboard)
    return list(table.loc[table["kind"].isin(RANKED) & table["in_panel"].astype(bool), "model"])


def pivot_metrics(leaderboard: pd.DataFrame, value: str) -> pd.DataFrame:
    """Spread one column of the leaderboard over the metrics.

    Parameters
    ----------
    leaderboard
        Of all metrics.
    value
        The column: `mean`, `rank`, `headroom`, ...

    Returns
    -------
    DataFrame
        Models and controls x metrics, both in the order in which they are shown.
    """
    table = leaderboard.pivot(index="model", columns="metric", values=value)
    return table.reindex(index=list_entries(leaderboard)["model"], columns=order_metrics(leaderboard)).astype(float)


# Comparison


def tabulate_outcomes(comparison: pd.DataFrame, calibration: pd.DataFrame, control: str | None = None) -> pd.DataFrame:
    """Tabulate which models beat a control by which calibrated metrics.

    Parameters
    ----------
    comparison
        Of models with controls.
    calibration
        Of all metrics.
    control
        Its name; None: each metric's own negative control.

    Returns
    -------
    DataFrame
        Models x calibrated metrics. "better" and "worse" where the whole 95 % interval of the mean difference over all
        conditions lies above or below zero; "better, Holm" where moreover the one-sided paired t-test has p < 0.05
        after Holm's correction; else "undecided"; "" where the two share fewer than 10 conditions.
    """
    table = tabulate_verdicts(calibration)
    negative = table.loc[table["verdict"] == "calibrated"].set_index("metric")["negative"]
    rows = comparison[(comparison["stratum"] == "all") & comparison["metric"].isin(negative.index)]
    rows = rows[rows["n"] >= FEWEST_CONDITIONS]
    rows = rows[rows["control"] == (rows["metric"].map(negative) if control is None else control)]
    better = rows["low"] > 0
    choices = [better & (rows["t_holm"] < ALPHA), better, rows["high"] < 0]
    outcome = np.select(choices, ["better, Holm", "better", "worse"], "undecided")
    table = rows.assign(outcome=outcome).pivot(index="model", columns="metric", values="outcome")
    return table.reindex(index=rows["model"].unique(), columns=negative.index).fillna("")


def pivot_strata(comparison: pd.DataFrame) -> pd.DataFrame:
    """Put the strata of effect size beside the comparison over all conditions.

    Parameters
    ----------
    comparison
        Of models with controls, in all strata.

    Returns
    -------
    DataFrame
        One row per (model, control, metric) in the comparison's order. The columns of the stratum "all" keep their
        names; for each other stratum there are `difference_<stratum>`, `n_<stratum>` and `low_<stratum>`, NaN where it
        has no condition.
    """
    key = ["model", "control", "metric"]
    whole = comparison[comparison["stratum"] == "all"].drop(columns="stratum")
    for name in STRATUM_NAMES:
        part = comparison[comparison["stratum"] == name]
        columns = {"mean_difference": f"difference_{name}", "n": f"n_{name}", "low": f"low_{name}"}
        whole = whole.merge(part[[*key, *columns]].rename(columns=columns), on=key, how="left")
    return whole


# Conditions


def drop_control(quality: pd.DataFrame) -> pd.DataFrame:
    """Leave the unperturbed cells out of a table.

    Parameters
    ----------
    quality
        One row per (covariate, condition).

    Returns
    -------
    DataFrame
        The rows of perturbed conditions.
    """
    return quality[quality["condition"] != CONTROL]


def summarise_quality(quality: pd.DataFrame) -> pd.DataFrame:
    """Summarise the quality of a data set, control left out.

    Parameters
    ----------
    quality
        One row per (covariate, condition).

    Returns
    -------
    DataFrame
        One row per covariate: conditions, cells, mean and coefficient of variation (CV) of cells and of DEGs,
        without_degs (share of conditions with 0 DEGs), median_edistance. CV is the sample standard deviation (n - 1)
        over the mean; NaN for fewer than two conditions or a mean of 0.
    """
    rows = []
    for covariate, rest in drop_control(quality).groupby("covariate", sort=False):
        rows.append(
            {
                "covariate": covariate,
                "conditions": len(rest),
                "cells": rest["n_cells"].sum(),
                "mean_cells": rest["n_cells"].mean(),
                "cv_cells": _cv(rest["n_cells"]),
                "mean_degs": rest["n_degs"].mean(),
                "cv_degs": _cv(rest["n_degs"]),
                "without_degs": (rest["n_degs"] == 0).mean(),
                "median_edistance": rest["edistance_to_control"].median(),
            }
        )
    return pd.DataFrame(rows)


def _cv(values: pd.Series[float]) -> float:
    mean = values.mean()
    return float(values.std() / mean) if mean > 0 else float("nan")


def compute_wmse_ratios(scores: pd.DataFrame, leaderboard: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """Divide the wMSE of each model by the dataset mean's, per condition.

    Parameters
    ----------
    scores
        Of models and controls; those of the quoted half split (the lowest half_seed) are taken, as in the leaderboard.
    leaderboard
        Its models and baselines of sufficient coverage are shown, in its order.
    quality
        One row per (covariate, condition), with n_degs.

    Returns
    -------
    DataFrame
        model, covariate, condition, n_degs, stratum, ratio. Conditions where either wMSE is NaN (no DEG weights) or 0
        are left out.
    """
    table = scores[(scores["metric"] == "wmse") & (scores["half_seed"] == scores["half_seed"].min())]
    mean = table[table["model"] == "dataset_mean"]
    table = table.merge(mean[[*KEYS, "value"]], on=KEYS, suffixes=("", "_mean"))
    table = table[(table["value"] > 0) & (table["value_mean"] > 0)]
    table = table.merge(quality[[*KEYS, "n_degs"]], on=KEYS, how="left")
    table = table.assign(ratio=table["value"] / table["value_mean"], stratum=table["n_degs"].map(find_stratum))
    place = {name: i for i, name in enumerate(list_panel_models(leaderboard))}
    table = table[table["model"].isin(place)].assign(place=lambda rows: rows["model"].map(place))
    table = table.sort_values(["place", *KEYS], kind="stable")
    return table[["model", *KEYS, "n_degs", "stratum", "ratio"]].reset_index(drop=True)


def find_extremes(ratios: pd.DataFrame, most: int = 5) -> pd.DataFrame:
    """Find the conditions where each model gains and loses most against the dataset mean.

    Parameters
    ----------
    ratios
        As `compute_wmse_ratios` gives them.
    most
        How many of each.

    Returns
    -------
    DataFrame
        model, won, lost. won holds a table of conditions with a ratio below 1, smallest first; lost of those above 1,
        largest first.
    """
    rows = []
    for model, part in ratios.groupby("model", sort=False):
        part = part.sort_values(["ratio", "covariate", "condition"])
        rows.append(
            {
                "model": model,
                "won": part[part["ratio"] < 1].head(most),
                "lost": part[part["ratio"] > 1].tail(most)[::-1],
            }
        )
    return pd.DataFrame(rows, columns=["model", "won", "lost"])


def group_reasons(unpredicted: pd.DataFrame) -> pd.DataFrame:
    """Group what models could not predict by the reason.

    Parameters
    ----------
    unpredicted
        model, covariate, condition, reason.

    Returns
    -------
    DataFrame
        One row per (model, covariate, reason) with n and the sorted conditions.
    """
    groups = unpredicted.groupby(["model", "covariate", "reason"], sort=True, observed=True)["condition"]
    return groups.agg(n="size", conditions=lambda names: sorted(names)).reset_index()
