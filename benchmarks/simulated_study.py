"""What each metric makes of planted models and of few or many cells; prints the tables of docs/simulated-study.md.

    python benchmarks/simulated_study.py

Screens are those of core.simulate at its defaults but for the number of cells per condition, with seeds fixed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd

from blocks.config.catalog import open_catalog
from core.prepare.cells import read_cells, write_cells
from core.reference.build import build_negatives, build_reference
from core.reference.cell_sums import sum_cells
from core.rng import generator
from core.scoring.calibration import build_calibration, dynamic_range_fraction
from core.scoring.evaluation import score_controls, score_profiles, select_evaluated
from core.scoring.metrics import BY_NAME, METRICS, Metric
from core.simulate import Simulation, SimulationSettings, compute_planted_profiles, simulate

SEEDS = (0, 1, 2, 3, 4)
CELLS = (8, 16, 30, 100, 300)


class Model(NamedTuple):
    """A model that knows the share `effect` of every planted log fold change, plus independent normal noise.

    noise: its standard deviation per gene, in those of the planted profiles between conditions.
    """

    effect: float
    noise: float


MODELS = {
    "right": Model(1.0, 0.0),
    "half": Model(0.5, 0.0),
    "nothing": Model(0.0, 0.0),
    "noisy": Model(1.0, 0.5),
    "noisier": Model(1.0, 1.0),
}
# (better, worse)
PAIRS = (("right", "half"), ("half", "nothing"), ("right", "noisy"), ("noisy", "noisier"))
LETTERS = {"calibrated": "c", "inconclusive": "i", "miscalibrated": "m", "none": "n"}


class Screen(NamedTuple):
    """A simulated screen, prepared as any other data set; the seed of its simulation is that of its draws, too."""

    seed: int
    simulation: Simulation
    reference: ad.AnnData
    negatives: ad.AnnData


def screen(settings: SimulationSettings) -> Screen:
    """Simulate and prepare: as the demo data set, but no condition or cell is dropped for having few cells or genes."""
    simulation = simulate(settings)
    changes = {"seed": settings.seed, "min_cells_per_condition": 4, "min_genes_per_cell": 0}
    spec = open_catalog().dataset("demo").model_copy(update=changes)
    with TemporaryDirectory() as folder:
        simulation.cells.write_h5ad(Path(folder) / "raw.h5ad")
        write_cells(Path(folder) / "raw.h5ad", spec, {}, Path(folder))
        cells = read_cells(Path(folder))
        sums = sum_cells(cells, {spec.seed: cells.obs["half"]}, spec.seed)
    negatives = build_negatives(sums)
    return Screen(settings.seed, simulation, build_reference(sums, negatives, spec.seed), negatives)


def planted(of: Screen, model: Model, rows: Sequence[str], genes: pd.Index) -> np.ndarray:
    """Profiles of a planted model: rows (named as in the simulation's truth) x genes, log1p."""
    profiles = (compute_planted_profiles(of.simulation, effect).to_df() for effect in (1.0, model.effect))
    perfect, kept = (table.loc[rows, genes] for table in profiles)
    noise = generator(of.seed, "study noise", "", str(model)).standard_normal(perfect.shape)
    return np.asarray(kept + model.noise * perfect.to_numpy().std(axis=0) * noise)


def model_means(of: Screen, metrics: Sequence[Metric] = METRICS) -> pd.DataFrame:
    """Mean of each metric over the test conditions, as in the leaderboard: metric x planted model."""
    evaluation = select_evaluated(of.reference, of.negatives)
    rows = list(evaluation.keys["covariate"] + "|" + evaluation.keys["condition"])
    means = {}
    for name, model in MODELS.items():
        scores = score_profiles(planted(of, model, rows, evaluation.genes), evaluation.keys, evaluation, metrics)
        means[name] = scores.groupby("metric", sort=False)["value"].mean()
    return pd.DataFrame(means)


def right_order(means: pd.DataFrame) -> pd.DataFrame:
    """Compare by metric x pair: 1 where the better model has the better mean, 0 where not, NaN where there is none."""
    direction = means.index.map(lambda name: 1.0 if BY_NAME[name].higher_is_better else -1.0)
    margins = {f"{a} > {b}": direction * (means[a] - means[b]) for a, b in PAIRS}
    return pd.DataFrame({pair: (margin > 0).where(margin.notna()).astype(float) for pair, margin in margins.items()})


def calibration(of: Screen, metrics: Sequence[Metric] = METRICS) -> pd.DataFrame:
    """Select the quoted calibration rows (interpolated duplicate against the metric's negative control)."""
    scores = score_controls(of.reference, of.negatives).assign(half_seed=of.seed)
    table = build_calibration(scores[scores["metric"].isin([metric.name for metric in metrics])], of.seed)
    return table[table["variant"] == "drf_interpolated"].set_index("metric")


def range_by_effect(of: Screen, metrics: Iterable[str]) -> pd.DataFrame:
    """Mean DRF (interpolated) of the conditions with and without a planted effect: metric x (`effect`, `none`)."""
    wide = score_controls(of.reference, of.negatives).pivot_table(
        index=["metric", "covariate", "condition"], columns="model", values="value", dropna=False
    )
    strength = of.simulation.truth.obs.set_index(["covariate", "condition"])["strength"]
    rows = {}
    for name in metrics:
        one = wide.loc[name]
        positive, negative = one["interpolated_duplicate"], one[BY_NAME[name].negative_control]
        drf = pd.Series(dynamic_range_fraction(positive.to_numpy(), negative.to_numpy(), BY_NAME[name]), one.index)
        rows[name] = drf.groupby(np.where(strength[one.index] > 0, "effect", "none")).mean()
    return pd.DataFrame(rows).T


def study(settings: SimulationSettings) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """For all seeds and cells (index: cells, seed, metric): right_order, calibration, range_by_effect."""
    orders, calibrations, effects = {}, {}, {}
    for cells in CELLS:
        for seed in SEEDS:
            of = screen(settings.model_copy(update={"seed": seed, "cells_per_condition": cells}))
            orders[cells, seed] = right_order(model_means(of))
            calibrations[cells, seed] = calibration(of)
            effects[cells, seed] = range_by_effect(of, BY_NAME)
    names = ["cells", "seed", "metric"]
    return pd.concat(orders, names=names), pd.concat(calibrations, names=names), pd.concat(effects, names=names)


def markdown(cells: pd.DataFrame, head: str) -> str:
    """Write a table of text; the index is its first column."""
    lines = [[head, *map(str, cells.columns)], ["---"] * (1 + cells.shape[1])]
    lines += [[f"`{name}`", *row] for name, row in zip(cells.index, cells.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_cells(table: pd.DataFrame, column: str, text: Callable[[pd.Series], str]) -> pd.DataFrame:
    """Arrange metric x cells of `text` of each cell's five values."""
    wide = table[column].groupby(level=["metric", "cells"]).agg(text).unstack("cells")
    return wide.reindex(index=list(BY_NAME), columns=list(CELLS))


def seeds_right(values: pd.Series) -> str:
    """`5`, or `2/3` where only three seeds have a value."""
    known = values.dropna()
    return "–" if known.empty else f"{known.sum():.0f}" + (f"/{len(known)}" if len(known) < len(values) else "")


def mean_of_seeds(values: pd.Series) -> str:
    """Write the mean over seeds."""
    return "–" if values.isna().all() else f"{values.mean():.2f}".replace("-", "−")


def verdicts(values: pd.Series) -> str:
    """Write the verdicts of the seeds."""
    counts = values.map(LETTERS).value_counts()
    return " ".join(f"{counts[letter]}{letter}" for letter in LETTERS.values() if letter in counts)


def main() -> None:
    """Run the study and print its tables."""
    orders, calibrations, effects = study(SimulationSettings())
    print(f"Planted models: seeds of {len(SEEDS)} in which the better one has the better mean, at {CELLS} cells\n")
    ordered = pd.DataFrame({pair: by_cells(orders, pair, seeds_right).agg(" ".join, axis=1) for pair in orders})
    print(markdown(ordered, "metric"))
    print(f"\nMean DRF over {len(SEEDS)} seeds by median cells per condition\n")
    print(markdown(by_cells(calibrations, "drf", mean_of_seeds), "metric"))
    print("\nVerdicts (c calibrated, i inconclusive, m miscalibrated, n none)\n")
    print(markdown(by_cells(calibrations, "verdict", verdicts), "metric"))
    print("\nMean DRF of the perturbations with an effect / without\n")
    parts = [by_cells(effects, column, mean_of_seeds) for column in ("effect", "none")]
    print(markdown(parts[0] + " / " + parts[1], "metric"))


if __name__ == "__main__":
    main()
