"""Models against controls, paired over conditions (`docs/science.md`, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.power import TTestPower

from core.arrays import Bools, Floats
from core.reference.controls import CONTROLS, name_matched_control
from core.scoring.metrics import BY_NAME, CONSTANT
from core.stats.bootstrap import bootstrap_means, interval

RESAMPLES = 10_000
ALPHA = 0.05
POWER = 0.8
FEWEST_PAIRS = 2
EXACT_PAIRS = 50
FEWEST_FOR_INTERVAL = 5  # the bootstrap of fewer pairs says next to nothing; of a single one, a point

# Strata of effect size by the number of DEGs: (name, from, to), both inclusive.
STRATA = (("all", 0, np.inf), ("0", 0, 0), ("1-9", 1, 9), ("10-99", 10, 99), (">=100", 100, np.inf))


def compare(scores: pd.DataFrame, n_degs: pd.Series, seed: int, matched: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every model against every control it shares conditions with; columns in `docs/outputs.md`.

    scores: long table of one half split (model, covariate, condition, metric, value). n_degs: number of DEGs by
    (covariate, condition). matched: for models that lack genes, the scores of the controls on these models' genes.
    mean_difference is positive where the model is better; tests are one-sided for that. Holm and Bonferroni run
    over models x metrics, for each control and stratum. NaN: fewer than two pairs, or no variation; an interval
    needs five pairs.
    detectable_difference: the mean difference that the paired t-test finds with 80 % power at alpha 0.05 divided
    by the number of tests (Holm's first step).
    """
    names = {control.name for control in CONTROLS}
    controls = [c.name for c in CONTROLS if c.name in set(scores["model"])]
    models = sorted(set(scores["model"].astype(str)) - names)
    metrics = [m for m in BY_NAME if m in set(scores["metric"])]
    conditions = pd.MultiIndex.from_frame(
        scores[["covariate", "condition"]].drop_duplicates().sort_values(["covariate", "condition"])
    )
    everything = scores if matched is None else pd.concat([scores, matched], ignore_index=True)
    wide = (
        everything.set_index(["covariate", "condition", "metric", "model"])["value"]
        .unstack(["metric", "model"])
        .reindex(conditions)
    )
    strata = list(_strata(n_degs.reindex(conditions).to_numpy(np.float64)))
    tables = []
    for control in controls:
        pairs = [(model, metric) for model in models for metric in metrics]
        if not pairs:
            continue
        differences = np.column_stack(
            [
                (wide[metric, model] - wide[metric, _control_of(model, control, wide, metric)]).to_numpy(np.float64)
                * (1.0 if BY_NAME[metric].higher_is_better else -1.0)
                for model, metric in pairs
            ]
        )
        # What differs by rounding alone is the same: it would be significant where it has a direction.
        differences[np.abs(differences) <= CONSTANT] = 0.0
        for stratum, rows in strata:
            if rows.any():
                table = pd.DataFrame(pairs, columns=["model", "metric"]).assign(control=control, stratum=stratum)
                tables.append(table.join(_tests(differences[rows], seed)))
    columns = ["model", "control", "metric", "stratum", "n", "mean_difference", "low", "high"]
    columns += [f"{test}_{p}" for test in ("t", "wilcoxon") for p in ("p", "holm", "bonferroni")]
    columns += ["detectable_difference"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _control_of(model: str, control: str, wide: pd.DataFrame, metric: str) -> str:
    matched = name_matched_control(control, model)
    return matched if (metric, matched) in wide else control


def _tests(differences: Floats, seed: int) -> pd.DataFrame:
    """One row per column of differences (pairs x comparisons; NaN: not a pair)."""
    low, high = interval(bootstrap_means(differences, RESAMPLES, seed, "comparison"))
    few = (~np.isnan(differences)).sum(axis=0) < FEWEST_FOR_INTERVAL
    low[few] = high[few] = np.nan
    columns = [column[~np.isnan(column)] for column in differences.T]
    testable = [len(d) >= FEWEST_PAIRS and np.ptp(d) > 0 for d in columns]
    table = pd.DataFrame(
        {
            "n": [len(d) for d in columns],
            "mean_difference": [d.mean() if len(d) else np.nan for d in columns],
            "low": low,
            "high": high,
            "t_p": [
                stats.ttest_1samp(d, 0.0, alternative="greater").pvalue if ok else np.nan
                for d, ok in zip(columns, testable, strict=True)
            ],
            "wilcoxon_p": [signed_rank_p(d) if ok else np.nan for d, ok in zip(columns, testable, strict=True)],
        }
    )
    for test in ("t", "wilcoxon"):
        p = table[f"{test}_p"].to_numpy()
        table[f"{test}_holm"] = holm(p)
        table[f"{test}_bonferroni"] = bonferroni(p)
    tests = max(1, sum(testable))
    table["detectable_difference"] = [
        detectable_effect(len(d), tests) * d.std(ddof=1) if ok else np.nan
        for d, ok in zip(columns, testable, strict=True)
    ]
    return table


def signed_rank_p(differences: Floats) -> float:
    """One-sided Wilcoxon signed-rank p that the differences lie above 0.

    Exact for up to 50 differences without ties and zeros, else by the normal approximation with scipy's handling of
    both; a permutation test of every small tied stratum would take minutes.
    """
    sizes = np.abs(differences)
    exact = len(sizes) <= EXACT_PAIRS and len(np.unique(sizes)) == len(sizes) and sizes.min() > 0
    method = "exact" if exact else "asymptotic"
    return float(stats.wilcoxon(differences, alternative="greater", method=method).pvalue)


def holm(p: Floats) -> Floats:
    """p-values corrected for their number (Holm 1979); NaN stays NaN and is not counted."""
    n = int((~np.isnan(p)).sum())
    order = np.argsort(p, kind="stable")[:n]  # NaN comes last
    result = np.full(len(p), np.nan)
    result[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(n, 0, -1)), 1.0)
    return result


def bonferroni(p: Floats) -> Floats:
    """p-values times their number, at most 1; NaN stays NaN and is not counted."""
    return np.asarray(np.minimum(p * (~np.isnan(p)).sum(), 1.0))


@cache
def detectable_effect(n: int, tests: int) -> float:
    """Smallest mean difference, in standard deviations, that a one-sided paired t-test of n pairs detects.

    80 % power at alpha 0.05 / tests (Holm's strictest step).
    """
    return float(
        TTestPower().solve_power(effect_size=None, nobs=n, alpha=ALPHA / tests, power=POWER, alternative="larger")
    )


def _strata(n_degs: Floats) -> Iterator[tuple[str, Bools]]:
    for name, low, high in STRATA:
        yield name, (n_degs >= low) & (n_degs <= high)
