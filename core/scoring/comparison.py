"""Comparisons of models with controls, paired over conditions (`docs/science.md`, section 6)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.power import TTestPower

from core.arrays import Floats
from core.conditions import KEYS
from core.reference.controls import CONTROLS, name_matched_control
from core.scoring.metrics import BY_NAME, CONSTANT
from core.stats.bootstrap import bootstrap_means, interval

RESAMPLES = 10_000
ALPHA = 0.05
POWER = 0.8
FEWEST_PAIRS = 2
EXACT_PAIRS = 50
FEWEST_FOR_INTERVAL = 5  # the bootstrap of fewer pairs says almost nothing; that of a single one is a point

# Strata of effect size by the number of DEGs: (name, from, to), both inclusive.
STRATA = (("all", 0, np.inf), ("0", 0, 0), ("1-9", 1, 9), ("10-99", 10, 99), (">=100", 100, np.inf))


def compare_models(
    scores: pd.DataFrame, n_degs: pd.Series, seed: int, matched: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Compare every model with every control that it shares conditions with.

    Parameters
    ----------
    scores
        Long table of one half split (model, covariate, condition, metric, value).
    n_degs
        Number of DEGs by (covariate, condition).
    seed
        Of the resamples.
    matched
        For models that lack genes, the scores of the controls on these models' genes.

    Returns
    -------
    DataFrame
        One row per model, control, metric and stratum; its columns are in `docs/outputs.md`. mean_difference is
        positive where the model is better; tests are one-sided for that. Holm's and Bonferroni's corrections are over
        models x metrics, for each control and stratum. detectable_difference is the mean difference that the paired
        t-test finds with 80 % power at alpha 0.05 divided by the number of tests (Holm's first step). NaN: fewer than
        two pairs, or no variation; an interval needs five pairs.
    """
    names = {control.name for control in CONTROLS}
    controls = [c.name for c in CONTROLS if c.name in set(scores["model"])]
    models = sorted(set(scores["model"].astype(str)) - names)
    metrics = [m for m in BY_NAME if m in set(scores["metric"])]
    conditions = pd.MultiIndex.from_frame(scores[KEYS].drop_duplicates().sort_values(KEYS))
    everything = scores if matched is None else pd.concat([scores, matched], ignore_index=True)
    wide = everything.set_index([*KEYS, "metric", "model"])["value"].unstack(["metric", "model"]).reindex(conditions)
    n = n_degs.reindex(conditions).to_numpy(np.float64)
    strata = {name: (n >= low) & (n <= high) for name, low, high in STRATA}
    tables = []
    for control in controls:
        pairs = [(model, metric) for model in models for metric in metrics]
        if not pairs:
            continue
        differences = np.column_stack(
            [
                (wide[metric, model] - wide[metric, _find_control(model, control, wide, metric)]).to_numpy(np.float64)
                * (1.0 if BY_NAME[metric].higher_is_better else -1.0)
                for model, metric in pairs
            ]
        )
        # A difference within the rounding error is none: it would be significant where all have one direction.
        differences[np.abs(differences) <= CONSTANT] = 0.0
        for stratum, rows in strata.items():
            if rows.any():
                table = pd.DataFrame(pairs, columns=["model", "metric"]).assign(control=control, stratum=stratum)
                tables.append(table.join(_test_differences(differences[rows], seed)))
    columns = ["model", "control", "metric", "stratum", "n", "mean_difference", "low", "high"]
    columns += [f"{test}_{p}" for test in ("t", "wilcoxon") for p in ("p", "holm", "bonferroni")]
    columns += ["detectable_difference"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _find_control(model: str, control: str, wide: pd.DataFrame, metric: str) -> str:
    matched = name_matched_control(control, model)
    return matched if (metric, matched) in wide else control


def _test_differences(differences: Floats, seed: int) -> pd.DataFrame:
    """Test each column of differences (pairs x comparisons; NaN: not a pair); one row for each."""
    low, high = interval(bootstrap_means(differences, RESAMPLES, seed, "comparison"))
    few = (~np.isnan(differences)).sum(axis=0) < FEWEST_FOR_INTERVAL
    low[few] = high[few] = np.nan
    columns = [column[~np.isnan(column)] for column in differences.T]
    testable = [len(d) >= FEWEST_PAIRS and np.ptp(d) > 0 for d in columns]
    tests = max(1, sum(testable))

    def compute(statistic: Callable[[Floats], float]) -> list[float]:
        return [statistic(d) if ok else np.nan for d, ok in zip(columns, testable, strict=True)]

    table = pd.DataFrame(
        {
            "n": [len(d) for d in columns],
            "mean_difference": [d.mean() if len(d) else np.nan for d in columns],
            "low": low,
            "high": high,
            "t_p": compute(lambda d: stats.ttest_1samp(d, 0.0, alternative="greater").pvalue),
            "wilcoxon_p": compute(compute_signed_rank_p),
            "detectable_difference": compute(lambda d: find_detectable_effect(len(d), tests) * d.std(ddof=1)),
        }
    )
    for test in ("t", "wilcoxon"):
        for method in ("holm", "bonferroni"):
            table[f"{test}_{method}"] = correct_p_values(table[f"{test}_p"].to_numpy(), method)
    return table


def compute_signed_rank_p(differences: Floats) -> float:
    """Compute the one-sided p of Wilcoxon's signed-rank test that differences lie above 0.

    Exact for up to 50 differences without ties and zeros, else by the normal approximation with scipy's handling of
    both; a permutation test of every small stratum with ties would take minutes.

    Parameters
    ----------
    differences
        At least two that differ, none NaN.

    Returns
    -------
    float
        Between 0 and 1.
    """
    sizes = np.abs(differences)
    exact = len(sizes) <= EXACT_PAIRS and len(np.unique(sizes)) == len(sizes) and sizes.min() > 0
    method = "exact" if exact else "asymptotic"
    return float(stats.wilcoxon(differences, alternative="greater", method=method).pvalue)


def correct_p_values(p: Floats, method: Literal["holm", "bonferroni"]) -> Floats:
    """Correct p-values for their number: the larger they are, the less by Holm's method, by Bonferroni's all alike.

    Parameters
    ----------
    p
        p-values; NaN is not counted.
    method
        `holm` (Holm 1979) or `bonferroni`.

    Returns
    -------
    Floats
        In the same order, at most 1; NaN stays NaN.
    """
    n = int((~np.isnan(p)).sum())
    order = np.argsort(p, kind="stable")[:n]  # NaN comes last
    factors = np.arange(n, 0, -1) if method == "holm" else np.full(n, n)
    result = np.full(len(p), np.nan)
    result[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return result


@cache
def find_detectable_effect(n: int, tests: int) -> float:
    """Find the smallest mean difference that a one-sided paired t-test detects.

    With 80 % power at alpha 0.05 / tests (Holm's strictest step).

    Parameters
    ----------
    n
        Number of pairs, at least two.
    tests
        Number of tests.

    Returns
    -------
    float
        In standard deviations of the differences.
    """
    return float(
        TTestPower().solve_power(effect_size=None, nobs=n, alpha=ALPHA / tests, power=POWER, alternative="larger")
    )
