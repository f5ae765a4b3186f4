"""The scores of controls and of models as files: every half split of a reference, in one long table each."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from core.conditions import KEYS
from core.reference.controls import CONTROLS, name_matched_control
from core.reference.files import find_half_splits, read_layers, read_reference
from core.scoring.evaluation import SCORED_LAYERS, score_controls, score_profiles, select_evaluated
from core.scoring.files import MATCHED_CONTROLS, MISSING_GENES, PREDICTIONS, REASONS, SCORES, UNPREDICTED
from core.scoring.predictions import require_shared_genes

COLUMNS = ["model", *KEYS, "fold", "seed", "half_seed", "metric", "value"]
UNPREDICTED_COLUMNS = ["model", *KEYS, "reason"]


def write_control_scores(reference: Path, folder: Path, seed: int) -> None:
    """Write scores.parquet of all controls, for every half split of a reference.

    Parameters
    ----------
    reference
        Its folder.
    folder
        Where the file is written. Its columns are in `docs/outputs.md`; controls have the training seed -1.
    seed
        The half seed of the reference itself.
    """
    _write(_score_controls(reference, seed), folder / SCORES)


def write_model_scores(
    folds: Sequence[Path], model: str, seed: int, reference: Path, half_seed: int, folder: Path
) -> None:
    """Write scores.parquet and unpredicted.parquet of a model, for every half split of a reference.

    A model that lacks some of the reference's genes in any fold is scored on the others. Then matched_controls.parquet
    has the scores of the controls on the same genes (named by `core.reference.controls.name_matched_control`), and
    missing_genes.json the names of the genes that it lacks.

    Parameters
    ----------
    folds
        Folders with predictions.h5ad and unpredicted.json.
    model
        Its name.
    seed
        The training seed.
    reference
        The folder of the reference.
    half_seed
        That of the reference itself.
    folder
        Where the files are written.

    Raises
    ------
    UserError
        Where the model shares less than 95 % of the reference's genes.
    """
    of_folds = [ad.read_h5ad(fold / PREDICTIONS) for fold in folds]
    # Without those of a fold in which nothing could be predicted: pandas will soon refuse to join empty tables.
    predictions = ad.concat([some for some in of_folds if some.n_obs] or of_folds, join="inner")
    own, negatives = read_reference(reference, SCORED_LAYERS)
    require_shared_genes(predictions.var_names, own.var_names, f"predictions of {model}")
    tables = []
    for split_seed, split in _splits(reference, own, half_seed, SCORED_LAYERS):
        evaluation = select_evaluated(split, negatives)
        evaluation = evaluation.with_genes(evaluation.genes.isin(predictions.var_names))
        profiles = np.asarray(predictions[:, evaluation.genes].X, dtype=np.float64)
        tables.append(score_profiles(profiles, predictions.obs, evaluation).assign(half_seed=split_seed))
    _write(pd.concat(tables, ignore_index=True).assign(model=model, seed=seed), folder / SCORES)
    missing = own.var_names.difference(predictions.var_names)
    if len(missing):
        matched = _score_controls(reference, half_seed, predictions.var_names)
        matched["model"] = [name_matched_control(control, model) for control in matched["model"]]
        _write(matched, folder / MATCHED_CONTROLS)
        (folder / MISSING_GENES).write_text(json.dumps(sorted(missing)), encoding="utf-8")
    reasons = [row for fold in folds for row in json.loads((fold / REASONS).read_text(encoding="utf-8"))]
    table = pd.DataFrame(reasons, columns=UNPREDICTED_COLUMNS[1:]).assign(model=model)[UNPREDICTED_COLUMNS]
    table.to_parquet(folder / UNPREDICTED, index=False)


def _score_controls(reference: Path, half_seed: int, genes: pd.Index | None = None) -> pd.DataFrame:
    layers = {*SCORED_LAYERS, *(control.name for control in CONTROLS)}
    own, negatives = read_reference(reference, layers)
    tables = [
        score_controls(own, negatives, split, genes).assign(half_seed=split_seed, seed=-1)
        for split_seed, split in _splits(reference, own, half_seed, layers)
    ]
    return pd.concat(tables, ignore_index=True)


def _splits(
    reference: Path, own: ad.AnnData, half_seed: int, layers: Collection[str]
) -> Iterator[tuple[int, ad.AnnData]]:
    """Give (half seed, split) of all half splits, the reference's own first; one further split in memory at a time."""
    yield half_seed, own
    for seed, file in find_half_splits(reference).items():
        yield seed, read_layers(file, layers)


def _write(scores: pd.DataFrame, path: Path) -> None:
    whole = dict.fromkeys(("fold", "seed", "half_seed"), "int64")
    scores[COLUMNS].astype(whole).to_parquet(path, index=False)
