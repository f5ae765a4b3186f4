"""Pairwise E-distances against `scperturb.edist` (PyPI scperturb, Peidli et al. 2024) on the same coordinates.

    python -m benchmarks.edistance

The peer sums over all pairs of cells; ours takes means and variances of the groups. The peer's time grows with the
square of the number of conditions: at the larger size it is left out, ours runs alone.
"""

from __future__ import annotations

from typing import Annotated

import anndata as ad
import numpy as np
import pandas as pd

try:
    import scperturb
except ModuleNotFoundError:
    raise SystemExit("scperturb is not installed: pip install -e '.[bench]' -c constraints.txt") from None
import typer

from benchmarks.comparison import CONSOLE, Timing, agreement, machine, show_agreement, show_times, timed
from core.arrays import Floats, Ints
from core.rng import generator
from core.stats.edistance import COMPONENTS, measure_edistances

TOLERANCE = 1e-6


def coordinates(conditions: int, cells: int) -> tuple[Floats, Ints]:
    """(cells x 50 coordinates, condition of each cell): falling variances, conditions about their own means."""
    rng = generator(42, "benchmark coordinates", "", str(conditions))
    codes = np.sort(np.concatenate([np.repeat(np.arange(conditions), 2), rng.integers(conditions, size=cells)]))
    sd = 4.0 / np.sqrt(np.arange(1, COMPONENTS + 1))
    means = 0.3 * rng.gamma(1.0, 1.0, (conditions, 1)) * rng.standard_normal((conditions, COMPONENTS)) * sd
    return means[codes] + rng.standard_normal((len(codes), COMPONENTS)) * sd, codes


def peers(x: Floats, codes: Ints, names: list[str]) -> Floats:
    """Compute the peer's E-distances, in the order of `names`."""
    obs = pd.DataFrame({"perturbation": np.array(names)[codes]}, index=[f"cell{i}" for i in range(len(codes))])
    cells = ad.AnnData(obs=obs, obsm={"X_pca": x})
    table: pd.DataFrame = scperturb.edist(cells, obs_key="perturbation", verbose=False)
    return np.asarray(table.loc[names, names], dtype=np.float64)


def main(
    conditions: Annotated[int, typer.Option(min=3, help="Number of conditions, for both.")] = 300,
    cells: Annotated[int, typer.Option(min=6, help="Cells of a condition, on average.")] = 100,
    more_conditions: Annotated[int, typer.Option(min=3, help="Number of conditions, for ours alone.")] = 2_500,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of ours, of which the fastest counts.")] = 5,
) -> None:
    """Compare with scperturb.edist; exit 1 where E-distances differ by more than 1e-6 relative."""
    CONSOLE.print(machine("anndata", "scikit-learn", "scperturb"))
    x, codes = coordinates(conditions, conditions * (cells - 2))
    names = [f"c{number:04d}" for number in range(conditions)]
    CONSOLE.print(f"{conditions:,} conditions, {len(x):,} cells, {COMPONENTS} coordinates\n")
    seconds, table = timed(lambda: measure_edistances(x, codes, names), repeats)
    peer, expected = timed(lambda: peers(x, codes, names))
    many, many_codes = coordinates(more_conditions, more_conditions * (cells - 2))
    many_names = [f"c{number:04d}" for number in range(more_conditions)]
    more, _ = timed(lambda: measure_edistances(many, many_codes, many_names), repeats)
    show_times(
        "Times, all pairs of conditions",
        [
            Timing("scperturb.edist", peer),
            Timing("calipert", seconds, peer / seconds, ">= 500x"),
            Timing(f"calipert, {more_conditions:,} conditions, {len(many):,} cells (peer left out)", more),
        ],
    )
    show_agreement([agreement("E-distances", table, expected, TOLERANCE, "relative")])


if __name__ == "__main__":
    typer.run(main)
