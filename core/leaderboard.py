"""The leaderboard: models and controls by metric, with headroom; ranked only by calibrated metrics."""

from __future__ import annotations

import numpy as np
import pandas as pd

from core.arrays import Floats
from core.bootstrap import bootstrap_sums, interval
from core.calibration import RESAMPLES, VARIANTS, calibrated_metrics
from core.controls import CONTROLS
from core.metrics import BY_NAME

COVERAGE = 0.8
RANKED = ("model", "baseline")
CONDITION = ["covariate", "condition"]


def leaderboard(scores: pd.DataFrame, calibration: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Long table, one row per (model, metric); its columns are in `docs/outputs.md`.

    scores: long table of models and controls (model, covariate, condition, half_seed, metric, value). The
    controls have a value for every condition of the evaluated set. Models that cover at least 80 % of it are in the
    panel and compared on the conditions that all of them have; others are summarised on their own conditions and
    not ranked. Headroom is (model - negative) / (positive - negative) on panel means, unclipped: 0 is the metric's
    negative control, 1 the interpolated duplicate.
    """
    main_seed = scores["half_seed"].min()
    main = scores[scores["half_seed"] == main_seed]
    everyone = pd.MultiIndex.from_frame(main[CONDITION].drop_duplicates().sort_values(CONDITION))
    own = {
        str(model): set(pd.MultiIndex.from_frame(rows[CONDITION].drop_duplicates()))
        for model, rows in main.groupby("model", observed=True)
    }
    coverage = {model: len(conditions) / len(everyone) for model, conditions in own.items()}
    panel = [model for model, share in coverage.items() if share >= COVERAGE]
    shared = set(everyone).intersection(*(own[model] for model in panel))
    calibrated = set(calibrated_metrics(calibration))
    kinds = {control.name: control.role for control in CONTROLS}

    tables = {
        (seed_, metric): rows.set_index([*CONDITION, "model"])["value"].unstack("model").reindex(everyone)
        for (seed_, metric), rows in scores.groupby(["half_seed", "metric"], observed=True)
    }
    half_seeds = sorted(scores["half_seed"].unique())
    rows = []
    for name in [m for m in BY_NAME if (main_seed, m) in tables]:
        for model in own:
            used = everyone.isin(shared if model in panel else own[model])
            values = tables[main_seed, name][model].to_numpy(np.float64)[used]
            parts = [_headroom_parts(tables[s, name], model, name, used) for s in half_seeds]
            low, high = _headroom_interval(parts[0], seed)
            by_half = [_headroom(p) for p in parts]
            some = values[~np.isnan(values)]
            rows.append(
                {
                    "model": model,
                    "kind": kinds.get(model, "model"),
                    "metric": name,
                    "mean": some.mean() if len(some) else np.nan,
                    "median": np.median(some) if len(some) else np.nan,
                    "n_conditions": len(some),
                    "coverage": coverage[model],
                    "nan_share": 1.0 - len(some) / len(values) if len(values) else np.nan,
                    "headroom": by_half[0],
                    "headroom_low": low,
                    "headroom_high": high,
                    "headroom_half_sd": float(np.std(by_half, ddof=1)) if len(by_half) > 1 else np.nan,
                    "calibrated": name in calibrated,
                    "in_panel": model in panel,
                }
            )
    return _ranked(pd.DataFrame(rows))


def _ranked(board: pd.DataFrame) -> pd.DataFrame:
    board["rank"] = np.nan
    eligible = board[board["calibrated"] & board["in_panel"] & board["kind"].isin(RANKED)]
    for name, rows in eligible.groupby("metric", observed=True):
        ascending = not BY_NAME[str(name)].higher_is_better
        board.loc[rows.index, "rank"] = rows["mean"].rank(ascending=ascending, method="min")
    return board


def _headroom_parts(
    table: pd.DataFrame, model: str, metric: str, used: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> Floats:
    """Per usable condition (model - negative, positive - negative), conditions x 2."""
    names = [model, BY_NAME[metric].negative_control, VARIANTS[0].positive]
    triple = np.column_stack([table[name].to_numpy(np.float64)[used] for name in names])
    triple = triple[~np.isnan(triple).any(axis=1)]
    return np.column_stack([triple[:, 0] - triple[:, 1], triple[:, 2] - triple[:, 1]])


def _headroom(parts: Floats) -> float:
    gained, available = parts.sum(axis=0)
    return float(gained / available) if len(parts) and available != 0 else float("nan")


def _headroom_interval(parts: Floats, seed: int) -> tuple[float, float]:
    """NaN: no bound, because the controls do not differ in enough of the resamples."""
    if not len(parts):
        return float("nan"), float("nan")
    sums = bootstrap_sums(parts, RESAMPLES, seed, "bootstrap")
    with np.errstate(invalid="ignore", divide="ignore"):
        bounds = np.concatenate(interval(sums[:, :1] / sums[:, 1:]))
    low, high = np.where(np.isfinite(bounds), bounds, np.nan)
    return float(low), float(high)
