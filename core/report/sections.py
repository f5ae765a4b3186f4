"""What each section of the report shows: tables turned into rows of texts, which page.html sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from core.conditions import KEYS
from core.reference.controls import RANKED
from core.report import tables
from core.report.text import (
    DASH,
    choose_decimals,
    format_count,
    format_interval,
    format_number,
    format_p,
    format_share,
)
from core.scoring.leaderboard import COVERAGE
from core.scoring.metrics import BY_NAME


class Cell(NamedTuple):
    """One number of a table: its text, its rank, a smaller line beneath, and whether to set it bold."""

    text: str
    rank: str = ""
    note: str = ""
    bold: bool = False


def list_facts(quality: pd.DataFrame, leaderboard: pd.DataFrame, scores: pd.DataFrame) -> list[str]:
    """List the size of the benchmark in a few words.

    Parameters
    ----------
    quality
        One row per (covariate, condition).
    leaderboard
        Of models and controls.
    scores
        One row per model, condition, half split and metric.

    Returns
    -------
    list of str
        Conditions, covariates where there are several, models.
    """
    kinds = tables.list_entries(leaderboard)["kind"]
    conditions, covariates = len(tables.drop_control(quality)), quality["covariate"].nunique()
    facts = [format_count(conditions, "condition")]
    tested = len(scores[KEYS].drop_duplicates())
    if tested < conditions:
        facts.append(f"{tested:,} of them tested")
    if covariates > 1:
        facts.append(format_count(covariates, "covariate"))
    models = int((kinds == "model").sum())
    facts.append(format_count(models, "model") if models else "controls alone")
    return facts


def show_leaderboard(leaderboard: pd.DataFrame) -> dict[str, Any]:
    """Show the leaderboard: means and ranks by metric.

    Parameters
    ----------
    leaderboard
        Of models and controls.

    Returns
    -------
    dict
        Heads of the columns, groups of rows of cells, how many metrics are calibrated, and whether anything is ranked.
    """
    metrics = tables.order_metrics(leaderboard)
    calibrated = tables.list_ranked_metrics(leaderboard)
    n = leaderboard.groupby("metric")["n_conditions"].max().to_dict()
    # Conditions that no model has a value for, without DEGs for example, are counted once, in the head.
    lacking = leaderboard.groupby("metric")["nan_share"].min().to_dict()
    decimals = {str(name): _choose_decimals(str(name), part["mean"]) for name, part in leaderboard.groupby("metric")}

    def show(entry: Mapping[str, Any]) -> Cell:
        rank, lost = entry["rank"], entry["nan_share"]
        return Cell(
            format_number(entry["mean"], decimals[entry["metric"]]),
            "" if np.isnan(rank) else f"{rank:.0f}",
            f"{format_share(lost)} NaN" if lacking[entry["metric"]] < lost < 1 else "",
            bool(rank == 1),
        )

    heads = [
        {
            "metric": metric,
            "calibrated": metric in calibrated,
            "arrow": "↑" if BY_NAME[metric].higher_is_better else "↓",
            "n": f"{n[metric]:,.0f}",
            "nan": f"{format_share(lacking[metric])} NaN" if lacking[metric] > 0 else "",
        }
        for metric in metrics
    ]
    return {
        "heads": heads,
        "n_calibrated": len(calibrated),
        "ranked": bool(leaderboard["rank"].notna().any()),
        "groups": _group_rows(leaderboard, metrics, show),
    }


def show_headroom(leaderboard: pd.DataFrame) -> dict[str, Any]:
    """Show the headroom of models and baselines with intervals on the calibrated metrics.

    Parameters
    ----------
    leaderboard
        Of models and controls.

    Returns
    -------
    dict
        The metrics, and groups of rows of cells in the leaderboard's order.
    """
    metrics = tables.list_ranked_metrics(leaderboard)
    predictors = leaderboard[leaderboard["kind"].isin(RANKED)]
    return {"metrics": metrics, "groups": _group_rows(predictors, metrics, lambda entry: _show_mean(entry, "headroom"))}


def _choose_decimals(metric: str, values: pd.Series[float]) -> int:
    """Decimals of a column: an error, which may span decades, needs as many as its smallest value."""
    return choose_decimals(values if BY_NAME[metric].higher_is_better else values.nsmallest(1))


def _group_rows(
    leaderboard: pd.DataFrame, metrics: list[str], show: Callable[[Mapping[str, Any]], Cell]
) -> list[dict[str, Any]]:
    """Rows of the leaderboard under headings: predictors, controls, and predictors of too little coverage."""
    below = f"Coverage below {format_share(COVERAGE)}: on their own conditions, not ranked"
    known = {(entry["model"], entry["metric"]): entry for entry in tables.list_records(leaderboard)}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in tables.list_records(tables.list_entries(leaderboard)):
        control = f"{row['kind'].capitalize()}s"
        heading = control if row["kind"] not in RANKED else "Models and baselines" if row["in_panel"] else below
        cells = [show(known[row["model"], metric]) for metric in metrics]
        groups.setdefault(heading, []).append(row | {"cells": cells})
    return [{"heading": heading, "rows": rows} for heading, rows in groups.items()]


def _show_mean(entry: Mapping[str, Any], value: str) -> Cell:
    """Show a number of order 1, its standard deviation over half splits where known, and its 95 % interval beneath.

    entry holds `value`, `<value>_low`, `<value>_high` and perhaps `<value>_half_sd`.
    """
    mean, sd = entry[value], entry.get(f"{value}_half_sd", np.nan)
    if np.isnan(mean):
        return Cell(DASH)
    spread = "" if np.isnan(sd) else f" ± {format_number(sd, 2)}"
    return Cell(format_number(mean, 2) + spread, note=format_interval(entry[f"{value}_low"], entry[f"{value}_high"], 2))


def show_calibration(calibration: pd.DataFrame) -> list[dict[str, Any]]:
    """Show the calibration: verdict, usable conditions, controls and their values, DRF in all variants, BDS.

    Parameters
    ----------
    calibration
        Of all metrics and variants.

    Returns
    -------
    list of dict
        One row per metric.
    """
    variants = tables.tabulate_variants(calibration)
    quoted, *others = tables.VARIANT_NAMES
    rows = []
    verdicts = tables.tabulate_verdicts(calibration)
    for entry in tables.list_records(verdicts.merge(variants, left_on="metric", right_index=True)):
        controls = [entry["positive_value"], entry["negative_value"]]
        decimals = _choose_decimals(entry["metric"], pd.Series(controls, dtype=float))
        rows.append(
            entry
            | {name: _show_mean(entry, name) for name in (*others, "bds")}
            | {quoted: _show_mean(entry, "drf")}
            | {name: format_number(entry[name], decimals) for name in ("positive_value", "negative_value")}
            | {"nan_share": format_share(entry["nan_share"])}
        )
    return rows


def show_extremes(ratios: pd.DataFrame) -> list[dict[str, Any]]:
    """Show the conditions with the largest gain and the largest loss of each model.

    Parameters
    ----------
    ratios
        As `core.report.tables.compute_wmse_ratios` gives them.

    Returns
    -------
    list of dict
        One row per model, with a text for each condition.
    """
    several = ratios["covariate"].nunique() > 1

    def describe(table: pd.DataFrame) -> list[str]:
        return [
            " in ".join([row["condition"], row["covariate"]][: 1 + several])
            + f" (×\u202f{format_number(row['ratio'], 2)}, {format_number(row['n_degs'], 0)} DEGs)"
            for row in tables.list_records(table)
        ]

    return [
        {"model": row["model"], "won": describe(row["won"]), "lost": describe(row["lost"])}
        for row in tables.list_records(tables.find_extremes(ratios))
    ]


def show_comparison(
    comparison: pd.DataFrame, calibration: pd.DataFrame, leaderboard: pd.DataFrame
) -> dict[str, list[dict[str, Any]]]:
    """Show the tests by model: first those that bear on the question, then the rest.

    The former are by calibrated metrics, against the metric's own negative control and against baselines.

    Parameters
    ----------
    comparison
        Of models with controls.
    calibration
        Of all metrics.
    leaderboard
        Of models and controls.

    Returns
    -------
    dict
        `main` and `rest`, each with the tests of every model.
    """
    table = tables.pivot_strata(comparison)
    quoted = tables.tabulate_verdicts(calibration).set_index("metric")
    calibrated = table["metric"].isin(quoted.index[quoted["verdict"] == "calibrated"])
    kinds = leaderboard.drop_duplicates("model").set_index("model")["kind"]
    own = table["control"] == table["metric"].map(quoted["negative"])
    baseline = table["control"].map(kinds) == "baseline"
    metric_place = {metric: i for i, metric in enumerate(tables.order_metrics(leaderboard))}
    model_place = {model: i for i, model in enumerate(tables.list_entries(leaderboard)["model"])}
    largest = table.assign(largest=table[["low", "high"]].abs().max(axis=1))
    decimals = {metric: choose_decimals(part["largest"]) for metric, part in largest.groupby("metric", sort=False)}
    table = table.assign(
        model_place=table["model"].map(model_place),
        metric_place=table["metric"].map(metric_place),
        # Each metric's own negative control first, in the order of the metrics; other controls by name.
        other=table["control"].mask(own, ""),
        main=calibrated & (own | baseline),
    ).sort_values(["model_place", "other", "metric_place"], kind="stable")

    def show(part: pd.DataFrame) -> list[dict[str, Any]]:
        shown: dict[str, list[dict[str, Any]]] = {}
        for entry in tables.list_records(part):
            shown.setdefault(entry["model"], []).append(_show_test(entry, decimals[entry["metric"]]))
        return [{"model": model, "rows": rows} for model, rows in shown.items()]

    return {"main": show(table[table["main"]]), "rest": show(table[~table["main"]])}


def _show_test(entry: Mapping[str, Any], decimals: int) -> dict[str, Any]:
    """One row of the comparison as texts."""
    low, high = entry["low"], entry["high"]
    difference = format_number(entry["mean_difference"], decimals)
    interval = "" if np.isnan(low) else format_interval(low, high, decimals)
    return {
        "metric": entry["metric"],
        "control": entry["control"],
        "n": f"{entry['n']:,.0f}",
        "difference": Cell(difference, note=interval, bold=low > 0),
        "t": format_p(entry["t_holm"]),
        "wilcoxon": format_p(entry["wilcoxon_holm"]),
        "detectable": format_number(entry["detectable_difference"], decimals),
        "strata": [
            Cell(
                format_number(entry[f"difference_{name}"], decimals),
                note=f"n = {entry[f'n_{name}']:,.0f}" if entry[f"n_{name}"] > 0 else "",
                bold=entry[f"low_{name}"] > 0,
            )
            for name in tables.STRATUM_NAMES
        ],
    }


def show_quality(quality: pd.DataFrame) -> list[dict[str, str]]:
    """Show the summary numbers of data set quality.

    Parameters
    ----------
    quality
        One row per (covariate, condition).

    Returns
    -------
    list of dict
        One row per covariate.
    """
    decimals = {"mean_cells": 1, "cv_cells": 2, "mean_degs": 1, "cv_degs": 2, "median_edistance": 2}
    return [
        {name: format_number(row[name], places) for name, places in decimals.items()}
        | {
            "covariate": str(row["covariate"]),
            "conditions": f"{row['conditions']:,}",
            "cells": f"{row['cells']:,.0f}",
            "without_degs": format_share(row["without_degs"]),
        }
        for row in tables.list_records(tables.summarise_quality(quality))
    ]
