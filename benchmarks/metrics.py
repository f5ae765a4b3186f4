"""All metrics of one model, from files to the table of scores, and against a plain loop over scipy and scikit-learn.

    python -m benchmarks.metrics

The reference is made up, with the layers that scoring reads, as core.reference.build writes them. The loop takes one
condition after the other and one function of scipy or scikit-learn after the other, on arrays that are in memory and
centred already; it runs on a sample of conditions, and its time is scaled to all of them.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import typer
from scipy import special
from scipy.spatial.distance import cdist
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from benchmarks.comparison import CONSOLE, Timing, agreement, machine, show_agreement, show_times, timed
from core.arrays import Bools, Floats
from core.reference.build import frame_by_condition
from core.reference.files import read_reference
from core.rng import generator
from core.scoring.evaluation import Evaluation, score_profiles, select_evaluated
from core.scoring.metrics import CONSTANT, FEWEST_DEGS, METRICS
from core.scoring.scores import write_model_scores
from core.stats.differential_expression import adjust_p_values, mask_degs

TOLERANCE = 1e-9
COVARIATE = "all"
FOLDS = 5
HALF_SEED = 42

Values = dict[str, float]  # metric -> value


class Case(NamedTuple):
    """One condition as the plain loop takes it. x, t: prediction and truth. c, m: control_mean and dataset_mean.

    own: its position among the truths. degs: its DEGs; weights: its DEG weights. All over genes.
    """

    own: int
    x: Floats
    t: Floats
    c: Floats
    m: Floats
    degs: Bools
    weights: Floats


class Candidates(NamedTuple):
    """What the rankings of the plain loop need. kept: the genes that no condition targets; changes: truths - c."""

    truths: Floats
    changes: Floats
    kept: Bools


def write_files(folder: Path, conditions: int, genes: int) -> list[Path]:
    """Write reference/ and a folder of predictions for each fold, in `folder`; returns the latter.

    The first condition was not tested for differential expression, the last has no DEG; predictions are the truth,
    shrunk towards the mean, with noise.
    """
    rng = generator(HALF_SEED, "benchmark profiles")
    names = [f"G{number:05d}" for number in range(genes)]
    labels = [names[number % genes] + ("" if number < genes else f"+X{number}") for number in range(conditions)]
    labels = sorted(labels)
    shape = conditions, genes
    control = rng.gamma(0.5, 0.6, genes)
    means = control + 0.02 * rng.standard_normal((FOLDS, genes))
    strength = rng.gamma(1.0, 1.0, (conditions, 1))
    t = rng.standard_normal(shape)
    t += strength * (rng.random(shape) < 0.1) * rng.standard_normal(shape) * 5
    t[-1] = rng.uniform(-1, 1, genes)
    fold = rng.permutation(np.arange(conditions) % FOLDS)
    truth = np.maximum(means[fold] + 0.05 * t, 0)
    padj = adjust_p_values(special.erfc(np.abs(t) / np.sqrt(2)))
    t[0] = padj[0] = np.nan
    keys = pd.DataFrame({"covariate": COVARIATE, "condition": labels, "n_cells": 200, "test_fold": fold})
    keys["n_degs"] = mask_degs(padj).sum(axis=1)
    reference = folder / "reference"
    reference.mkdir()
    index = pd.Index(names)
    frame_by_condition(keys, {"truth": truth, "t_first": t, "padj_first": padj}, index).write_h5ad(
        reference / "reference.h5ad"
    )
    _negatives(control, means, index).write_h5ad(reference / "negatives.h5ad")
    del t, padj
    folds = []
    for number in range(FOLDS):
        rows = np.flatnonzero(fold == number)
        x = means[number] + 0.6 * (truth[rows] - means[number]) + 0.03 * rng.standard_normal((len(rows), genes))
        folds.append(folder / f"fold_{number}")
        folds[-1].mkdir()
        predicted = frame_by_condition(keys.loc[rows, ["covariate", "condition"]], {}, index)
        predicted.X = x
        predicted.write_h5ad(folds[-1] / "predictions.h5ad")
        (folds[-1] / "unpredicted.json").write_text(json.dumps([]), encoding="utf-8")
    return folds


def _negatives(control: Floats, means: Floats, genes: pd.Index) -> ad.AnnData:
    obs = pd.DataFrame({"covariate": COVARIATE, "kind": "dataset_mean", "fold": np.arange(-1, FOLDS)})
    obs.loc[0, "kind"] = "control_mean"
    obs.index = pd.Index(obs["kind"] + "|" + obs["fold"].astype(str))
    return ad.AnnData(np.vstack([control, means]), obs=obs, var=pd.DataFrame(index=genes))


def plain_profile_values(case: Case) -> Values:
    """All metrics of one condition but the rankings."""
    x, t, w, degs = case.x, case.t, case.weights, case.degs
    weighted, enough = bool(w.sum() > 0), degs.sum() >= FEWEST_DEGS
    values = {
        "mse": mean_squared_error(t, x),
        "mae": mean_absolute_error(t, x),
        "wmse": mean_squared_error(t, x, sample_weight=w) if weighted else np.nan,
    }
    for name, centre in {"deltactrl": case.c, "deltapert": case.m}.items():
        dx, dt = x - centre, t - centre
        values |= {
            f"pearson_{name}": pearsonr(dx, dt).statistic,
            f"pearson_{name}_degs": pearsonr(dx[degs], dt[degs]).statistic if enough else np.nan,
            f"r2_{name}": r2_score(dt, dx),
            f"r2_{name}_degs": r2_score(dt[degs], dx[degs]) if enough else np.nan,
            f"weighted_r2_{name}": r2_score(dt, dx, sample_weight=w) if weighted else np.nan,
            f"weighted_pearson_{name}": _weighted_pearson(dx, dt, w) if weighted else np.nan,
        }
    return values


def _weighted_pearson(x: Floats, t: Floats, w: Floats) -> float:
    covariance = np.cov(x, t, aweights=w)
    return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


def plain_rankings(case: Case, candidates: Candidates) -> Values:
    """Compute nir and pds of one condition, with scipy's distances to all truths."""
    euclidean = cdist(case.x[None], candidates.truths)[0]
    cosine = cdist((case.x - case.c)[None, candidates.kept], candidates.changes, "cosine")[0]
    ties = np.abs(cosine - cosine[case.own]) <= CONSTANT
    farther = np.where(ties, 0.5, cosine > cosine[case.own])
    others = len(euclidean) - 1
    return {
        "nir": float((euclidean > euclidean[case.own]).sum() / others),
        "pds": float((farther.sum() - 0.5) / others),
    }


def plain_weights(t: Floats) -> Floats:
    """Compute the DEG weights of one condition; 0 throughout where it was not tested."""
    if np.isnan(t).any():
        return np.zeros(len(t))
    size = np.abs(t)
    weights: Floats = ((size - size.min()) / (size.max() - size.min())) ** 2
    return weights


def plain_loop(
    profiles: Floats, evaluation: Evaluation, rows: list[int], values: Callable[[Case], Values]
) -> list[Values]:
    """`values` of the conditions `rows`, one after the other."""
    found = []
    for row in rows:
        case = Case(
            row,
            profiles[row],
            evaluation.truth[row],
            evaluation.control_mean[row],
            evaluation.dataset_mean[row],
            evaluation.padj[row] < 0.05,
            plain_weights(evaluation.t[row]),
        )
        found.append(values(case))
    return found


def candidates_of(evaluation: Evaluation) -> Candidates:
    """Centre the truths of all conditions, once."""
    targets = {gene for label in evaluation.keys["condition"] for gene in label.split("+")}
    kept = ~evaluation.genes.isin(targets)
    return Candidates(evaluation.truth, (evaluation.truth - evaluation.control_mean)[:, kept], kept)


def main(
    conditions: Annotated[int, typer.Option(min=12, help="Number of conditions.")] = 2_500,
    genes: Annotated[int, typer.Option(min=50, help="Number of genes.")] = 10_000,
    sample: Annotated[int, typer.Option(min=2, help="Conditions of the plain loop.")] = 25,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of ours, of which the fastest counts.")] = 3,
) -> None:
    """Time scoring from files and its arithmetic; exit 1 where the plain loop's values differ by more than 1e-9."""
    CONSOLE.print(machine("anndata", "scikit-learn"))
    CONSOLE.print(f"{conditions:,} conditions, {genes:,} genes, {len(METRICS)} metrics, float64\n")
    with TemporaryDirectory() as name:
        folder = Path(name)
        folds = write_files(folder, conditions, genes)
        reference = folder / "reference"
        from_files, _ = timed(lambda: write_model_scores(folds, "model", 0, reference, HALF_SEED, folder), repeats)
        written = pd.read_parquet(folder / "scores.parquet")
        evaluation = select_evaluated(*read_reference(reference))
        predictions = ad.concat([ad.read_h5ad(fold / "predictions.h5ad") for fold in folds])
    order = predictions.obs["condition"].argsort().to_numpy()
    profiles, keys = np.asarray(predictions.X)[order], predictions.obs.iloc[order]
    del predictions
    rankings = [metric for metric in METRICS if metric.ranking]
    others = [metric for metric in METRICS if not metric.ranking]
    of_profiles, _ = timed(lambda: score_profiles(profiles, keys, evaluation, others), repeats)
    of_rankings, _ = timed(lambda: score_profiles(profiles, keys, evaluation, rankings), repeats)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)

    rows = [int(row) for row in np.unique(np.linspace(0, conditions - 1, sample).astype(int))]
    candidates = candidates_of(evaluation)
    plain_loop(profiles, evaluation, rows[:1], plain_profile_values)
    loop_profiles, first = timed(lambda: plain_loop(profiles, evaluation, rows, plain_profile_values))
    loop_rankings, second = timed(
        lambda: plain_loop(profiles, evaluation, rows, lambda case: plain_rankings(case, candidates))
    )
    scale = conditions / len(rows)
    loop_profiles, loop_rankings = loop_profiles * scale, loop_rankings * scale
    show_times(
        "From reference.h5ad and predictions.h5ad to scores.parquet",
        [Timing("calipert, one half split", from_files, aim="<= 5 s on 2 cores")],
    )
    show_times(
        f"The arithmetic alone (the loop: {len(rows)} conditions, scaled)",
        [
            Timing("loop, without nir and pds", loop_profiles),
            Timing("calipert, the same", of_profiles, loop_profiles / of_profiles),
            Timing("loop, nir and pds", loop_rankings),
            Timing("calipert, the same", of_rankings, loop_rankings / of_rankings),
            Timing("loop, all metrics", loop_profiles + loop_rankings),
            Timing(
                "calipert, the same",
                of_profiles + of_rankings,
                (loop_profiles + loop_rankings) / (of_profiles + of_rankings),
                ">= 100x",
            ),
        ],
    )
    CONSOLE.print(f"Largest memory of the process until then: {memory:.1f} GiB\n")
    loop = pd.DataFrame([a | b for a, b in zip(first, second, strict=True)])
    wide = written.pivot(index="condition", columns="metric", values="value").loc[
        evaluation.keys["condition"].iloc[rows]
    ]
    show_agreement([agreement(m.name, wide[m.name], loop[m.name], TOLERANCE, "absolute") for m in METRICS])


if __name__ == "__main__":
    typer.run(main)
