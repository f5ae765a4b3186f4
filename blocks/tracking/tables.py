"""What a run in MLflow shows of a leaderboard and of a calibration: metrics and tags."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from core.scoring.calibration import VARIANTS

# How the columns of a value end, of its interval, and of its spread over halves.
ENDINGS = ("", "_low", "_high", "_half_sd")
# Columns of the leaderboard that become the metrics `<metric>.<column>` of a model's run.
HEADROOM = [f"headroom{ending}" for ending in ENDINGS]
SUMMARY_COLUMNS = ("mean", "median", "n_conditions", "coverage", "nan_share", *HEADROOM, "rank")
# Columns of the calibration table that become metrics `<metric>.<variant><ending>` for every variant of the DRF.
DRF_ENDINGS = {f"drf{ending}": ending for ending in ENDINGS}
# Columns that are kept for the variant that carries the verdict only, as `<metric>.<column>`.
QUOTED_VARIANT = VARIANTS[0].name
QUOTED_COLUMNS = (*(f"bds{ending}" for ending in ENDINGS), "nan_share", "n_conditions")


def summarise_model(rows: pd.DataFrame) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and tags of one model. rows: its rows of the leaderboard, by metric."""
    values = {f"{metric}.{column}": float(x) for column in SUMMARY_COLUMNS for metric, x in rows[column].items()}
    absent = [name for name in _find_not_finite(values) if not name.endswith(".rank")]
    calibrated = rows["calibrated"].astype(bool)
    tags = {
        "calibrated": ", ".join(sorted(calibrated.index[calibrated])) or "none",
        **{f"calibrated.{metric}": str(yes).lower() for metric, yes in calibrated.items()},
        "in_panel": str(bool(rows["in_panel"].all())).lower(),
        "not_finite": ", ".join(absent) or "none",
    }
    return values, tags


def summarise_calibration(calibration: pd.DataFrame) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and tags of one calibration."""
    values = {}
    for row in calibration.to_dict("records"):
        for column, ending in DRF_ENDINGS.items():
            values[f"{row['metric']}.{row['variant']}{ending}"] = float(row[column])
        if row["variant"] == QUOTED_VARIANT:
            for column in QUOTED_COLUMNS:
                values[f"{row['metric']}.{column}"] = float(row[column])
    quoted = calibration[calibration["variant"] == QUOTED_VARIANT]
    verdict_of = quoted.set_index("metric")["verdict"]
    calibrated = verdict_of.index[verdict_of == "calibrated"]
    tags = {
        "calibrated": ", ".join(sorted(calibrated)) or "none",
        **{f"verdict.{metric}": str(verdict) for metric, verdict in verdict_of.items()},
        "not_finite": ", ".join(_find_not_finite(values)) or "none",
    }
    return values, tags


def _find_not_finite(values: Mapping[str, float]) -> list[str]:
    return sorted(name for name, value in values.items() if not math.isfinite(value))
