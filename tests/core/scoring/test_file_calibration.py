"""Calibration of one file: ours, a mirror's, or anybody's; and what is refused, with what to do about it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from core.errors import UserError
from core.prepare.splits import draw_folds, draw_halves
from core.reference.build import build_half_split, build_negatives, build_reference
from core.reference.cell_sums import CellSums
from core.scoring.calibration import build_calibration
from core.scoring.evaluation import score_controls, select_evaluated
from core.scoring.file_calibration import FileOptions, arrange_cells, calibrate_file
from tests.helpers import by_definition
from tests.helpers.mirror_files import mirror_of

HERE = Path(__file__)

TWO = FileOptions(half_seeds=2)
Sums = Callable[..., CellSums]
Written = Callable[[ad.AnnData], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    def write(data: ad.AnnData) -> Path:
        data.write_h5ad(tmp_path / "file.h5ad")
        return tmp_path / "file.h5ad"

    return write


@pytest.fixture(scope="module")
def stored(pairs_cells: ad.AnnData) -> ad.AnnData:
    return mirror_of(pairs_cells)


@pytest.fixture
def plain(single_cells: ad.AnnData) -> ad.AnnData:
    """Somebody's file: log1p X, a column of labels, cells and genes in no order."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"label": single_cells.obs["condition"].astype(str)}, index=single_cells.obs_names)
    data = ad.AnnData(single_cells.X, obs=obs, var=pd.DataFrame(index=single_cells.var_names))
    return data[rng.permutation(data.n_obs)][:, rng.permutation(data.n_vars)].copy()


LABEL = FileOptions(column="label", half_seeds=2)
# anndata warns of what is refused here.
NOT_UNIQUE = pytest.mark.filterwarnings(
    "ignore:Observation names are not unique", "ignore:Variable names are not unique"
)


# What is calibrated


def test_our_cells_are_taken_with_their_halves_and_folds(sums: Sums, screen: ad.AnnData, written: Written) -> None:
    scores, calibration = calibrate_file(written(screen), FileOptions(half_seeds=3))
    negatives = build_negatives(sums(screen))
    reference = build_reference(sums(screen), negatives, 42)
    own = score_controls(reference, negatives)
    pd.testing.assert_frame_equal(scores, own)
    tables = [own.assign(half_seed=42)]
    for seed in (43, 44):
        halves = build_half_split(sums(screen, {seed: draw_halves(screen.obs, seed)}), seed, negatives)
        tables.append(score_controls(reference, negatives, halves).assign(half_seed=seed))
    pd.testing.assert_frame_equal(calibration, build_calibration(pd.concat(tables), 42))


def test_our_cells_may_be_dense(single_cells: ad.AnnData, written: Written) -> None:
    sparse_scores, _ = calibrate_file(written(single_cells), FileOptions(half_seeds=1))
    dense = ad.AnnData(single_cells.X.toarray(), obs=single_cells.obs, var=single_cells.var)
    dense_scores, _ = calibrate_file(written(dense), FileOptions(half_seeds=1))
    pd.testing.assert_frame_equal(dense_scores, sparse_scores, check_exact=True)


def test_a_mirror_is_scored_by_what_it_stores(stored: ad.AnnData, written: Written) -> None:
    def mse(data: ad.AnnData, recompute: bool) -> float:
        scores, _ = calibrate_file(written(data), FileOptions(half_seeds=1), recompute=recompute)
        of_duplicate = scores[(scores["model"] == "technical_duplicate") & (scores["metric"] == "mse")]
        assert len(of_duplicate) == 14
        return of_duplicate["value"].mean()

    shifted = stored.copy()
    slot = "technical_duplicate_second_half_baseline"
    shifted.uns[slot] = shifted.uns[slot] + 1.0
    plain = mse(stored, False)
    assert mse(shifted, False) == pytest.approx(plain + 1, rel=0.3)
    assert mse(shifted, True) == pytest.approx(plain, rel=1e-6)


def test_a_mirror_without_its_tables_can_be_recomputed(
    sums: Sums, stored: ad.AnnData, pairs_cells: ad.AnnData, written: Written
) -> None:
    mirror = stored.copy()
    mirror.uns.clear()
    path = written(mirror)
    with pytest.raises(UserError, match="--recompute"):
        calibrate_file(path, FileOptions(half_seeds=1))
    scores, _ = calibrate_file(path, FileOptions(half_seeds=1), recompute=True)
    negatives = build_negatives(sums(pairs_cells))
    expected = score_controls(build_reference(sums(pairs_cells), negatives, 42), negatives)
    pd.testing.assert_frame_equal(scores, expected)


def test_any_file_is_scored_by_definition_on_drawn_halves_and_folds(
    sums: Sums, plain: ad.AnnData, written: Written
) -> None:
    cells = arrange_cells(plain, LABEL, "file")
    assert list(cells.obs_names) == list(cells.obs.sort_values("condition", kind="stable").index)
    assert list(cells.var_names) == sorted(plain.var_names)
    pd.testing.assert_series_equal(cells.obs["half"], draw_halves(cells.obs, 42))
    folds = draw_folds(cells.obs, "single", 5, 42)
    pd.testing.assert_frame_equal(cells.obs[list(folds)], folds)
    np.testing.assert_array_equal(cells.X.toarray(), plain[cells.obs_names, cells.var_names].X.toarray())

    scores, calibration = calibrate_file(written(plain), LABEL)
    negatives = build_negatives(sums(cells))
    reference = build_reference(sums(cells), negatives, 42)
    evaluation = select_evaluated(reference, negatives)
    for model in ("technical_duplicate", "interpolated_duplicate", "sparse_mean"):
        found = scores[scores["model"] == model].set_index(["covariate", "condition", "metric"])["value"].sort_index()
        expected = by_definition.scores(reference.layers[model], evaluation.keys, evaluation).sort_index()
        pd.testing.assert_series_equal(found, expected, rtol=0, atol=1e-9, check_names=False)
    assert set(calibration["variant"]) == {"drf_interpolated", "drf_mean", "drf_ctrl"}


def test_rows_genes_and_storage_do_not_matter(plain: ad.AnnData, written: Written) -> None:
    first = calibrate_file(written(plain), LABEL)
    rng = np.random.default_rng(4)
    other = plain[rng.permutation(plain.n_obs)][:, rng.permutation(plain.n_vars)].copy()
    for storage in (sparse.csc_matrix, lambda x: x.toarray(), lambda x: x.astype(np.float64)):
        data = ad.AnnData(storage(other.X), obs=other.obs, var=other.var)
        data.obs["label"] = data.obs["label"].astype("category")
        for found, expected in zip(calibrate_file(written(data), LABEL), first, strict=True):
            pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_threads_and_the_hash_seed_change_no_byte(plain: ad.AnnData, written: Written, tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from core.scoring.file_calibration import FileOptions, calibrate_file



tables = calibrate_file(Path(sys.argv[1]), FileOptions(column="label", half_seeds=2))
for table, name in zip(tables, ("scores", "calibration"), strict=True):
    table.to_csv(sys.argv[2] + name, index=False)
"""
    path = written(plain)
    found = []
    for threads, hash_seed in ((1, 1), (4, 2)):
        many = dict.fromkeys(["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"], str(threads))
        out = tmp_path / f"threads_{threads}_"
        subprocess.run(
            [sys.executable, "-c", program, str(path), str(out)],
            env=os.environ | many | {"PYTHONHASHSEED": str(hash_seed)},
            cwd=HERE.parents[3],
            check=True,
        )
        found.append([(tmp_path / f"{out.name}{name}").read_bytes() for name in ("scores", "calibration")])
    assert found[0] == found[1]


def test_options_name_column_control_covariate_and_seed(lines_cells: ad.AnnData, written: Written) -> None:
    obs = pd.DataFrame(
        {
            "label": lines_cells.obs["condition"].astype(str).replace({"control": "non-targeting"}),
            "line": lines_cells.obs["covariate"].astype(str),
        }
    )
    data = ad.AnnData(lines_cells.X, obs=obs, var=lines_cells.var)
    options = FileOptions("label", "non-targeting", "line", seed=7, half_seeds=1)
    cells = arrange_cells(data, options, "file")
    assert set(cells.obs["covariate"]) == {"line_1", "line_2"}
    assert (cells.obs["condition"] == "control").sum() == (obs["label"] == "non-targeting").sum()
    scores, _ = calibrate_file(written(data), options)
    assert set(scores["covariate"]) == {"line_1", "line_2"}
    pooled, _ = calibrate_file(written(data), options._replace(covariate=None))
    assert set(pooled["covariate"]) == {"all"}
    other, _ = calibrate_file(written(data), options._replace(seed=8))
    assert not other["value"].equals(scores["value"])


def test_combinations_are_known_by_their_labels(pairs_cells: ad.AnnData) -> None:
    obs = pd.DataFrame({"condition": pairs_cells.obs["condition"].astype(str)})
    swapped = obs["condition"].map(lambda label: "+".join(reversed(label.split("+"))))
    data = ad.AnnData(pairs_cells.X, obs=obs.assign(condition=swapped), var=pairs_cells.var)
    cells = arrange_cells(data, FileOptions(), "file")
    assert set(cells.obs["condition"]) == set(obs["condition"])
    assert [column for column in cells.obs if column.startswith("fold_")] == ["fold_0", "fold_1"]
    singles = cells.obs[~cells.obs["condition"].str.contains("+", regex=False) & (cells.obs["condition"] != "control")]
    assert (singles[["fold_0", "fold_1"]] == "train").all(axis=None)


def test_cells_without_a_label_and_tiny_conditions_are_left_out(plain: ad.AnnData) -> None:
    labels = plain.obs["label"].astype(object)
    condition = sorted(set(labels) - {"control"})[0]
    tiny = labels[labels == condition].index[3:]
    labels[tiny] = None
    plain.obs["label"] = labels
    cells = arrange_cells(plain, LABEL, "file")
    assert not set(tiny) & set(cells.obs_names)
    assert condition not in set(cells.obs["condition"])
    assert cells.obs["condition"].nunique() == plain.obs["label"].nunique() - 1


# What is refused


def counts(data: ad.AnnData) -> None:
    data.X = np.round(5 * data.X.toarray())


def negative(data: ad.AnnData) -> None:
    data.X = data.X.toarray() - 0.1


def not_a_number(data: ad.AnnData) -> None:
    values = data.X.toarray()
    values[3, 5] = np.nan
    data.X = values


def infinite(data: ad.AnnData) -> None:
    data.X.data[0] = np.inf


def no_matrix(data: ad.AnnData) -> None:
    data.X = None


def no_column(data: ad.AnnData) -> None:
    data.obs = data.obs.rename(columns={"label": "guide"})


def no_control(data: ad.AnnData) -> None:
    data.obs["label"] = data.obs["label"].replace({"control": "AAVS1"})


def few_conditions(data: ad.AnnData) -> None:
    keep = ["control", *sorted(set(data.obs["label"]) - {"control"})[:9]]
    data.obs["label"] = data.obs["label"].where(data.obs["label"].isin(keep), None)


def duplicated_cells(data: ad.AnnData) -> None:
    data.obs_names = ["c1", "c1", *data.obs_names[2:]]


def duplicated_genes(data: ad.AnnData) -> None:
    data.var_names = ["g1", "g1", *data.var_names[2:]]


@NOT_UNIQUE
@pytest.mark.parametrize(
    ("spoil", "field", "found", "remedy"),
    [
        (counts, "X", "counts", "log1p"),
        (negative, "X", "negative", "not scaled"),
        (not_a_number, "X", "NaN", "correct"),
        (infinite, "X", "infinite", "correct"),
        (no_matrix, "X", "no matrix", "log1p"),
        (no_column, "obs['label']", "guide", "--column"),
        (no_control, "obs['label']", "AAVS1", "--control"),
        (few_conditions, "obs['label']", "9 perturbed conditions", "10 are needed"),
        (duplicated_cells, "obs_names", "'c1'", "unique"),
        (duplicated_genes, "var_names", "'g1'", "unique"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_a_remedy(
    plain: ad.AnnData,
    written: Written,
    spoil: Callable[[ad.AnnData], None],
    field: str,
    found: str,
    remedy: str,
) -> None:
    spoil(plain)
    path = written(plain)
    with pytest.raises(UserError) as error:
        calibrate_file(path, LABEL)
    assert error.value.where == str(path)
    assert error.value.field == field
    assert found in error.value.found
    assert remedy in error.value.remedy


@NOT_UNIQUE
@pytest.mark.parametrize(("spoil", "field"), [(duplicated_cells, "obs_names"), (duplicated_genes, "var_names")])
def test_names_must_be_unique_in_files_of_all_layouts(
    stored: ad.AnnData, pairs_cells: ad.AnnData, written: Written, spoil: Callable[[ad.AnnData], None], field: str
) -> None:
    for data in (pairs_cells.copy(), stored.copy()):
        spoil(data)
        with pytest.raises(UserError, match="duplicated names") as error:
            calibrate_file(written(data), TWO)
        assert error.value.field == field


@pytest.mark.parametrize("spoil", [counts, negative, not_a_number])
def test_values_are_checked_in_files_of_all_layouts(
    stored: ad.AnnData, pairs_cells: ad.AnnData, written: Written, spoil: Callable[[ad.AnnData], None]
) -> None:
    for data in (pairs_cells.copy(), stored.copy()):
        data.X = sparse.csr_matrix(data.X)
        spoil(data)
        with pytest.raises(UserError) as error:
            calibrate_file(written(data), TWO)
        assert error.value.field == "X"


def test_no_covariate_column_and_cells_without_a_covariate_are_refused(plain: ad.AnnData, written: Written) -> None:
    with pytest.raises(UserError, match="no such column") as error:
        calibrate_file(written(plain), LABEL._replace(covariate="donor"))
    assert "--covariate" in error.value.remedy
    plain.obs["donor"] = pd.Categorical(["d1"] * (plain.n_obs - 2) + [None, None])
    with pytest.raises(UserError, match="2 cells without a covariate"):
        calibrate_file(written(plain), LABEL._replace(covariate="donor"))


def test_one_combination_alone_is_refused_with_a_remedy(plain: ad.AnnData, written: Written) -> None:
    pair = "+".join(sorted(set(plain.obs["label"]) - {"control"})[:2])
    first = pair.split("+")[0]
    plain.obs["label"] = plain.obs["label"].replace({first: pair})
    path = written(plain)
    with pytest.raises(UserError, match="one combination") as error:
        calibrate_file(path, LABEL)
    assert error.value.where == str(path)


def test_no_file_and_no_h5ad_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        calibrate_file(tmp_path / "none.h5ad", TWO)
    (tmp_path / "text.h5ad").write_text("condition,gene\n")
    with pytest.raises(UserError, match="h5ad"):
        calibrate_file(tmp_path / "text.h5ad", TWO)
