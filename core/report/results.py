"""The results of a benchmark as a folder that a person can open: tables, report and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from core.conditions import KEYS
from core.errors import shown
from core.reference.quality_files import QUALITY, read_edistances
from core.report.files import COMPARISON, LEADERBOARD, REPORT
from core.report.page import Dataset, write_report
from core.scoring.comparison import compare_models
from core.scoring.files import CALIBRATION, MATCHED_CONTROLS, MISSING_GENES, SCORES, UNPREDICTED
from core.scoring.leaderboard import build_leaderboard

# What all models share by the study's design, and what they do not.
DECLARED = (
    "The genes and the cap on cells per condition were chosen with all cells, test cells included.",
    "Everything else that a model received came from the train and val cells of its fold; test cells were not in "
    "the files that it was given.",
    "Truth is the mean of the first half of a condition's cells; models trained on cells of other conditions only.",
)


def write_results(
    dataset: Dataset,
    seed: int,
    scores: list[Path],
    calibration: Path,
    quality: Path,
    provenance: Mapping[str, str],
    folder: Path,
) -> None:
    """Write the tables and the report of a benchmark.

    Parameters
    ----------
    dataset
        What the report says about the data set.
    seed
        Of the data set: of its own half split, and of all resamples.
    scores
        Folders with scores.parquet (the controls' first) and, for models, unpredicted.parquet.
    calibration, quality
        Folders of these tables.
    provenance
        What the results were made from, in the order of display.
    folder
        Where scores.parquet, calibration.parquet, leaderboard.parquet, comparison.parquet, quality.parquet,
        unpredicted.parquet, report.html and figures/ are written (`docs/outputs.md`).
    """
    everything = pd.concat([pd.read_parquet(path / SCORES) for path in scores], ignore_index=True)
    reasons = _read_tables(scores, UNPREDICTED)
    unpredicted = pd.concat(reasons, ignore_index=True) if reasons else pd.DataFrame(columns=["model", *KEYS, "reason"])
    on_their_genes = _read_tables(scores, MATCHED_CONTROLS)
    matched = pd.concat(on_their_genes, ignore_index=True) if on_their_genes else None
    calibrated = pd.read_parquet(calibration / CALIBRATION)
    conditions = pd.read_parquet(quality / QUALITY)
    leaderboard = build_leaderboard(everything, calibrated, seed, matched)
    n_degs = conditions.set_index(KEYS)["n_degs"]
    own = everything[everything["half_seed"] == seed]
    matched_own = None if matched is None else matched[matched["half_seed"] == seed]
    comparison = compare_models(own, n_degs, seed, matched_own)
    tables = {
        SCORES: everything,
        CALIBRATION: calibrated,
        LEADERBOARD: leaderboard,
        COMPARISON: comparison,
        QUALITY: conditions,
        UNPREDICTED: unpredicted,
    }
    for name, table in tables.items():
        table.to_parquet(folder / name, index=False)
    write_report(
        folder / REPORT,
        dataset=dataset,
        provenance=provenance,
        edistance=read_edistances(quality),
        declared=[*DECLARED, *_describe_missing_genes(scores), *_describe_silent(everything, unpredicted)],
        # The report calls the tables as their files are called.
        **{Path(name).stem: table for name, table in tables.items()},
    )


def _read_tables(folders: list[Path], name: str) -> list[pd.DataFrame]:
    """Read a table from each of the folders that has it."""
    files = [folder / name for folder in folders]
    return [pd.read_parquet(file) for file in files if file.exists()]


def _describe_missing_genes(scores: list[Path]) -> list[str]:
    """Write a sentence for each model that lacks genes of the reference."""
    sentences = []
    for path in scores:
        if (path / MISSING_GENES).exists():
            model = pd.read_parquet(path / SCORES, columns=["model"])["model"].iloc[0]
            genes = json.loads((path / MISSING_GENES).read_text(encoding="utf-8"))
            sentences.append(
                f"{model} does not predict {len(genes)} of the genes ({shown(genes)}): it was scored on the others, "
                "and compared with the controls on the same genes."
            )
    return sentences


def _describe_silent(scores: pd.DataFrame, unpredicted: pd.DataFrame) -> list[str]:
    """Write a sentence for each model that predicted no condition at all."""
    silent = sorted(set(unpredicted["model"]) - set(scores["model"]))
    return [f"{model} predicted none of the conditions and has no score." for model in silent]
