"""The folder of results: its tables follow from the parts, and the same parts give the same bytes."""

from __future__ import annotations

import json
from hashlib import sha256
from html import unescape
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

from core.reference.build import write_reference
from core.reference.files import read_reference
from core.reference.quality import write_quality
from core.report.page import Dataset
from core.report.results import DECLARED, write_results
from core.scoring.calibration import build_calibration
from core.scoring.comparison import compare_models
from core.scoring.leaderboard import build_leaderboard
from core.scoring.scores import write_control_scores, write_model_scores

DATASET = Dataset("screen", "a small screen", "single", None, None)
PROVENANCE = {"data set": "screen", "seed": "42"}


@pytest.fixture(scope="module")
def parts(single_cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of what a benchmark of one model on the small screen leaves behind."""
    root = tmp_path_factory.mktemp("parts")
    folders = {name: root / name for name in ("reference", "controls", "model", "calibration", "quality")}
    for folder in folders.values():
        folder.mkdir()
    write_reference(single_cells, 42, 2, folders["reference"])
    reference, _ = read_reference(folders["reference"])
    write_control_scores(folders["reference"], folders["controls"], 42)
    halved = ad.AnnData(
        (reference.layers["mean"] + reference.layers["sparse_mean"]) / 2,
        obs=reference.obs[["covariate", "condition"]],
        var=reference.var,
    )
    fold = root / "fold"
    fold.mkdir()
    halved[:-1].write_h5ad(fold / "predictions.h5ad")
    lost = reference.obs[["covariate", "condition"]].iloc[-1:].astype(str).assign(reason="not measured")
    (fold / "unpredicted.json").write_text(json.dumps(lost.to_dict(orient="records")))
    write_model_scores([fold], "mine", 1, folders["reference"], 42, folders["model"])
    controls = pd.read_parquet(folders["controls"] / "scores.parquet")
    build_calibration(controls, 42).to_parquet(folders["calibration"] / "calibration.parquet", index=False)
    write_quality(single_cells, reference.obs, folders["quality"])
    return folders


def results(parts: dict[str, Path], scores: list[str], folder: Path) -> Path:
    folder.mkdir()
    paths = [parts[name] for name in scores]
    write_results(DATASET, 42, paths, parts["calibration"], parts["quality"], PROVENANCE, folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_tables_follow_from_the_parts(parts: dict[str, Path], tmp_path: Path) -> None:
    folder = results(parts, ["controls", "model"], tmp_path / "results")
    tables = {path.stem: pd.read_parquet(path) for path in folder.glob("*.parquet")}
    assert set(tables) == {"scores", "calibration", "leaderboard", "comparison", "quality", "unpredicted"}
    scores, calibration = tables["scores"], tables["calibration"]
    assert set(scores["half_seed"]) == {42, 43}
    assert "mine" in set(scores["model"])
    pd.testing.assert_frame_equal(tables["leaderboard"], build_leaderboard(scores, calibration, 42))
    n_degs = tables["quality"].set_index(["covariate", "condition"])["n_degs"]
    first = scores[scores["half_seed"] == 42]
    pd.testing.assert_frame_equal(tables["comparison"], compare_models(first, n_degs, 42))
    assert list(tables["unpredicted"]["reason"]) == ["not measured"]
    report = unescape((folder / "report.html").read_text(encoding="utf-8"))
    assert "mine" in report
    assert all(sentence in report for sentence in DECLARED)
    assert list((folder / "figures").iterdir())
    again = results(parts, ["controls", "model"], tmp_path / "again")
    assert digests(again) == digests(folder)


def test_controls_alone_have_results_too(parts: dict[str, Path], tmp_path: Path) -> None:
    folder = results(parts, ["controls"], tmp_path / "results")
    assert pd.read_parquet(folder / "comparison.parquet").empty
    unpredicted = pd.read_parquet(folder / "unpredicted.parquet")
    assert unpredicted.empty
    assert list(unpredicted.columns) == ["model", "covariate", "condition", "reason"]
    assert set(pd.read_parquet(folder / "leaderboard.parquet")["kind"]) >= {"positive control", "negative control"}


def test_a_model_without_some_genes_or_without_any_prediction_is_named(parts: dict[str, Path], tmp_path: Path) -> None:
    reference, _ = read_reference(parts["reference"])
    obs = reference.obs[["covariate", "condition"]].astype(str)
    lacking, silent = tmp_path / "lacking", tmp_path / "silent"
    for folder in (lacking, silent):
        (folder / "fold").mkdir(parents=True)
    profiles = ad.AnnData(reference.layers["sparse_mean"], obs=obs, var=reference.var[[]])
    profiles[:, 1:].write_h5ad(lacking / "fold" / "predictions.h5ad")
    (lacking / "fold" / "unpredicted.json").write_text("[]")
    profiles[:0].write_h5ad(silent / "fold" / "predictions.h5ad")
    (silent / "fold" / "unpredicted.json").write_text(json.dumps(obs.assign(reason="no gene").to_dict("records")))
    for folder in (lacking, silent):
        write_model_scores([folder / "fold"], folder.name, 1, parts["reference"], 42, folder)
    everyone = parts | {"lacking": lacking, "silent": silent}
    folder = results(everyone, ["controls", "lacking", "silent"], tmp_path / "results")
    report = unescape((folder / "report.html").read_text(encoding="utf-8"))
    assert f"lacking does not predict 1 of the genes ({reference.var_names[0]})" in report
    assert "silent predicted none of the conditions and has no score." in report
    assert set(pd.read_parquet(folder / "leaderboard.parquet")["model"]) >= {"lacking", "dataset_mean"}


def test_scores_that_are_missing_are_not_left_out_in_silence(parts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        results(parts | {"empty": tmp_path / "empty"}, ["controls", "empty"], tmp_path / "results")
