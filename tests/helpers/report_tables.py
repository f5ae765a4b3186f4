"""Made-up but lifelike tables for tests of the report: `build` gives every argument of `write_report` but the path."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy import stats

METRICS = {
    # name: (value of the negative control, of the positive control, mean DRF, spread of a condition)
    "mse": (0.0021, 0.0012, 0.38, 0.3),
    "wmse": (0.0312, 0.0101, 0.66, 0.25),
    "pearson_deltactrl": (0.52, 0.61, 0.19, 0.3),
    "pearson_deltactrl_degs": (0.61, 0.74, 0.13, 0.35),
    "r2_deltactrl": (0.21, 0.15, -0.08, 0.4),
    "r2_deltactrl_degs": (0.33, 0.36, 0.08, 0.4),
    "weighted_r2_deltactrl": (0.24, 0.62, 0.51, 0.3),
    "pearson_deltapert": (0.0, 0.38, 0.38, 0.3),
    "pearson_deltapert_degs": (0.0, 0.47, 0.47, 0.3),
    "r2_deltapert": (-0.42, -0.61, -0.2, 0.4),
    "r2_deltapert_degs": (-0.5, 0.1, 0.11, 0.5),
    "weighted_r2_deltapert": (-1.3, 0.52, 0.7, 0.2),
    "nir": (0.5, 0.86, 0.72, 0.3),
    "weighted_pearson_deltactrl": (0.58, 0.8, 0.5, 0.3),
    "weighted_pearson_deltapert": (0.0, 0.7, 0.69, 0.25),
    "mae": (0.028, 0.024, 0.14, 0.2),
    "pds": (0.5, 0.84, 0.68, 0.3),
}
MODELS = [
    "fmlp_esm2", "fmlp_geneformer", "fmlp_scgpt", "fmlp_genept", "gears", "scgpt", "sclambda", "presage", "knn_esm2",
    "ridge_esm2", "ridge_reactome", "knn_reactome", "fmlp_reactome", "fmlp_coexpression", "ridge_coexpression", "state",
    "knn_coexpression", "mymodel", "other", "zeta",
]  # fmt: skip
CONTROLS = {
    "interpolated_duplicate": "positive control",
    "technical_duplicate": "positive control",
    "dataset_mean": "negative control",
    "control_mean": "negative control",
    "sparse_mean": "negative control",
}
LEVELS = {
    "interpolated_duplicate": 1.0,
    "technical_duplicate": 0.7,
    "dataset_mean": 0.0,
    "control_mean": -0.15,
    "sparse_mean": -0.25,
}
COMPARISON = [
    "model", "control", "metric", "stratum", "n", "mean_difference", "low", "high", "t_p", "t_holm", "t_bonferroni",
    "wilcoxon_p", "wilcoxon_holm", "wilcoxon_bonferroni", "detectable_difference",
]  # fmt: skip
STRATA = ["0", "1-9", "10-99", ">=100"]


def build(
    models=8, conditions=200, metrics=13, covariates=("K562",), baselines=("linear",), calibrated="some",
    all_nan=(), low_coverage=(), seed=0,
):  # fmt: skip
    """Tables of a benchmark. calibrated: "some", "none"; all_nan: metrics without a value; low_coverage: models."""
    rng = np.random.default_rng(seed)
    names = list(METRICS)[:metrics]
    quality = _quality(rng, conditions, covariates)
    calibration = _calibration(rng, names, conditions * len(covariates), calibrated, all_nan)
    entries = {**dict.fromkeys(MODELS[:models], "model"), **dict.fromkeys(baselines, "baseline"), **CONTROLS}
    scores = _scores(rng, entries, quality)
    leaderboard = _leaderboard(rng, entries, names, calibration, low_coverage, all_nan)
    comparison = _comparison(rng, entries, names, leaderboard, quality)
    return {
        "dataset": SimpleNamespace(
            name="norman19",
            title="Norman et al. 2019, CRISPRa pairs in K562",
            task="combination",
            citation="Norman et al., Science 365, 786–793 (2019)",
            licence="CC BY 4.0",
        ),
        "provenance": {
            "data set": "norman19, sha256 9f2c7a41d8e05b36c1f4a7728de90b5c6a13f0e8d2b4c5967a8f1e3d0c2b4a69",
            "code": "calipert 0.1.0",
            "seed": "42",
            "half splits": "5 (seeds 42 to 46)",
        },
        "quality": quality,
        "edistance": {
            covariate: _edistance(rng, quality[quality["covariate"] == covariate]) for covariate in covariates
        },
        "calibration": calibration,
        "leaderboard": leaderboard,
        "comparison": comparison,
        "scores": scores,
        "declared": [
            "Genes: the 8,192 most variable genes were chosen with all cells, test cells included.",
            "Cells: the cap of cells per condition was chosen with all cells.",
        ],
        "unpredicted": _unpredicted(list(entries)[: min(models, 3)], quality),
    }


def _quality(rng, n, covariates):
    rows = []
    for covariate in covariates:
        strength = rng.gamma(0.7, 1.0, n)
        degs = np.where(strength < 0.08, 0, np.rint(10 ** (strength * 1.1))).astype(int)
        # As in a real screen the first letters repeat; combinations are longer than single genes.
        names = [f"GENE{i:03d}" if i % 3 else f"GENE{i:03d}+KLF{i:02d}" for i in range(n)]
        rows.append(
            pd.DataFrame(
                {
                    "covariate": covariate,
                    "condition": names,
                    "n_cells": rng.integers(40, 312, n),
                    "n_degs": np.minimum(degs, 2500),
                    "edistance_to_control": strength**2 * 6 * np.exp(rng.normal(0, 0.5, n)) + rng.normal(0.3, 0.4, n),
                }
            )
        )
        control = {"covariate": covariate, "condition": "control", "n_cells": 8192, "n_degs": np.nan}
        rows.append(pd.DataFrame([{**control, "edistance_to_control": 0.0}]))
    return pd.concat(rows, ignore_index=True)


def _edistance(rng, quality):
    centres = rng.normal(size=(5, 10)) * 2
    group = rng.integers(0, 5, len(quality))
    size = np.sqrt(np.clip(quality["edistance_to_control"].to_numpy(), 0, None))[:, None]
    points = centres[group] * size / 3 + rng.normal(0, 0.3, (len(quality), 10)) * size
    matrix = ((points[:, None] - points[None]) ** 2).sum(-1) + rng.normal(0, 0.02)
    np.fill_diagonal(matrix, 0)
    return pd.DataFrame(matrix, index=list(quality["condition"]), columns=list(quality["condition"]))


def _calibration(rng, names, n, calibrated, all_nan):
    rows = []
    for name in names:
        negative, positive, drf, spread = METRICS[name]
        shift = {"drf_interpolated": 0.0, "drf_mean": -0.12, "drf_ctrl": 0.1}
        for variant, plus in shift.items():
            mean = drf + plus if calibrated == "some" else 0.08 * drf + plus / 10
            half = 1.96 * spread / np.sqrt(n)
            usable = 4 if name == "pearson_deltactrl_degs" and n < 20 else n
            row = {
                "metric": name,
                "variant": variant,
                "positive": "interpolated_duplicate" if variant == "drf_interpolated" else "technical_duplicate",
                "negative": "control_mean" if "deltapert" in name or variant == "drf_ctrl" else "dataset_mean",
                "n_conditions": usable,
                "nan_share": 0.18 if name.endswith("_degs") else 0.0,
                "positive_value": positive,
                "negative_value": negative,
                "drf": mean,
                "drf_low": mean - half,
                "drf_high": mean + half,
                "drf_half_sd": 0.25 * half + 0.004,
                "bds": np.clip(0.5 + 0.55 * mean, 0, 1),
                "bds_low": np.clip(0.5 + 0.55 * mean - half, 0, 1),
                "bds_high": np.clip(0.5 + 0.55 * mean + half, 0, 1),
                "bds_half_sd": 0.2 * half,
                "verdict": None,
            }
            if name in all_nan or (variant == "drf_ctrl" and name == "pearson_deltactrl"):
                row |= {key: np.nan for key in row if key.startswith(("drf", "bds")) or key.endswith("_value")}
                row |= {"n_conditions": 0, "nan_share": 1.0}
            if variant == "drf_interpolated":
                row["verdict"] = _verdict(row)
            rows.append(row)
    return pd.DataFrame(rows)


def _verdict(row):
    if row["n_conditions"] < 10:
        return "none"
    return "calibrated" if row["drf_low"] > 0.1 else "miscalibrated" if row["drf_high"] < 0.1 else "inconclusive"


def _level(rng, entries):
    return {
        name: LEVELS.get(name, 0.32 - 0.06 * i if kind == "model" else 0.12)
        for i, (name, kind) in enumerate(entries.items())
    }


def _leaderboard(rng, entries, names, calibration, low_coverage, all_nan):
    quoted = calibration[calibration["variant"] == "drf_interpolated"].set_index("metric")
    levels = _level(rng, entries)
    rows = []
    for metric in names:
        negative, positive = METRICS[metric][:2]
        calibrated = quoted.loc[metric, "verdict"] == "calibrated"
        for name, kind in entries.items():
            headroom = levels[name] + (rng.normal(0, 0.08) if kind in ("model", "baseline") else 0)
            if name == "scgpt" and metric.startswith("weighted_r2"):
                headroom = -7.3
            value = negative + headroom * (positive - negative)
            missing = metric in all_nan or (name == "dataset_mean" and "deltapert" in metric and "pearson" in metric)
            rows.append(
                {
                    "model": name,
                    "kind": kind,
                    "metric": metric,
                    "mean": np.nan if missing else value,
                    "median": np.nan if missing else value * 0.97,
                    "n_conditions": 0 if missing else int(quoted.loc[metric, "n_conditions"]),
                    "coverage": 0.61 if name in low_coverage else 1.0,
                    "nan_share": 1.0 if missing else 0.0,
                    "headroom": np.nan if missing else headroom,
                    "headroom_low": np.nan if missing else headroom - 0.11,
                    "headroom_high": np.nan if missing else headroom + 0.11,
                    "headroom_half_sd": np.nan if missing else 0.03,
                    "rank": np.nan,
                    "calibrated": calibrated,
                    "in_panel": name not in low_coverage,
                }
            )
    table = pd.DataFrame(rows)
    ranked = table["calibrated"] & table["in_panel"] & table["kind"].isin(["model", "baseline"])
    table.loc[ranked, "rank"] = table[ranked].groupby("metric")["headroom"].rank(ascending=False, method="min")
    return table


def _comparison(rng, entries, names, leaderboard, quality):
    means = leaderboard.set_index(["model", "metric"])["headroom"]
    degs = quality.loc[quality["condition"] != "control", "n_degs"]
    sizes = {"all": len(degs)} | dict(
        zip(STRATA, np.histogram(degs, [-0.5, 0.5, 9.5, 99.5, 1e9])[0].tolist(), strict=True)
    )
    rows = []
    for name, kind in entries.items():
        for control in entries:
            if kind != "model" or entries[control] == "model":
                continue
            for metric in names:
                unit = abs(METRICS[metric][1] - METRICS[metric][0])
                gap = (means[name, metric] - LEVELS.get(control, 0.12)) * unit
                for stratum, n in sizes.items():
                    if not n:
                        continue
                    wide = 1.1 * unit / np.sqrt(n)
                    centre = gap * (1.5 if stratum == ">=100" else 1.0)
                    p = float(stats.norm.sf(1.96 * centre / wide))
                    rows.append(
                        {
                            "model": name,
                            "control": control,
                            "metric": metric,
                            "stratum": stratum,
                            "n": n,
                            "mean_difference": centre,
                            "low": centre - wide,
                            "high": centre + wide,
                            "t_p": p,
                            "t_holm": min(1.0, p * 20),
                            "t_bonferroni": min(1.0, p * 50),
                            "wilcoxon_p": p,
                            "wilcoxon_holm": min(1.0, p * 20),
                            "wilcoxon_bonferroni": min(1.0, p * 50),
                            "detectable_difference": 1.4 * wide,
                        }
                    )
    return pd.DataFrame(rows, columns=COMPARISON)


def _scores(rng, entries, quality):
    table = quality[quality["condition"] != "control"].reset_index(drop=True)
    effect = np.log10(table["n_degs"] + 1).to_numpy()
    base = 0.03 * np.exp(rng.normal(0, 0.4, len(table)))
    levels = _level(rng, entries)
    rows = []
    for name in entries:
        gain = levels[name] * (0.3 + 0.5 * effect)
        for half_seed in (42, 43):
            value = base * np.exp(-gain + rng.normal(0, 0.25, len(table)) * (name != "dataset_mean"))
            value = np.where(table["n_degs"] % 17 == 3, np.nan, value)
            rows.append(
                pd.DataFrame(
                    {
                        "model": name,
                        "covariate": table["covariate"],
                        "condition": table["condition"],
                        "fold": 0,
                        "seed": 42,
                        "half_seed": half_seed,
                        "metric": "wmse",
                        "value": value,
                    }
                )
            )
    return pd.concat(rows, ignore_index=True)


def _unpredicted(models, quality):
    table = quality[quality["condition"] != "control"].head(30)
    rows = [
        {"model": model, "covariate": row.covariate, "condition": row.condition, "reason": "no embedding for LOC1234"}
        for model in models
        for row in table.itertuples()
    ]
    return pd.DataFrame(rows, columns=["model", "covariate", "condition", "reason"])
