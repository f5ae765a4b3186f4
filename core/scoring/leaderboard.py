"""The leaderboard: models and controls by metric, with headroom; ranked only by calibrated metrics."""

from __future__ import annotations

import numpy as np
import pandas as pd

from core.arrays import Bools, Floats
from core.conditions import KEYS
from core.reference.controls import CONTROLS, RANKED, name_matched_control
from core.scoring.calibration import RESAMPLES, VARIANTS
from core.scoring.metrics import BY_NAME
from core.stats.bootstrap import bootstrap_sums, interval

COVERAGE = 0.8


def build_leaderboard(
    scores: pd.DataFrame, calibration: pd.DataFrame, seed: int, matched: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Summarise models and controls by metric, with headroom; rank models and baselines by calibrated metrics.

    Models that cover at least 80 % of the evaluated set are in the panel and are compared on the conditions that all of
    them have. A metric may be undefined for some of them on some conditions: by it, those are compared that have a
    value on at least 80 %, on the conditions where all these have one; the others get no rank. Models of less coverage
    are summarised on their own conditions and not ranked.

    Parameters
    ----------
    scores
        Long table of models and controls (model, covariate, condition, half_seed, metric, value). The controls have a
        value for every condition of the evaluated set.
    calibration
        Of all metrics.
    seed
        Of the resamples.
    matched
        For models that lack genes, the scores of the controls on these models' genes (`core.scoring.scores`).

    Returns
    -------
    DataFrame
        One row per (model, metric); its columns are in `docs/outputs.md`. Headroom is (model - negative) /
        (positive - negative) on panel means, unclipped: 0 is the metric's negative control, 1 the interpolated
        duplicate.
    """
    main_seed = scores["half_seed"].min()
    main = scores[scores["half_seed"] == main_seed]
    everyone = pd.MultiIndex.from_frame(main[KEYS].drop_duplicates().sort_values(KEYS))
    own = {
        str(model): everyone.isin(pd.MultiIndex.from_frame(rows[KEYS].drop_duplicates()))
        for model, rows in main.groupby("model", observed=True)
    }
    panel = [model for model, conditions in own.items() if conditions.mean() >= COVERAGE]
    shared = np.logical_and.reduce([own[model] for model in panel])
    calibrated = set(calibration.loc[calibration["verdict"] == "calibrated", "metric"])
    kinds = dict.fromkeys(own, "model") | {c.name: c.role for c in CONTROLS if c.name in own}

    everything = scores if matched is None else pd.concat([scores, matched], ignore_index=True)
    tables = {
        (seed_, metric): rows.set_index([*KEYS, "model"])["value"].unstack("model").reindex(everyone)
        for (seed_, metric), rows in everything.groupby(["half_seed", "metric"], observed=True)
    }
    half_seeds = sorted(scores["half_seed"].unique())
    rows = []
    for name in [m for m in BY_NAME if (main_seed, m) in tables]:
        table = tables[main_seed, name]
        ranked = [model for model in panel if kinds[model] in RANKED]
        defined, common = _find_common_conditions(table, ranked, shared)
        for model in own:
            compared = model in defined or (model in panel and model not in ranked)
            used = common if compared else shared if model in panel else own[model]
            values = table[model].to_numpy(np.float64)
            some = values[used & ~np.isnan(values)]
            basis = shared if model in panel else own[model]
            parts = [_subtract_controls(tables[s, name], model, name, used) for s in half_seeds]
            low, high = _bootstrap_headroom(parts[0], seed)
            by_half = [_divide_headroom(p) for p in parts]
            rows.append(
                {
                    "model": model,
                    "kind": kinds[model],
                    "metric": name,
                    "mean": some.mean() if len(some) else np.nan,
                    "median": np.median(some) if len(some) else np.nan,
                    "n_conditions": len(some),
                    "coverage": own[model].mean(),
                    "nan_share": float(np.isnan(values[basis]).mean()) if basis.any() else np.nan,
                    "headroom": by_half[0],
                    "headroom_low": low,
                    "headroom_high": high,
                    "headroom_half_sd": float(np.std(by_half, ddof=1)) if len(by_half) > 1 else np.nan,
                    "calibrated": name in calibrated,
                    "in_panel": model in panel,
                    "comparable": model in defined,
                }
            )
    return _add_ranks(pd.DataFrame(rows))


def _find_common_conditions(table: pd.DataFrame, models: list[str], shared: Bools) -> tuple[list[str], Bools]:
    """Find the models that can be compared by a metric, and the conditions to compare them on.

    A metric counts as defined for a model where it is so on at least 80 % of the shared conditions on which any of
    the models has a value.
    """
    has_value = {model: table[model].notna().to_numpy() & shared for model in models}
    usable = np.logical_or.reduce([*has_value.values(), np.zeros(len(table), dtype=bool)])
    defined = [m for m, some in has_value.items() if some.any() and some.sum() >= COVERAGE * usable.sum()]
    # Without such a model there is nothing to compare, and controls are summarised on all shared conditions.
    common = np.logical_and.reduce([shared, *(has_value[model] for model in defined)])
    return defined, common


def _add_ranks(board: pd.DataFrame) -> pd.DataFrame:
    board["rank"] = np.nan
    eligible = board[board["calibrated"] & board["comparable"]]
    for name, rows in eligible.groupby("metric", observed=True):
        if len(rows) < 2:  # first of one is no rank
            continue
        ascending = not BY_NAME[str(name)].higher_is_better
        board.loc[rows.index, "rank"] = rows["mean"].rank(ascending=ascending, method="min")
    return board.drop(columns="comparable")


def _subtract_controls(table: pd.DataFrame, model: str, metric: str, used: Bools) -> Floats:
    """Give (model - negative, positive - negative) of each usable condition, conditions x 2."""
    controls = [BY_NAME[metric].negative_control, VARIANTS[0].positive]
    matched = [name_matched_control(control, model) for control in controls]
    names = [model, *(m if m in table else c for m, c in zip(matched, controls, strict=True))]
    triple = np.column_stack([table[name].to_numpy(np.float64)[used] for name in names])
    triple = triple[~np.isnan(triple).any(axis=1)]
    return np.column_stack([triple[:, 0] - triple[:, 1], triple[:, 2] - triple[:, 1]])


def _divide_headroom(parts: Floats) -> float:
    gained, available = parts.sum(axis=0)
    return float(gained / available) if len(parts) and available != 0 else float("nan")


def _bootstrap_headroom(parts: Floats, seed: int) -> tuple[float, float]:
    """Give the ends of the 95 % interval; NaN: none, because the controls do not differ in enough of the resamples."""
    if not len(parts):
        return float("nan"), float("nan")
    sums = bootstrap_sums(parts, RESAMPLES, seed, "bootstrap")
    with np.errstate(invalid="ignore", divide="ignore"):
        bounds = np.concatenate(interval(sums[:, :1] / sums[:, 1:]))
    low, high = np.where(np.isfinite(bounds), bounds, np.nan)
    return float(low), float(high)
