"""The tables that people read, in the terminal and in the report, from the tables that the stages write.

Pure functions; the columns of the tables that come in are those of docs/science.md sections 5 and 6.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

THRESHOLD = 0.1  # of the verdict: docs/science.md section 5
COVERAGE = 0.8  # of the leaderboard: docs/science.md section 4
QUOTED = "drf_interpolated"
VARIANTS = ["drf_interpolated", "drf_mean", "drf_ctrl"]
VERDICTS = ["calibrated", "inconclusive", "miscalibrated", "none"]
STRATA = ["0", "1-9", "10-99", ">=100"]
PREDICTORS = ["model", "baseline"]
CONTROLS = ["positive control", "negative control"]
DASH = "–"


# Words and numbers


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
    """The stratum of effect size for a number of DEGs (docs/science.md section 6); NaN counts as 0 DEGs."""
    return ">=100" if n_degs >= 100 else "10-99" if n_degs >= 10 else "1-9" if n_degs >= 1 else "0"


# Calibration


def verdicts(calibration: pd.DataFrame) -> pd.DataFrame:
    """The quoted variant (`drf_interpolated`), one row per metric, in the calibration table's order of metrics."""
    table = calibration[calibration["variant"] == QUOTED].drop(columns="variant")
    return table.assign(verdict=table["verdict"].fillna("none")).reset_index(drop=True)


def variants(calibration: pd.DataFrame) -> pd.DataFrame:
    """Mean DRF of the three variants: one row per metric, columns `<variant>`, `<variant>_low`, `<variant>_high`."""
    wide = calibration.pivot(index="metric", columns="variant", values=["drf", "drf_low", "drf_high"])
    wide = wide.reindex(columns=pd.MultiIndex.from_product([["drf", "drf_low", "drf_high"], VARIANTS]))
    wide.columns = [variant + value.removeprefix("drf") for value, variant in wide.columns]
    return wide.reindex(calibration["metric"].unique()).astype(float)


# Leaderboard


def calibrated_metrics(leaderboard: pd.DataFrame) -> list[str]:
    """Metrics by which models are ranked, in the table's order."""
    return list(leaderboard.loc[leaderboard["calibrated"].astype(bool), "metric"].unique())


def ordered_metrics(leaderboard: pd.DataFrame) -> list[str]:
    """All metrics, calibrated ones first, otherwise in the table's order."""
    first = calibrated_metrics(leaderboard)
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
    predictor = table["kind"].isin(PREDICTORS)
    below = predictor & ~table["in_panel"].astype(bool)
    group = np.select([below, predictor, table["kind"] == CONTROLS[0]], [3, 0, 1], 2)
    table = table.assign(group=group).sort_values(
        ["group", "mean_rank", "model"], na_position="last", kind="stable"
    )
    return table.drop(columns="group").reset_index(drop=True)


def panel_models(leaderboard: pd.DataFrame) -> list[str]:
    """Models and baselines of sufficient coverage, best mean rank first."""
    table = entries(leaderboard)
    return list(table.loc[table["kind"].isin(PREDICTORS) & table["in_panel"].astype(bool), "model"])


def wide(leaderboard: pd.DataFrame, value: str) -> pd.DataFrame:
    """One column of the leaderboard (`mean`, `rank`, `headroom`, ...): entries x metrics, in the order of display."""
    table = leaderboard.pivot(index="model", columns="metric", values=value)
    return table.reindex(index=entries(leaderboard)["model"], columns=ordered_metrics(leaderboard)).astype(
        float
    )


# Comparison


def against_negative(comparison: pd.DataFrame, calibration: pd.DataFrame) -> pd.DataFrame:
    """Rows of the comparison (all strata) of each calibrated metric with that metric's own negative control."""
    table = verdicts(calibration)
    negative = table.loc[table["verdict"] == "calibrated"].set_index("metric")["negative"]
    return comparison[comparison["control"] == comparison["metric"].map(negative)]


def outcomes(comparison: pd.DataFrame, calibration: pd.DataFrame) -> pd.DataFrame:
    """Who beats the negative controls: one row per model, in the comparison's order.

    better, worse, undecided: lists of calibrated metrics whose 95 % interval of the mean difference lies above 0,
    below 0, or neither (or is NaN); better_holm: those of `better` whose one-sided paired t-test, adjusted after Holm,
    has p < 0.05.
    """
    table = against_negative(comparison, calibration)
    table = table[table["stratum"] == "all"]
    rows = []
    for model, part in table.groupby("model", sort=False):
        better, worse = part["low"] > 0, part["high"] < 0
        rows.append(
            {
                "model": model,
                "better": list(part.loc[better, "metric"]),
                "worse": list(part.loc[worse, "metric"]),
                "undecided": list(part.loc[~better & ~worse, "metric"]),
                "better_holm": list(part.loc[better & (part["t_holm"] < 0.05), "metric"]),
            }
        )
    return pd.DataFrame(rows, columns=["model", "better", "worse", "undecided", "better_holm"])


def headline(
    title: str, calibration: pd.DataFrame, leaderboard: pd.DataFrame, comparison: pd.DataFrame
) -> list[str]:
    """The result in a few sentences: which metrics are calibrated, and who beats the negative controls on them."""
    sentences = [_metrics_sentence(title, calibration)]
    kinds = leaderboard.drop_duplicates("model").set_index("model")["kind"]
    models = list(kinds.index[kinds == "model"])
    if not models:
        sentences.append("No model was scored: this is a calibration of the metrics alone.")
    table = verdicts(calibration)
    metrics = list(table.loc[table["verdict"] == "calibrated", "metric"])
    if not metrics:
        if models:
            sentences.append(
                "Without a calibrated metric no model is ranked, and none can be said to beat the controls."
            )
        return sentences
    result = outcomes(comparison, calibration)
    for kind in PREDICTORS:
        names = list(kinds.index[kinds == kind])
        if names:
            sentences += _winners_sentences(
                kind, len(names), result[result["model"].isin(names)], len(metrics)
            )
    sentences += _first_sentence(leaderboard)
    return sentences


def _metrics_sentence(title: str, calibration: pd.DataFrame) -> str:
    table = verdicts(calibration)
    groups = {name: list(table.loc[table["verdict"] == name, "metric"]) for name in VERDICTS}
    total = counted(len(table), "metric")
    good = groups["calibrated"]
    if len(good) == len(table):
        return f"On {title} all {total} are calibrated: {listed(good)}."
    verb = "is" if len(good) == 1 else "are"
    start = (
        f"{len(good)} of {total} {verb} calibrated on {title}: {listed(good)}"
        if good
        else f"No metric is calibrated on {title}"
    )
    others = [
        f"{len(groups[name])} {'is ' if i == 0 and len(groups[name]) == 1 else 'are ' if i == 0 else ''}{name} ({', '.join(groups[name])})"
        for i, name in enumerate(name for name in VERDICTS[1:3] if groups[name])
    ]
    if groups["none"]:
        few = "has" if len(groups["none"]) == 1 else "have"
        others.append(
            f"{len(groups['none'])} {few} no verdict, for want of 10 usable conditions ({', '.join(groups['none'])})"
        )
    return f"{start}. Of the others, {listed(others)}." if good else f"{start}: {listed(others)}."


def _winners_sentences(kind: str, total: int, result: pd.DataFrame, n_metrics: int) -> list[str]:
    """Sentences on the models, or on the baselines, that beat a negative control and that lose to one."""
    winners = result[result["better"].map(len) > 0].sort_values(
        "better", key=lambda lists: -lists.map(len), kind="stable"
    )
    losers = result[result["worse"].map(len) > 0]
    scale = "on calibrated metrics (95 % interval of the mean difference clear of zero)"
    if winners.empty:
        subject = f"The {kind} does not beat" if total == 1 else f"None of the {counted(total, kind)} beats"
        sentences = [f"{subject} the negative control {scale}."]
    else:
        names = [
            f"{row.model} on {'all ' if len(row.better) == n_metrics else ''}{len(row.better)} of {n_metrics}".replace(
                "all ", "all "
            )
            for row in winners.itertuples()
        ]
        verb = "beats" if len(winners) == 1 else "beat"
        sentences = [
            f"{len(winners)} of {counted(total, kind)} {verb} the negative control {scale}: {listed(names)}."
        ]
    if not losers.empty:
        names = [f"{row.model} on {len(row.worse)} of {n_metrics}" for row in losers.itertuples()]
        sentences.append(
            f"Worse than the negative control, with the interval clear of zero: {listed(names)}."
        )
    return sentences


def _first_sentence(leaderboard: pd.DataFrame) -> list[str]:
    first = leaderboard[(leaderboard["rank"] == 1) & leaderboard["model"].isin(panel_models(leaderboard))]
    if first.empty:
        return []
    counts = first.groupby("model")["metric"].agg(list)
    counts = counts.sort_values(key=lambda lists: -lists.map(len), kind="stable")
    return [
        f"Ranked first: {listed([f'{model} by {listed(metrics)}' for model, metrics in counts.items()])}."
    ]


def strata_columns(comparison: pd.DataFrame) -> pd.DataFrame:
    """One row per (model, control, metric), the strata beside the whole.

    Columns of the stratum "all" under their own names; for each stratum `difference_<stratum>`, `n_<stratum>` and
    `clear_<stratum>` (its interval excludes 0). Rows keep the comparison's order.
    """
    key = ["model", "control", "metric"]
    whole = comparison[comparison["stratum"] == "all"].drop(columns="stratum")
    for name in STRATA:
        part = comparison[comparison["stratum"] == name]
        part = part.assign(clear=(part["low"] > 0) | (part["high"] < 0))
        columns = {"mean_difference": f"difference_{name}", "n": f"n_{name}", "clear": f"clear_{name}"}
        whole = whole.merge(part[[*key, *columns]].rename(columns=columns), on=key, how="left")
    return whole


# Conditions


def perturbed(quality: pd.DataFrame) -> pd.DataFrame:
    """Quality table without the unperturbed cells."""
    return quality[quality["condition"] != "control"]


def quality_summary(quality: pd.DataFrame) -> pd.DataFrame:
    """One row per covariate: conditions, cells, mean and CV of cells and of DEGs, shares, median E-distance.

    CV is the sample standard deviation (n-1) over the mean; NaN for fewer than two conditions or a mean of 0.
    cells counts perturbed cells and control_cells the rest (NaN where the table has no control row).
    """
    rows = []
    for covariate, part in quality.groupby("covariate", sort=False):
        rest, control = perturbed(part), part[part["condition"] == "control"]
        rows.append(
            {
                "covariate": covariate,
                "conditions": len(rest),
                "cells": rest["n_cells"].sum(),
                "control_cells": control["n_cells"].sum() if len(control) else np.nan,
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

    Scores are paired by half split, averaged over training seeds and half splits, then divided. Models and
    baselines in the leaderboard's order; conditions where either wMSE is NaN (no DEG weights) or 0 are left out.
    """
    key = ["covariate", "condition"]
    table = scores[scores["metric"] == "wmse"]
    table = table.groupby(["model", *key, "half_seed"], sort=True)["value"].mean().reset_index()
    mean = (
        table[table["model"] == "dataset_mean"].drop(columns="model").rename(columns={"value": "reference"})
    )
    table = table.merge(mean, on=[*key, "half_seed"])
    table = table.groupby(["model", *key])[["value", "reference"]].mean().reset_index()
    table = table[(table["value"] > 0) & (table["reference"] > 0)]
    table = table.merge(quality[[*key, "n_degs"]], on=key, how="left")
    table = table.assign(ratio=table["value"] / table["reference"], stratum=table["n_degs"].map(stratum))
    place = {name: i for i, name in enumerate(panel_models(leaderboard))}
    table = table[table["model"].isin(place)].sort_values(
        "model", key=lambda names: names.map(place), kind="stable"
    )
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
    groups = unpredicted.groupby(["model", "covariate", "reason"], sort=True)["condition"]
    return groups.agg(n="size", conditions=lambda names: sorted(names)).reset_index()
