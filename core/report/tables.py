"""The tables that people read, in the terminal and in the report, from the tables that the stages write.

Pure functions; the columns of the tables that come in are those of docs/science.md sections 5 and 6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from core.conditions import CONTROL
from core.scoring.calibration import FEWEST_CONDITIONS, VARIANTS
from core.scoring.comparison import ALPHA, STRATA
from core.scoring.leaderboard import RANKED

VARIANT_NAMES = [variant.name for variant in VARIANTS]
STRATUM_NAMES = [name for name, _, _ in STRATA if name != "all"]
DASH = "–"


# Words and numbers


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as dictionaries by column."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def number(value: float, decimals: int) -> str:
    """A fixed-point number with a true minus sign; an en dash for NaN; whole thousands without decimals."""
    if np.isnan(value):
        return DASH
    text = f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.{decimals}f}"
    return "0" + text[2:] if text.startswith("-0") and float(text) == 0 else text.replace("-", "−")


def decimals(values: pd.Series[float]) -> int:
    """Decimals that give the largest of these values three significant digits, between 2 and 7."""
    largest = values.abs().replace(np.inf, np.nan).max()
    if np.isnan(largest) or largest == 0:
        return 2
    return int(np.clip(2 - np.floor(np.log10(largest)), 2, 7))


def share(value: float) -> str:
    """A share as per cent, never rounded to 0 % or 100 % unless it is that; an en dash for NaN."""
    if np.isnan(value):
        return DASH
    if 0 < value < 0.01:
        return "< 1 %"
    if 0.99 < value < 1:
        return "> 99 %"
    return f"{100 * value:.0f} %"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def counted(n: int, noun: str) -> str:
    """`1 metric`, `2 metrics`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def worded(control: str) -> str:
    """The name of a control as words: `dataset_mean` is the dataset mean."""
    return control.replace("_", " ")


def stratum(n_degs: float) -> str:
    """The stratum of effect size for a number of DEGs (docs/science.md section 6); NaN, not tested, counts as 0."""
    return next((name for name, low, high in STRATA if name != "all" and low <= n_degs <= high), STRATUM_NAMES[0])


# Calibration


def verdicts(calibration: pd.DataFrame) -> pd.DataFrame:
    """The quoted variant (`drf_interpolated`), one row per metric, in the calibration table's order of metrics."""
    table = calibration[calibration["variant"] == VARIANT_NAMES[0]].drop(columns="variant")
    return table.assign(verdict=table["verdict"].fillna("none")).reset_index(drop=True)


def variants(calibration: pd.DataFrame) -> pd.DataFrame:
    """Mean DRF of the three variants: one row per metric, columns `<variant>`, `<variant>_low`, `<variant>_high`."""
    wide = calibration.pivot(index="metric", columns="variant", values=["drf", "drf_low", "drf_high"])
    wide = wide.reindex(columns=pd.MultiIndex.from_product([["drf", "drf_low", "drf_high"], VARIANT_NAMES]))
    wide.columns = [variant + value.removeprefix("drf") for value, variant in wide.columns]
    return wide.reindex(calibration["metric"].unique()).astype(float)


# Leaderboard


def ranked_metrics(leaderboard: pd.DataFrame) -> list[str]:
    """Metrics by which models are ranked, in the table's order."""
    return list(leaderboard.loc[leaderboard["calibrated"].astype(bool), "metric"].unique())


def ordered_metrics(leaderboard: pd.DataFrame) -> list[str]:
    """All metrics, calibrated ones first, otherwise in the table's order."""
    first = ranked_metrics(leaderboard)
    return first + [metric for metric in leaderboard["metric"].unique() if metric not in first]


def entries(leaderboard: pd.DataFrame) -> pd.DataFrame:
    """One row per model or control in the order of display: model, kind, coverage, in_panel, mean_rank.

    Models and baselines by mean rank over the calibrated metrics, then by name; then positive, then negative
    controls; predictors below the coverage limit last. mean_rank is NaN for those that have no rank.
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


def panel_models(leaderboard: pd.DataFrame) -> list[str]:
    """Models and baselines of sufficient coverage, best mean rank first."""
    table = entries(leaderboard)
    return list(table.loc[table["kind"].isin(RANKED) & table["in_panel"].astype(bool), "model"])


def wide(leaderboard: pd.DataFrame, value: str) -> pd.DataFrame:
    """One column of the leaderboard (`mean`, `rank`, `headroom`, ...): entries x metrics, in the order of display."""
    table = leaderboard.pivot(index="model", columns="metric", values=value)
    return table.reindex(index=entries(leaderboard)["model"], columns=ordered_metrics(leaderboard)).astype(float)


# Comparison


def outcomes(comparison: pd.DataFrame, calibration: pd.DataFrame, control: str | None = None) -> pd.DataFrame:
    """Who beats a control: models x calibrated metrics, in the order of the tables.

    control: a name; None for each metric's own negative control. Values: "better" and "worse" where the 95 % interval
    of the mean difference over all conditions is clear of zero, "better, Holm" where moreover the one-sided paired
    t-test has p < 0.05 after Holm's correction, else "undecided"; "" where the two share fewer than 10 conditions.
    """
    table = verdicts(calibration)
    negative = table.loc[table["verdict"] == "calibrated"].set_index("metric")["negative"]
    rows = comparison[(comparison["stratum"] == "all") & comparison["metric"].isin(negative.index)]
    rows = rows[rows["n"] >= FEWEST_CONDITIONS]
    rows = rows[rows["control"] == (rows["metric"].map(negative) if control is None else control)]
    better = rows["low"] > 0
    choices = [better & (rows["t_holm"] < ALPHA), better, rows["high"] < 0]
    outcome = np.select(choices, ["better, Holm", "better", "worse"], "undecided")
    wide = rows.assign(outcome=outcome).pivot(index="model", columns="metric", values="outcome")
    return wide.reindex(index=rows["model"].unique(), columns=negative.index).fillna("")


def headline(name: str, calibration: pd.DataFrame, leaderboard: pd.DataFrame, comparison: pd.DataFrame) -> list[str]:
    """The result for a data set in a few sentences: which metrics are calibrated, and which models beat the controls.

    A model beats a control on a metric where the 95 % interval of the mean difference lies above zero (`outcomes`).
    """
    sentences = [_metrics_sentence(name, calibration)]
    kinds = leaderboard.drop_duplicates("model").set_index("model")["kind"]
    if not (kinds == "model").any():
        return [*sentences, "No model was scored: this is a calibration of the metrics alone."]
    if not ranked_metrics(leaderboard):
        return [
            *sentences,
            "Without a calibrated metric no model is ranked, and none can be said to beat the controls.",
        ]
    own = outcomes(comparison, calibration)
    negatives = verdicts(calibration).set_index("metric")["negative"].loc[own.columns].unique()
    names = " or ".join(f"the {worded(control)}" for control in negatives)
    opponent = names if len(negatives) == 1 else f"the negative control of a metric ({names})"
    sentences += _winners_sentences(own, f"{opponent}, with the 95 % interval of the difference clear of zero,")
    losers = own.eq("worse").sum(axis=1)
    if losers.any():
        sentences.append(f"Worse than it, with the interval clear of zero: {_counts(losers, own.shape[1])}.")
    for baseline in kinds.index[kinds == "baseline"]:
        sentences += _winners_sentences(outcomes(comparison, calibration, baseline), f"the {worded(baseline)} baseline")
    return sentences + _first_sentence(leaderboard)


def _metrics_sentence(name: str, calibration: pd.DataFrame) -> str:
    table = verdicts(calibration)
    groups = {str(verdict): list(part["metric"]) for verdict, part in table.groupby("verdict")}
    total, good = counted(len(table), "metric"), groups.pop("calibrated", [])
    if not groups:
        return f"{'The one metric is' if len(good) == 1 else f'All {total} are'} calibrated on {name}: {listed(good)}."
    words = {
        "inconclusive": "inconclusive",
        "miscalibrated": "miscalibrated",
        "none": f"without a verdict for want of {FEWEST_CONDITIONS} usable conditions",
    }
    others = listed(
        [f"{len(groups[key])} {word} ({', '.join(groups[key])})" for key, word in words.items() if key in groups]
    )
    if not good:
        return f"None of the {total} is calibrated on {name}: {others}."
    verb = "is" if len(good) == 1 else "are"
    return f"{len(good)} of {total} {verb} calibrated on {name}: {listed(good)}. The others: {others}."


def _winners_sentences(table: pd.DataFrame, opponent: str) -> list[str]:
    """One sentence on the models (rows of `outcomes`) that beat an opponent; none where nothing was compared."""
    if table.empty:
        return []
    wins = table.isin(["better", "better, Holm"]).sum(axis=1)
    if not wins.any():
        return [f"No model beats {opponent} on any calibrated metric."]
    n = int((wins > 0).sum())
    which = ("Both" if n == 2 else f"All {n}") if n == len(table) else f"{n} of {len(table)}"
    subject = "The model beats" if len(table) == 1 else f"{which} models {'beats' if n == 1 else 'beat'}"
    return [f"{subject} {opponent} on at least one calibrated metric: {_counts(wins, table.shape[1])}."]


def _counts(counts: pd.Series[int], of: int) -> str:
    """`a on all 3 metrics, b on 2 and c on 1`, most first; models with 0 are left out."""
    ordered = counts[counts > 0].sort_values(ascending=False, kind="stable")
    texts = [f"{model} on {f'all {of}' if n == of and of > 1 else n}" for model, n in ordered.items()]
    return listed([f"{texts[0]}{f' of {of}' if ordered.iloc[0] < of else ''}", *texts[1:]])


def _first_sentence(leaderboard: pd.DataFrame) -> list[str]:
    first = leaderboard[leaderboard["rank"] == 1]
    if first.empty:
        return []
    metrics = (
        first.groupby("model", sort=False)["metric"]
        .agg(list)
        .sort_values(key=lambda lists: -lists.map(len), kind="stable")
    )
    total = len(ranked_metrics(leaderboard))
    texts = [
        f"{model} by {f'all {total} calibrated metrics' if len(names) == total > 1 else listed(names)}"
        for model, names in metrics.items()
    ]
    return [f"Ranked first: {'; '.join(texts)}."]


def strata_columns(comparison: pd.DataFrame) -> pd.DataFrame:
    """One row per (model, control, metric), the strata beside the whole.

    Columns of the stratum "all" under their own names; for each stratum `difference_<stratum>`, `n_<stratum>` and
    `low_<stratum>`, NaN where it has no condition. Rows keep the comparison's order.
    """
    key = ["model", "control", "metric"]
    whole = comparison[comparison["stratum"] == "all"].drop(columns="stratum")
    for name in STRATUM_NAMES:
        part = comparison[comparison["stratum"] == name]
        columns = {"mean_difference": f"difference_{name}", "n": f"n_{name}", "low": f"low_{name}"}
        whole = whole.merge(part[[*key, *columns]].rename(columns=columns), on=key, how="left")
    return whole


# Conditions


def perturbed(quality: pd.DataFrame) -> pd.DataFrame:
    """Quality table without the unperturbed cells."""
    return quality[quality["condition"] != CONTROL]


def quality_summary(quality: pd.DataFrame) -> pd.DataFrame:
    """One row per covariate, control left out: conditions, cells, mean and CV of cells and of DEGs, median E-distance.

    CV is the sample standard deviation (n-1) over the mean; NaN for fewer than two conditions or a mean of 0.
    without_degs: share of conditions with 0 DEGs.
    """
    rows = []
    for covariate, rest in perturbed(quality).groupby("covariate", sort=False):
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


def wmse_ratios(scores: pd.DataFrame, leaderboard: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """wMSE of a model over the dataset mean's, per condition: model, covariate, condition, n_degs, stratum, ratio.

    Scores are those of the quoted half split (the lowest half_seed), as in the leaderboard. Models and baselines of
    its panel in its order; conditions where either wMSE is NaN (no DEG weights) or 0 are left out.
    """
    key = ["covariate", "condition"]
    table = scores[(scores["metric"] == "wmse") & (scores["half_seed"] == scores["half_seed"].min())]
    mean = table[table["model"] == "dataset_mean"]
    table = table.merge(mean[[*key, "value"]], on=key, suffixes=("", "_mean"))
    table = table[(table["value"] > 0) & (table["value_mean"] > 0)]
    table = table.merge(quality[[*key, "n_degs"]], on=key, how="left")
    table = table.assign(ratio=table["value"] / table["value_mean"], stratum=table["n_degs"].map(stratum))
    place = {name: i for i, name in enumerate(panel_models(leaderboard))}
    table = table[table["model"].isin(place)].assign(place=lambda rows: rows["model"].map(place))
    table = table.sort_values(["place", *key], kind="stable")
    return table[["model", *key, "n_degs", "stratum", "ratio"]].reset_index(drop=True)


def extremes(ratios: pd.DataFrame, most: int = 5) -> pd.DataFrame:
    """Per model the conditions with the smallest and the largest ratio: model, won, lost (tables of conditions).

    won holds rows with a ratio below 1, smallest first; lost those above 1, largest first; `most` of each.
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


def reasons(unpredicted: pd.DataFrame) -> pd.DataFrame:
    """What models could not predict: one row per (model, covariate, reason) with n and the sorted conditions."""
    groups = unpredicted.groupby(["model", "covariate", "reason"], sort=True, observed=True)["condition"]
    return groups.agg(n="size", conditions=lambda names: sorted(names)).reset_index()
