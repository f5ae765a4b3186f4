"""Calibration of the metrics on one file, against `scperteval calibrate` (PyPI scperteval, Schäfer et al. 2026).

    python -m benchmarks.calibration [--peer PATH]

Both commands run as a user would run them, imports included, on one simulated screen (core.simulate, log1p of counts
per 10,000, stored as float64, because the peer takes means in the type of the matrix). The peer computes the fifteen
metrics that both have, for one half split and two controls, with as many threads as there are cores. Ours computes all
of its own for every control, with intervals. --all-protocols adds the peer as it runs by default: with distances
between populations of cells and the recovery of DEGs, which ours does not calibrate, and which take most of its time.

Values are compared on the same cells with obs columns that only we read: the halves that the peer draws (its seed 42),
and one fold for each condition, so that our dataset_mean is the peer's mean of all other conditions.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import typer

from benchmarks.comparison import (
    CONSOLE,
    Agreement,
    Timing,
    agreement,
    machine,
    show,
    show_agreement,
    show_times,
    timed,
)
from core.scoring.calibration import dynamic_range_fraction
from core.scoring.file_calibration import FileOptions, calibrate_file
from core.scoring.metrics import BY_NAME
from core.simulate import SimulationSettings, simulate

TOLERANCE = 1e-9
SEED = 42
AIM = ">= 20x"
CHECKED = 100  # conditions whose values are compared
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Shared(NamedTuple):
    """A metric of ours, the peer's protocol of the same formula, and what differs in it (a key of DIFFERENCES)."""

    name: str
    protocol: str
    differs: str = ""


DIFFERENCES = {
    "control": "its negative control is the mean of all conditions, the own one included; ours is dataset_mean",
    "test": "its weights and DEGs are from a test against the cells of both halves of all other conditions (a sample "
    "of 8,192 cells) with the number of these; ours takes the other conditions' cells of the same half, and the "
    "group's own number (scanpy's t-test_overestim_var)",
}
METRICS = (
    Shared("mse", "mse"),
    Shared("pearson_deltactrl", "pearson_ctrl"),
    Shared("r2_deltactrl", "r2_ctrl"),
    Shared("pearson_deltapert", "pearson_pert"),
    Shared("r2_deltapert", "r2_pert"),
    Shared("nir", "nir", "control"),
    Shared("wmse", "wmse_exp2", "test"),
    Shared("weighted_pearson_deltactrl", "weighted_pearson_ctrl_exp2", "test"),
    Shared("weighted_pearson_deltapert", "weighted_pearson_pert_exp2", "test"),
    Shared("weighted_r2_deltactrl", "weighted_r2_ctrl_exp2", "test"),
    Shared("weighted_r2_deltapert", "weighted_r2_pert_exp2", "test"),
    Shared("pearson_deltactrl_degs", "pearson_ctrl_degs_padj=0.05", "test"),
    Shared("pearson_deltapert_degs", "pearson_pert_degs_padj=0.05", "test"),
    Shared("r2_deltactrl_degs", "r2_ctrl_degs_padj=0.05", "test"),
    Shared("r2_deltapert_degs", "r2_pert_degs_padj=0.05", "test"),
)
COMPARED = [shared for shared in METRICS if shared.differs != "test"]


def screen(conditions: int, cells: int, genes: int) -> ad.AnnData:
    """Simulate a screen in log1p of counts per 10,000, X float64; obs `condition`."""
    settings = SimulationSettings(
        singles=conditions, cells_per_condition=cells, genes=genes, control_cells=10 * cells, cells_per_condition_sd=0.1
    )
    raw = simulate(settings).cells
    data = ad.AnnData(raw.X, obs=raw.obs[["perturbation"]].rename(columns={"perturbation": "condition"}), var=raw.var)
    sc.pp.normalize_total(data, target_sum=10_000)
    sc.pp.log1p(data)
    data.X = data.X.astype(np.float64)
    return data


def first_conditions(data: ad.AnnData) -> ad.AnnData:
    """Choose the cells whose values are compared; with one fold per condition there cannot be many."""
    labels = data.obs["condition"].astype(str)
    chosen = sorted(set(labels) - {"control"})[:CHECKED]
    return data[labels.isin([*chosen, "control"]).to_numpy()].copy()


def with_the_peers_halves(data: ad.AnnData) -> ad.AnnData:
    """Our columns beside it: the halves that the peer draws, and a fold for each condition, which alone is test."""
    labels = data.obs["condition"].astype(str).to_numpy()
    rng = np.random.default_rng(SEED)
    half = np.full(len(labels), "first_half", dtype=object)
    half[np.flatnonzero(labels == "control")[1::2]] = "second_half"
    conditions = np.unique(labels[labels != "control"])
    for condition in conditions:
        rows = np.flatnonzero(labels == condition)
        rng.shuffle(rows)
        half[rows[len(rows) // 2 :]] = "second_half"
    folds = {
        f"fold_{number}": pd.Categorical.from_codes((labels == condition).astype(int), ["train", "test"])
        for number, condition in enumerate(conditions)
    }
    obs = pd.DataFrame({"condition": labels, "covariate": "all", "half": half, **folds}, index=data.obs_names)
    return ad.AnnData(data.X, obs=obs, var=data.var)


def run(command: Sequence[str | Path]) -> None:
    """Run a command in the environment as it was before core set the threads of BLAS; output only if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in THREADS}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout}\n{done.stderr}")


def run_peer(peer: Path, file: Path, folder: Path, protocols: str, positive: str) -> pd.DataFrame:
    """Compute the peer's table: one row per condition and protocol, with the values of both controls and the DRF."""
    options = {
        "--protocols": protocols,
        "--positive": positive,
        "--perturbation-key": "condition",
        "--min-cells": "4",
        "--seed": str(SEED),
        "--workers": str(os.cpu_count()),
    }
    with TemporaryDirectory(dir=folder) as out:
        options["--out-dir"] = out
        run([peer, "calibrate", file, "--quiet", *(text for option in options.items() for text in option)])
        (table,) = Path(out).glob("*__drf.csv")
        return pd.read_csv(table)


def run_ours(file: Path, folder: Path, half_seeds: int) -> None:
    """`calipert calibrate` on the file."""
    run([sys.executable, "-m", "flows.cli.main", "calibrate", file, "--out", folder, "--half-seeds", str(half_seeds)])


def compared(scores: pd.DataFrame, peers: pd.DataFrame) -> list[Agreement]:
    """Values of the duplicate, the negative control and the DRF between them, as far as both define them alike."""
    wide = scores.set_index(["metric", "condition", "model"])["value"].unstack("model")
    found = []
    for shared in COMPARED:
        metric, mine = BY_NAME[shared.name], wide.loc[shared.name]
        theirs = peers[peers["protocol"] == shared.protocol].set_index("perturbation").loc[mine.index]
        positive, negative = mine["technical_duplicate"].to_numpy(), mine[metric.negative_control].to_numpy()
        values = {"technical_duplicate": (positive, "raw_positive")}
        if not shared.differs:
            drf = dynamic_range_fraction(positive, negative, metric)
            values |= {metric.negative_control: (negative, "raw_negative"), "DRF": (drf, "drf")}
        for what, (own, column) in values.items():
            found.append(agreement(f"{shared.name}: {what}", own, theirs[column], TOLERANCE, "absolute"))
    return found


def show_quoted(scores: pd.DataFrame, peers: pd.DataFrame) -> None:
    """Print the mean DRF of the interpolated duplicates of both on the same halves, and what differs between them."""
    wide = scores.set_index(["metric", "condition", "model"])["value"].unstack("model")
    theirs = peers.groupby("protocol")["drf"].mean()
    rows = []
    for shared in METRICS:
        metric, of_metric = BY_NAME[shared.name], wide.loc[shared.name]
        positive, negative = of_metric["interpolated_duplicate"], of_metric[metric.negative_control]
        ours = pd.Series(dynamic_range_fraction(positive.to_numpy(), negative.to_numpy(), metric)).mean()
        rows.append((shared.name, f"{ours:.3f}", f"{theirs[shared.protocol]:.3f}", shared.differs))
    show("Mean DRF of the interpolated duplicate, same halves", ("", "calipert", "scperteval", "differs by"), rows)
    CONSOLE.print("In all of these the adjusted p-values in the duplicate are from different tests, too.")
    for name, text in DIFFERENCES.items():
        CONSOLE.print(f"{name}: {text}")
    CONSOLE.print()


def main(
    conditions: Annotated[int, typer.Option(min=12, help="Number of conditions.")] = 150,
    cells: Annotated[int, typer.Option(min=16, help="Median cells of a condition.")] = 100,
    genes: Annotated[int, typer.Option(min=50, help="Number of genes.")] = 5_000,
    peer: Annotated[Path | None, typer.Option(help="The peer's executable; by default this environment's.")] = None,
    all_protocols: Annotated[
        bool, typer.Option("--all-protocols", help="Run the peer with all of its protocols, too: many minutes.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of both, of which the fastest count.")] = 2,
) -> None:
    """Compare with scperteval calibrate; exit 1 where equally defined values differ by more than 1e-9."""
    CONSOLE.print(machine("anndata", "scanpy"))
    peer = peer or Path(sys.executable).with_name("scperteval")
    if not peer.exists():
        raise SystemExit(f"no {peer}: pip install -e '.[bench]' -c constraints.txt, or name another one with --peer")
    data = screen(conditions, cells, genes)
    filled = data.X.nnz / data.n_obs / data.n_vars
    CONSOLE.print(f"{conditions:,} conditions, {data.n_obs:,} cells, {genes:,} genes, {filled:.0%} filled\n")
    protocols = ",".join(shared.protocol for shared in METRICS)
    with TemporaryDirectory() as name:
        folder = Path(name)
        file, few, same = folder / "screen.h5ad", folder / "few.h5ad", folder / "same_halves.h5ad"
        data.write_h5ad(file)
        checked = first_conditions(data)
        checked.write_h5ad(few)
        with_the_peers_halves(checked).write_h5ad(same)
        commands = {
            "peer": lambda: run_peer(peer, file, folder, protocols, "auto"),
            "one": lambda: run_ours(file, folder / "one", 1),
            "five": lambda: run_ours(file, folder / "five", 5),
            "one, called": lambda: calibrate_file(file, FileOptions(half_seeds=1)),
            "five, called": lambda: calibrate_file(file, FileOptions()),
        }
        # In turns, so that whatever else runs on the machine disturbs all alike.
        rounds = [{name: timed(command)[0] for name, command in commands.items()} for _ in range(repeats)]
        best = pd.DataFrame(rounds).min()
        by_default = run_peer(peer, few, folder, protocols, "auto")
        duplicates = run_peer(peer, few, folder, ",".join(shared.protocol for shared in COMPARED), "tech_dup")
        whole = timed(lambda: run_peer(peer, file, folder, "all", "auto"))[0] if all_protocols else None
        scores, _ = calibrate_file(same, FileOptions(half_seeds=1))
    seconds, five = best["peer"], best["five"]
    timings = [
        Timing("scperteval calibrate, 15 metrics", seconds),
        Timing("calipert calibrate --half-seeds 1 (one split, as the peer)", best["one"], seconds / best["one"], AIM),
        Timing("the same without imports", best["one, called"], seconds / best["one, called"]),
        Timing("calipert calibrate (five half splits)", five, seconds / five),
        Timing("the same without imports", best["five, called"], seconds / best["five, called"]),
    ]
    if whole is not None:
        timings += [
            Timing("scperteval calibrate, all of its protocols", whole),
            Timing("calipert calibrate (five half splits)", five, whole / five, AIM),
        ]
    show_times("Times, from the file to the tables", timings)
    show_quoted(scores, by_default)
    show_agreement(compared(scores, duplicates))


if __name__ == "__main__":
    typer.run(main)
