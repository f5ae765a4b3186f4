"""Scores as files, for every half split; a model that lacks genes is compared on the same genes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from core.errors import UserError
from core.reference.build import write_reference
from core.reference.files import read_reference
from core.scoring.calibration import build_calibration
from core.scoring.comparison import compare_models
from core.scoring.evaluation import select_evaluated
from core.scoring.leaderboard import build_leaderboard
from core.scoring.scores import write_control_scores, write_model_scores
from tests.helpers import by_definition

INDEX = ["covariate", "condition", "metric"]


def values(table: pd.DataFrame) -> pd.Series:
    return table.set_index(INDEX)["value"].sort_index()


def assert_same(found: pd.DataFrame, expected: pd.Series) -> None:
    pd.testing.assert_series_equal(values(found), expected.sort_index(), atol=1e-9, rtol=0, check_names=False)


def test_files_of_scores(single_cells: ad.AnnData, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("reference", "controls", "model")}
    for folder in folders.values():
        folder.mkdir()
    write_reference(single_cells, 42, 3, folders["reference"])
    write_control_scores(folders["reference"], folders["controls"], 42)
    controls = pd.read_parquet(folders["controls"] / "scores.parquet")
    assert list(controls.columns) == ["model", "covariate", "condition", "fold", "seed", "half_seed", "metric", "value"]
    assert set(controls["half_seed"]) == {42, 43, 44}
    assert set(controls["seed"]) == {-1}
    negatives = ad.read_h5ad(folders["reference"] / "negatives.h5ad")
    splits = {42: folders["reference"] / "reference.h5ad"}
    splits |= {s: folders["reference"] / "half_splits" / f"seed_{s}.h5ad" for s in (43, 44)}

    # A model that predicts some conditions, rows and genes in an order of its own, and lacks a gene.
    reference = ad.read_h5ad(splits[42])
    rows, genes = [5, 2, 9], np.random.default_rng(0).permutation(reference.n_vars)[:-1]
    model = ad.AnnData(
        reference.layers["mean"][rows][:, genes],
        obs=reference.obs.iloc[rows][["covariate", "condition"]],
        var=pd.DataFrame(index=reference.var_names[genes]),
    )
    fold = tmp_path / "fold"
    fold.mkdir()
    model.write_h5ad(fold / "predictions.h5ad")
    (fold / "unpredicted.json").write_text('[{"covariate": "c", "condition": "X", "reason": "why"}]')
    # A fold in which nothing could be predicted changes nothing, and pandas has nothing to complain about.
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    empty = pd.DataFrame(np.empty((0, 2)), columns=model.obs.columns, dtype=object)
    ad.AnnData(np.empty((0, model.n_vars)), obs=empty, var=model.var).write_h5ad(nothing / "predictions.h5ad")
    (nothing / "unpredicted.json").write_text("[]")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        write_model_scores([nothing, fold], "averages", 7, folders["reference"], 42, folders["model"])
    unpredicted = pd.read_parquet(folders["model"] / "unpredicted.parquet")
    assert unpredicted.to_numpy().tolist() == [["averages", "c", "X", "why"]]
    (lacking,) = set(reference.var_names) - set(model.var_names)
    assert json.loads((folders["model"] / "missing_genes.json").read_text()) == [lacking]
    matched = pd.read_parquet(folders["model"] / "matched_controls.parquet")
    found = pd.read_parquet(folders["model"] / "scores.parquet")
    assert set(found["model"]) == {"averages"}
    assert set(found["seed"]) == {7}
    for seed, file in splits.items():
        evaluation = select_evaluated(ad.read_h5ad(file), negatives)
        part = evaluation.with_genes(evaluation.genes.isin(model.var_names))
        assert len(part.genes) == reference.n_vars - 1
        profiles = model[:, part.genes].X
        assert_same(found[found["half_seed"] == seed], by_definition.scores(profiles, model.obs, part))
        of_controls = controls[(controls["half_seed"] == seed) & (controls["model"] == "control_mean")]
        assert_same(of_controls, by_definition.scores(evaluation.control_mean, evaluation.keys, evaluation))
        of_controls = matched[
            (matched["half_seed"] == seed) & (matched["model"] == "control_mean on the genes of averages")
        ]
        assert_same(of_controls, by_definition.scores(part.control_mean, part.keys, part))


def test_a_control_without_its_worst_genes_gains_nothing(single_cells: ad.AnnData, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("reference", "controls", "fold", "model")}
    for folder in folders.values():
        folder.mkdir()
    write_reference(single_cells, 42, 2, folders["reference"])
    write_control_scores(folders["reference"], folders["controls"], 42)
    reference, negatives = read_reference(folders["reference"])
    evaluation = select_evaluated(reference, negatives)
    error = ((evaluation.dataset_mean - evaluation.truth) ** 2).mean(axis=0)
    kept = np.sort(np.argsort(error)[: int(np.ceil(0.95 * len(error)))])
    data = ad.AnnData(
        evaluation.dataset_mean[:, kept],
        obs=evaluation.keys[["covariate", "condition"]].rename(index=str),
        var=pd.DataFrame(index=evaluation.genes[kept]),
    )
    data.write_h5ad(folders["fold"] / "predictions.h5ad")
    (folders["fold"] / "unpredicted.json").write_text("[]")
    write_model_scores([folders["fold"]], "incomplete", 1, folders["reference"], 42, folders["model"])
    scores = pd.concat(pd.read_parquet(folders[name] / "scores.parquet") for name in ("controls", "model"))
    matched = pd.read_parquet(folders["model"] / "matched_controls.parquet")
    calibration = build_calibration(scores[scores["seed"] == -1], 42)
    board = build_leaderboard(scores, calibration, 42, matched).set_index(["model", "metric"])
    assert board.loc[("incomplete", "mse"), "mean"] < board.loc[("dataset_mean", "mse"), "mean"]
    for metric in ("mse", "wmse", "mae"):
        assert board.loc[("incomplete", metric), "headroom"] == pytest.approx(0, abs=1e-9)
    n_degs = evaluation.keys.set_index(["covariate", "condition"])["n_degs"]
    main = [table[table["half_seed"] == 42] for table in (scores, matched)]
    table = compare_models(main[0], n_degs, 42, main[1]).set_index(["control", "metric", "stratum"])
    assert table.loc[("dataset_mean", "mse", "all"), "mean_difference"] == 0


def test_too_few_genes_over_all_folds_are_refused(single_cells: ad.AnnData, tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    folder.mkdir()
    write_reference(single_cells, 42, 1, folder)
    reference, _ = read_reference(folder)
    n = reference.n_vars
    # Each fold lacks 4 % of the genes, which is allowed; together they lack 8 %.
    folds = []
    for number, lacking in enumerate([range(int(0.04 * n)), range(n - int(0.04 * n), n)]):
        fold = tmp_path / f"fold_{number}"
        fold.mkdir()
        genes = np.setdiff1d(np.arange(n), np.array(lacking))
        rows = reference[[number], :][:, genes]
        ad.AnnData(
            rows.layers["mean"], obs=rows.obs[["covariate", "condition"]].astype(str), var=rows.var[[]]
        ).write_h5ad(fold / "predictions.h5ad")
        (fold / "unpredicted.json").write_text("[]")
        folds.append(fold)
    with pytest.raises(UserError, match="predictions of patchy"):
        write_model_scores(folds, "patchy", 1, folder, 42, tmp_path)
