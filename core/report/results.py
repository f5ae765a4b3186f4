"""The results of a benchmark as a folder that a person can open: tables, report and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from core.errors import shown
from core.reference.quality_files import QUALITY, read_edistances
from core.report.files import COMPARISON, LEADERBOARD, REPORT
from core.report.page import Dataset, write_report
from core.scoring.comparison import compare
from core.scoring.files import CALIBRATION, MATCHED_CONTROLS, MISSING_GENES, SCORES, UNPREDICTED
from core.scoring.leaderboard import leaderboard

# What every model shares by the study's design, and what it does not.
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
    """Write the tables and the report of a benchmark into `folder`.

    dataset: what the report says about it. seed: the data set's, with which its cells were halved. scores: folders with
    scores.parquet (the controls' first) and, for models, unpredicted.parquet. calibration, quality: folders of these
    tables. Files: scores.parquet, calibration.parquet, leaderboard.parquet,
    comparison.parquet, quality.parquet, unpredicted.parquet, report.html, figures/ (`docs/outputs.md`).
    """
    everything = pd.concat([pd.read_parquet(path / SCORES) for path in scores], ignore_index=True)
    reasons = [path / UNPREDICTED for path in scores if (path / UNPREDICTED).exists()]
    unpredicted = (
        pd.concat([pd.read_parquet(path) for path in reasons], ignore_index=True)
        if reasons
        else pd.DataFrame(columns=["model", "covariate", "condition", "reason"])
    )
    calibrated = pd.read_parquet(calibration / CALIBRATION)
    conditions = pd.read_parquet(quality / QUALITY)
    matched = [pd.read_parquet(file) for path in scores if (file := path / MATCHED_CONTROLS).exists()]
    on_their_genes = pd.concat(matched, ignore_index=True) if matched else None
    board = leaderboard(everything, calibrated, seed, on_their_genes)
    main = everything[everything["half_seed"] == seed]
    matched_main = None if on_their_genes is None else on_their_genes[on_their_genes["half_seed"] == seed]
    n_degs = conditions.set_index(["covariate", "condition"])["n_degs"]
    comparison = compare(main, n_degs, seed, matched_main)
    tables = {
        SCORES: everything,
        CALIBRATION: calibrated,
        LEADERBOARD: board,
        COMPARISON: comparison,
        QUALITY: conditions,
        UNPREDICTED: unpredicted,
    }
    for name, table in tables.items():
        table.to_parquet(folder / name, index=False)
    write_report(
        folder / REPORT,
        dataset=dataset,
        provenance=dict(provenance),
        quality=conditions,
        edistance=read_edistances(quality),
        calibration=calibrated,
        leaderboard=board,
        comparison=comparison,
        scores=everything,
        declared=[*DECLARED, *_missing_genes(scores), *_silent(everything, unpredicted)],
        unpredicted=unpredicted,
    )


def _missing_genes(scores: list[Path]) -> list[str]:
    """A sentence for each model that lacks genes of the reference."""
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


def _silent(scores: pd.DataFrame, unpredicted: pd.DataFrame) -> list[str]:
    """A sentence for each model that predicted no condition at all."""
    silent = sorted(set(unpredicted["model"]) - set(scores["model"]))
    return [f"{model} predicted none of the conditions and has no score." for model in silent]
