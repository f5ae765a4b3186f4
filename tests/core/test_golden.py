"""Golden cases: every metric of every control, from a mirror file as it is, to 1e-9."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from core.prepare.mirror import take_mirror_cells
from core.reference.build import build_negatives, build_reference
from core.reference.cell_sums import CellSums
from core.reference.stored_profiles import read_stored_reference
from core.scoring.evaluation import Evaluation
from core.scoring.file_calibration import FileOptions, calibrate_file
from tests.helpers import by_definition
from tests.helpers.mirror_files import mirror_of

HERE = Path(__file__)

ROOT = HERE.parents[2]
SLOTS = {
    "technical_duplicate": "technical_duplicate_second_half_baseline",
    "interpolated_duplicate": "interpolated_duplicate_baseline",
    "additive": "additive_baseline",
    "control_mean": "ctrl_baseline",
    "dataset_mean": "split_fold_{fold}_split_mean_baseline",
}


def assert_same(found: pd.Series, expected: pd.Series) -> None:
    """Equal to 1e-9 absolute, with NaN in the same places and nothing missing."""
    found = found[found.index.isin(expected.index)].sort_index()
    expected = expected.sort_index()
    assert list(found.index) == list(expected.index)
    np.testing.assert_array_equal(found.isna(), expected.isna())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def values(table: pd.DataFrame) -> pd.Series:
    return table.set_index(["model", "condition", "metric"])["value"]


# A case that the test makes: profiles with pandas, DE with scanpy, metrics with scipy and scikit-learn


def test_a_case_by_definition(pairs_cells: ad.AnnData, tmp_path: Path) -> None:
    mirror = mirror_of(pairs_cells)
    mirror.write_h5ad(tmp_path / "mirror.h5ad")
    uns, genes = mirror.uns, sorted(mirror.var_names)
    obs = mirror.obs.astype(str)
    obs = obs[~obs["condition"].isin(["control", "ctrl_synthetic_mean"])]
    fold_of = {
        condition: fold for fold in (0, 1) for condition in obs.loc[obs[f"split_fold_{fold}"] == "test", "condition"]
    }
    keys = pd.DataFrame(sorted(fold_of.items()), columns=["condition", "test_fold"]).assign(covariate="all", n_degs=0)
    rows = list(zip("all_" + keys["condition"], keys["test_fold"], strict=True))

    def profiles(model: str) -> np.ndarray:
        table_rows = ["all" if model.endswith("mean") else name for name, _ in rows]
        tables = [uns[SLOTS[model].format(fold=fold)] for _, fold in rows]
        return np.array(
            [table.loc[:, genes].reindex([row]).to_numpy()[0] for table, row in zip(tables, table_rows, strict=True)]
        )

    def de(slot: str) -> np.ndarray:
        by_gene = [pd.Series(uns[slot][name], index=uns["names_df_dict_gt"][name]) for name, _ in rows]
        return np.array([series[genes].to_numpy(float) for series in by_gene])

    truth = uns["technical_duplicate_first_half_baseline"].loc[[name for name, _ in rows], genes].to_numpy()
    evaluation = Evaluation(
        keys, pd.Index(genes), truth, profiles("control_mean"), profiles("dataset_mean"),
        de("scores_df_dict_gt"), de("pvals_adj_df_dict_gt"),
    )  # fmt: skip
    expected = []
    for model in SLOTS:
        x = profiles(model)
        there = ~np.isnan(x).any(axis=1)
        of_model = by_definition.scores(x[there], keys[there], evaluation).droplevel("covariate")
        expected.append(pd.concat({model: of_model}, names=["model"]))
    table = pd.concat(expected)
    scores, _ = calibrate_file(tmp_path / "mirror.h5ad", FileOptions(half_seeds=1))
    assert set(scores["model"]) == set(SLOTS)
    assert len(scores) == len(table)
    assert_same(values(scores), table)
    # Worth the name: DEGs here and none there, an additive model that lacks a single, rankings of all kinds.
    assert 0.1 < table.isna().groupby("metric").mean()["r2_deltactrl_degs"] < 0.9
    assert 0 < table["additive"].groupby("metric").size()["mse"] < len(keys)
    assert table["dataset_mean"].unstack("metric")["nir"].nunique() > 5


# The case that came with the data


@pytest.fixture(scope="module")
def golden(shared: Path) -> pd.Series:
    table = pd.read_csv(shared / "golden" / "combo_metrics.csv")
    return values(table.assign(condition=table["perturbation"].str.removeprefix("norman19_")))


@pytest.mark.shared
def test_the_golden_case_through_the_core(shared: Path, golden: pd.Series) -> None:
    scores, calibration = calibrate_file(shared / "golden" / "combo_mirror.h5ad", FileOptions(half_seeds=2))
    found = values(scores)
    assert len(golden) == 5 * 16 * 13
    assert found.index.is_unique
    assert set(scores["model"]) == set(golden.index.unique("model"))
    assert set(scores["condition"]) == set(golden.index.unique("condition"))
    assert_same(found, golden)
    assert len(calibration) == 17 * 3


@pytest.mark.shared
def test_the_golden_case_through_the_command_line(shared: Path, golden: pd.Series, tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from flows.cli.main import main; main()"]
    mirror = shared / "golden" / "combo_mirror.h5ad"
    done = subprocess.run(
        [*program, "calibrate", str(mirror), "--out", str(tmp_path / "out"), "--half-seeds", "2"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert list(table.columns) == ["model", "condition", "metric", "value"]
    assert_same(values(table), golden)
    calibration = pd.read_csv(tmp_path / "out" / "calibration.csv")
    verdicts = calibration[calibration["variant"] == "drf_interpolated"].set_index("metric")["verdict"]
    assert set(verdicts) <= {"calibrated", "inconclusive", "miscalibrated", "none"}
    assert "wmse" in done.stdout


@pytest.mark.shared
def test_the_golden_cells_give_the_stored_halves_and_controls(shared: Path, sums: Callable[..., CellSums]) -> None:
    data = ad.read_h5ad(shared / "golden" / "combo_mirror.h5ad")
    cells = take_mirror_cells(data, "mirror.h5ad")
    reference, negatives = read_stored_reference(data, cells, "combo_mirror.h5ad")
    own_negatives = build_negatives(sums(cells))
    recomputed = build_reference(sums(cells), own_negatives, 42)
    for layer in ("truth", "technical_duplicate"):
        np.testing.assert_allclose(recomputed.layers[layer], reference.layers[layer], rtol=2e-6, atol=1e-7)
    control = negatives.obs["kind"] == "control_mean"
    np.testing.assert_allclose(own_negatives[control].X, negatives[control].X, rtol=2e-6, atol=1e-7)
    for layer in ("t_first", "padj_first"):
        np.testing.assert_allclose(recomputed.layers[layer], reference.layers[layer], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(recomputed.obs["n_degs"], reference.obs["n_degs"])
