"""Calibration of the metrics: how well each distinguishes a replicate from an uninformative average.

Definitions are in `docs/science.md`, section 5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from core.arrays import Floats
from core.scoring.metrics import BY_NAME, Metric
from core.stats.bootstrap import bootstrap_means, interval

RESAMPLES = 2_000
THRESHOLD = 0.1
FEWEST_CONDITIONS = 10
EPSILON = 1e-6


class Variant(NamedTuple):
    """A Dynamic Range Fraction: its positive control, and its negative one (None: the metric's own)."""

    name: str
    positive: str
    negative: str | None


# The first is the one to quote: verdict, BDS and headroom use it.
VARIANTS = (
    Variant("drf_interpolated", "interpolated_duplicate", None),
    Variant("drf_mean", "technical_duplicate", None),
    Variant("drf_ctrl", "technical_duplicate", "control_mean"),
)
# The controls whose scores a calibration needs, of every half split.
CALIBRATING = (
    {variant.positive for variant in VARIANTS}
    | {variant.negative for variant in VARIANTS if variant.negative}
    | {metric.negative_control for metric in BY_NAME.values()}
)


def dynamic_range_fraction(positive: Floats, negative: Floats, metric: Metric) -> Floats:
    """Dynamic Range Fraction (DRF): how much of the range from the negative control to perfect the positive covers.

    Higher is better: (pos - neg) / (perfect - neg + 1e-6); lower is better: (neg - pos) / (neg + 1e-6).

    Parameters
    ----------
    positive, negative
        The metric's values for the two controls, one per condition.
    metric
        Its direction and perfect value.

    Returns
    -------
    Floats
        One value per condition, clipped to [-1, 1]; NaN where either control's value is NaN.
    """
    if metric.higher_is_better:
        fraction = (positive - negative) / (metric.perfect - negative + EPSILON)
    else:
        fraction = (negative - positive) / (negative + EPSILON)
    return np.clip(fraction, -1.0, 1.0)


def discrimination(positive: Floats, negative: Floats, metric: Metric) -> Floats:
    """Discrimination: whether the positive control beats the negative one; its mean is the Bound Discrimination Score.

    Parameters
    ----------
    positive, negative
        The metric's values for the two controls, one per condition.
    metric
        Its direction.

    Returns
    -------
    Floats
        One value per condition: 1 where it does, 1/2 at a tie, else 0; NaN where either control's value is NaN.
    """
    margin = positive - negative if metric.higher_is_better else negative - positive
    return np.where(np.isnan(margin), np.nan, (np.sign(margin) + 1.0) / 2.0)


def build_calibration(scores: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Calibrate every metric by the scores of the controls.

    Parameters
    ----------
    scores
        Long table of the controls (model, covariate, condition, half_seed, metric, value). The half split of the lowest
        half_seed is the quoted one, the others give the spread.
    seed
        Of the resamples.

    Returns
    -------
    DataFrame
        One row per metric and variant; its columns are in `docs/outputs.md`. Values are over the usable conditions
        (both controls defined); without any they are NaN.
    """
    index = ["half_seed", "metric", "covariate", "condition"]
    wide = scores.set_index([*index, "model"])["value"].unstack("model")
    main = min(wide.index.get_level_values("half_seed"))
    rows = []
    for name in [m for m in BY_NAME if m in set(wide.index.get_level_values("metric"))]:
        metric = BY_NAME[name]
        of_metric = wide.loc[wide.index.get_level_values("metric") == name].droplevel("metric")
        for variant in VARIANTS:
            negative = variant.negative or metric.negative_control
            pairs = pd.DataFrame({"positive": of_metric[variant.positive], "negative": of_metric[negative]})
            rows.append(
                {"metric": name, "variant": variant.name, "positive": variant.positive, "negative": negative}
                | _summarise(pairs, metric, main, seed, quoted=variant is VARIANTS[0])
            )
    return pd.DataFrame(rows)


def decide_verdict(n: int, low: float, high: float) -> str:
    """Decide whether a metric is calibrated on a data set.

    Parameters
    ----------
    n
        Number of usable conditions.
    low, high
        The 95 % interval of the mean DRF over them.

    Returns
    -------
    str
        `calibrated`, `miscalibrated`, `inconclusive`, or `none` for fewer than 10 conditions.
    """
    if n < FEWEST_CONDITIONS:
        return "none"
    if low > THRESHOLD:
        return "calibrated"
    return "miscalibrated" if high < THRESHOLD else "inconclusive"


def _summarise(pairs: pd.DataFrame, metric: Metric, main: int, seed: int, *, quoted: bool) -> dict[str, object]:
    pairs = pairs.where(pairs.notna().all(axis=1))
    positive, negative = pairs["positive"].to_numpy(np.float64), pairs["negative"].to_numpy(np.float64)
    values = pairs.assign(
        drf=dynamic_range_fraction(positive, negative, metric), bds=discrimination(positive, negative, metric)
    )
    of_main = values.loc[values.index.get_level_values("half_seed") == main]
    quote = of_main[["drf", "bds"]].to_numpy()
    low, high = interval(bootstrap_means(quote, RESAMPLES, seed, "bootstrap"))
    n = int(of_main["drf"].notna().sum())
    spread = values[["drf", "bds"]].groupby(level="half_seed").mean().std(ddof=1)
    mean = of_main.mean()
    summary: dict[str, object] = {"n_conditions": n, "nan_share": float(of_main["drf"].isna().mean())}
    summary |= {f"{name}_value": mean[name] for name in ("positive", "negative")}
    for place, name in enumerate(("drf", "bds")):
        summary |= {name: mean[name], f"{name}_low": low[place], f"{name}_high": high[place]}
        summary[f"{name}_half_sd"] = spread[name]
    return summary | {"verdict": decide_verdict(n, low[0], high[0]) if quoted else None}
