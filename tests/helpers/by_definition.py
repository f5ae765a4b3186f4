"""The metrics once more, one condition at a time as docs/science.md section 4 writes them, and made-up test sets."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import pearsonr
from sklearn.metrics import mean_squared_error, r2_score

from core.scoring.evaluation import Evaluation


def weights(t: np.ndarray) -> np.ndarray:
    """DEG weights of one condition from its t statistics (docs/science.md, section 2)."""
    size = np.abs(t)
    with np.errstate(invalid="ignore", divide="ignore"):
        size = (size - size.min()) / (size.max() - size.min())
    return np.array([0.0 if np.isnan(w) else w**2 for w in size])


def constant(values: np.ndarray) -> bool:
    return len(values) == 0 or values.max() - values.min() < 1e-12


def pearson(x: np.ndarray, t: np.ndarray) -> float:
    return np.nan if constant(x) or constant(t) else pearsonr(x, t).statistic


def weighted_pearson(x: np.ndarray, t: np.ndarray, w: np.ndarray) -> float:
    if constant(x[w > 0]) or constant(t[w > 0]):
        return np.nan
    covariance = np.cov(x, t, aweights=w)
    return covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])


def r2(x: np.ndarray, t: np.ndarray, w: np.ndarray | None = None) -> float:
    used = slice(None) if w is None else w > 0
    return np.nan if constant(t[used]) else r2_score(t, x, sample_weight=w)


def of_profile(
    x: np.ndarray, t: np.ndarray, c: np.ndarray, m: np.ndarray, statistic: np.ndarray, padj: np.ndarray
) -> dict[str, float]:
    """All metrics of one condition but the rankings. statistic, padj: DE of the first half."""
    w = weights(statistic)
    weighted = w.sum() > 0
    degs = np.array([p < 0.05 for p in padj])
    enough = degs.sum() >= 3
    values = {
        "mse": mean_squared_error(t, x),
        "wmse": mean_squared_error(t, x, sample_weight=w) if weighted else np.nan,
        "mae": np.mean(np.abs(x - t)),
    }
    for name, centre in {"deltactrl": c, "deltapert": m}.items():
        dx, dt = x - centre, t - centre
        values |= {
            f"pearson_{name}": pearson(dx, dt),
            f"pearson_{name}_degs": pearson(dx[degs], dt[degs]) if enough else np.nan,
            f"r2_{name}": r2(dx, dt),
            f"r2_{name}_degs": r2(dx[degs], dt[degs]) if enough else np.nan,
            f"weighted_r2_{name}": r2(dx, dt, w) if weighted else np.nan,
            f"weighted_pearson_{name}": weighted_pearson(dx, dt, w) if weighted else np.nan,
        }
    return values


def nir(x: np.ndarray, own: str, truths: dict[str, np.ndarray]) -> float:
    """truths: of the covariate's evaluated conditions. NaN without another one."""
    mine = np.linalg.norm(x - truths[own])
    farther = [np.linalg.norm(x - truth) > mine for name, truth in truths.items() if name != own]
    return float(np.mean(farther)) if farther else np.nan


def pds(x: np.ndarray, own: str, truths: dict[str, np.ndarray], c: np.ndarray, genes: list[str]) -> float:
    targets = {gene for name in truths for gene in name.split("+")}
    kept = np.array([gene not in targets for gene in genes])
    if np.abs((x - c)[kept]).max(initial=0) < 1e-12:
        return np.nan

    def distance(truth: np.ndarray) -> float:
        a, b = (x - c)[kept], (truth - c)[kept]
        return 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    mine = distance(truths[own])
    others = np.array([distance(truth) for name, truth in truths.items() if name != own])
    ties = np.isclose(others, mine, rtol=0, atol=1e-12)
    return float(np.mean(np.where(ties, 0.5, others > mine))) if len(others) else np.nan


def scores(profiles: np.ndarray, keys: pd.DataFrame, evaluation: Evaluation) -> pd.Series:
    """Values by (covariate, condition, metric) of the profiles (rows as in keys)."""

    def pairs(table: pd.DataFrame) -> list[tuple[str, str]]:
        return list(zip(table["covariate"], table["condition"], strict=True))

    place = {key: row for row, key in enumerate(pairs(evaluation.keys))}
    values: dict[tuple[str, str, str], float] = {}
    for x, (covariate, condition) in zip(profiles, pairs(keys), strict=True):
        row = place[covariate, condition]
        c, m = evaluation.control_mean[row], evaluation.dataset_mean[row]
        truths = {name: evaluation.truth[r] for (line, name), r in place.items() if line == covariate}
        of_condition = of_profile(x, evaluation.truth[row], c, m, evaluation.t[row], evaluation.padj[row])
        of_condition["nir"] = nir(x, condition, truths)
        of_condition["pds"] = pds(x, condition, truths, c, list(evaluation.genes))
        values |= {(covariate, condition, metric): value for metric, value in of_condition.items()}
    return pd.Series(values).rename_axis(["covariate", "condition", "metric"])


def evaluation(
    seed: int = 0, conditions: int = 12, genes: int = 40, covariates: tuple[str, ...] = ("all",)
) -> Evaluation:
    """A made-up evaluated set: profiles, DE results and the two folds at random."""
    rng = np.random.default_rng(seed)
    names = [f"G{number:03d}" for number in range(genes)]
    # Half of the targets are measured, and one condition is a combination.
    labels = [f"G{number:03d}" for number in range(genes - conditions // 2, genes + (conditions + 1) // 2)]
    labels = sorted([f"G000+{labels[0]}", *labels[1:]])
    folds = rng.integers(2, size=conditions)
    keys = pd.DataFrame(
        [(covariate, label, fold) for covariate in covariates for label, fold in zip(labels, folds, strict=True)],
        columns=["covariate", "condition", "test_fold"],
    )
    base = {covariate: rng.gamma(1.0, 1.0, genes) for covariate in covariates}
    means = {(line, fold): base[line] + 0.2 * rng.standard_normal(genes) for line in covariates for fold in (0, 1)}
    control = np.array([base[line] for line in keys["covariate"]])
    dataset = np.array([means[key] for key in zip(keys["covariate"], keys["test_fold"], strict=True)])
    truth = dataset + 0.5 * rng.standard_normal(dataset.shape)
    t = rng.standard_normal(truth.shape) * rng.gamma(2.0, 1.0, (len(keys), 1))
    padj = rng.random(truth.shape) ** 2
    # Two DEGs, none, and no DE results at all.
    padj[0], padj[0, :2] = 0.5, 0.01
    padj[1] = 1.0
    t[2], padj[2] = np.nan, np.nan
    keys["n_degs"] = (padj < 0.05).sum(axis=1)
    return Evaluation(keys, pd.Index(names), truth, control, dataset, t, padj)
