"""cells.h5ad is what docs/science.md, section 1, says, step by step, and the same whatever the file's order."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

from core.catalog.registry import Catalog
from core.catalog.schema import DatasetSpec
from core.errors import UserError
from core.io.h5ad import open_h5ad
from core.io.panels import split_rows
from core.io.raw_matrix import Rows
from core.prepare.cells import (
    cap_conditions,
    count_genes_and_cells,
    mask_small_conditions,
    normalise_counts,
    read_cells,
    write_cells,
)
from core.prepare.plan import Plan
from core.simulate import SimulationSettings, simulate

Entry = Callable[..., DatasetSpec]
Prepare = Callable[..., ad.AnnData]


def report_of(cells: ad.AnnData) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(cells.uns["preparation"])
    return report


def same(a: ad.AnnData, b: ad.AnnData) -> bool:
    """Whether all that cells.h5ad holds is the same, bit by bit."""
    pd.testing.assert_frame_equal(a.obs, b.obs)
    assert list(a.var_names) == list(b.var_names)
    assert a.uns["preparation"] == b.uns["preparation"]
    pairs = [(a.X, b.X), (a.layers["counts"], b.layers["counts"])]
    return all(
        getattr(x, part).tobytes() == getattr(y, part).tobytes()
        for x, y in pairs
        for part in ("data", "indices", "indptr")
    )


def draw(step: str, covariate: str, condition: str, n: int, size: int) -> np.ndarray:
    digest = sha256(f"{step}/{covariate}/{condition}".encode()).digest()
    return np.random.default_rng([42, int.from_bytes(digest[:8], "big")]).choice(n, size=size, replace=False)


def by_hand(raw: ad.AnnData, covariates: pd.Series, spec: DatasetSpec) -> ad.AnnData:
    """Steps 1 to 5 with scanpy and loops, dense; the labels are `A` or `A+B` already."""
    cells = ad.AnnData(raw.X.toarray(), obs=pd.DataFrame({"condition": raw.obs["perturbation"].astype(str)}))
    cells.obs["covariate"] = covariates.astype(str).to_numpy()
    cells.var_names = raw.var_names
    cells = cells[:, ~cells.var_names.duplicated(keep=False)].copy()
    sc.pp.filter_cells(cells, min_genes=spec.min_genes_per_cell)
    sc.pp.filter_genes(cells, min_cells=spec.min_cells_per_gene)
    cells.layers["counts"] = cells.X.copy()
    sc.pp.normalize_total(cells, target_sum=spec.target_sum)
    sc.pp.log1p(cells)
    groups = {key: sorted(group.index) for key, group in cells.obs.groupby(["covariate", "condition"])}
    groups = {k: g for k, g in groups.items() if len(g) >= spec.min_cells_per_condition or k[1] == "control"}
    kept = []
    for (covariate, condition), names in groups.items():
        sizes = [len(g) for k, g in groups.items() if k[0] == covariate]
        most = spec.max_control_cells if condition == "control" else round(sum(sizes) / len(sizes))
        chosen = draw("cap", covariate, condition, len(names), most) if len(names) > most else range(len(names))
        kept += sorted(names[i] for i in chosen)
    cells = cells[kept].copy()
    sc.pp.highly_variable_genes(cells, n_top_genes=spec.n_variable_genes, flavor="seurat")
    perturbed = {gene for _, condition in groups if condition != "control" for gene in condition.split("+")}
    genes = sorted(g for g in cells.var_names if cells.var["highly_variable"][g] or g in perturbed)
    return cells[:, genes].copy()


# The whole


@pytest.mark.parametrize("kind", ["single", "pairs", "lines"])
def test_cells_equal_steps_by_hand(prepared: Prepare, kind: str, request: pytest.FixtureRequest, entry: Entry) -> None:
    raw = request.getfixturevalue(f"{kind}_raw").copy()
    # Some cells are poor, some genes rare, some symbols twice: every step has something to do.
    counts = raw.X.tolil()
    counts[:40, 20:] = 0
    counts[:, 5] = 0
    counts[[100, 200], 5] = 2
    counts[:, 6] = 0
    counts[[0, 150, 250], 6] = 3  # in three cells, but one of them is poor
    counts[:, 7] = 0
    counts[[110, 150, 250], 7] = 1
    raw.X = sparse.csr_matrix(counts)
    names = raw.var_names.to_numpy().astype(object)
    names[10:12] = "twice"
    raw.var_names = names
    fields: dict[str, Any] = {"task": "combination"} if kind == "pairs" else {}
    fields |= {"covariate_column": "cell_line"} if kind == "lines" else {}
    spec = entry(max_control_cells=50, min_cells_per_condition=18, n_variable_genes=80, **fields)
    expected = by_hand(raw, raw.obs["cell_line"] if kind == "lines" else pd.Series("all", raw.obs.index), spec)
    cells = prepared(raw, spec, "raw.h5ad")
    assert list(cells.obs_names) == list(expected.obs_names)
    assert list(cells.var_names) == list(expected.var_names)
    assert not {names[5], names[6], "twice"} & set(cells.var_names)
    assert list(cells.obs["condition"].astype(str)) == list(expected.obs["condition"])
    assert list(cells.obs["covariate"].astype(str)) == list(expected.obs["covariate"])
    np.testing.assert_array_equal(cells.layers["counts"].toarray(), expected.layers["counts"])
    np.testing.assert_allclose(cells.X.toarray(), expected.X, rtol=1e-6)
    report = report_of(cells)
    assert report["genes dropped because their symbol occurs more than once"] == ["twice"]
    assert report["cells dropped for too few genes"] == 40
    assert report["genes dropped for too few cells"] >= 2
    assert report["conditions dropped for too few cells"]
    assert report["cells kept after the cap"] == cells.n_obs < report["cells in the file"] - 40
    assert report["genes kept"] == cells.n_vars


def test_layout(screen: ad.AnnData) -> None:
    for matrix in (screen.X, screen.layers["counts"]):
        assert isinstance(matrix, sparse.csr_matrix)
        assert matrix.dtype == np.float32
        assert matrix.has_sorted_indices
        assert (matrix.data > 0).all()
    counts = screen.layers["counts"]
    assert np.array_equal(counts.data, np.round(counts.data))
    assert counts.indices.tolist() == screen.X.indices.tolist()
    obs = screen.obs
    keys = list(zip(obs["covariate"].astype(str), obs["condition"].astype(str), obs_names_of(screen), strict=True))
    assert keys == sorted(keys)
    assert list(screen.var_names) == sorted(screen.var_names)
    assert list(obs.columns[:3]) == ["condition", "covariate", "half"]
    assert all(column.startswith("fold_") for column in obs.columns[3:])
    assert all(isinstance(obs[column].dtype, pd.CategoricalDtype) for column in obs)
    assert set(obs["half"].cat.categories) == {"first_half", "second_half"}
    assert set(screen.layers) == {"counts"}
    assert set(screen.uns) == {"preparation"}


def obs_names_of(cells: ad.AnnData) -> list[str]:
    return [str(name) for name in cells.obs_names]


@pytest.mark.parametrize("kind", ["single", "pairs", "lines"])
def test_order_of_rows_and_genes_and_storage_do_not_matter(
    prepared: Prepare, kind: str, request: pytest.FixtureRequest, entry: Entry
) -> None:
    raw, cells = request.getfixturevalue(f"{kind}_raw"), request.getfixturevalue(f"{kind}_cells")
    spec = entry(**{"pairs": {"task": "combination"}, "lines": {"covariate_column": "cell_line"}}.get(kind, {}))
    rng = np.random.default_rng(5)
    shuffled = raw[rng.permutation(raw.n_obs)][:, rng.permutation(raw.n_vars)].copy()
    assert same(prepared(shuffled, spec, "shuffled.h5ad"), cells)
    dense = ad.AnnData(raw.X.toarray().astype(np.int64), obs=raw.obs.astype(str), var=raw.var)
    assert same(prepared(dense, spec, "dense.h5ad"), cells)
    columns = ad.AnnData(sparse.csc_matrix(raw.X, dtype=np.float64), obs=raw.obs, var=raw.var)
    assert same(prepared(columns, spec, "columns.h5ad"), cells)
    zeros = raw.X.copy()
    zeros.data[::7] = 0
    absent = zeros.copy()
    absent.eliminate_zeros()
    stored, left_out = (ad.AnnData(x, obs=raw.obs, var=raw.var) for x in (zeros, absent))
    assert same(prepared(stored, spec, "stored.h5ad"), prepared(left_out, spec, "left_out.h5ad"))


def test_memory_changes_no_bit(prepared: Prepare, pairs_raw: ad.AnnData, entry: Entry) -> None:
    """From one value at a time (a row is then a chunk) to all at once; blocks of columns have at least a thousand.

    Of every fourth cell: a chunk per row is slow, and a fourth has many rows, too.
    """
    few = pairs_raw[::4].copy()
    spec = entry(task="combination", min_cells_per_condition=4)
    cells = prepared(few, spec)
    assert cells.n_obs > 100
    for storage, least in ((sparse.csr_matrix, 1), (np.asarray, 1), (sparse.csc_matrix, 100_000)):
        raw = ad.AnnData(storage(few.X.toarray()), obs=few.obs, var=few.var)
        for memory in (least, 250_000, 1 << 30):
            assert same(prepared(raw, spec, memory=memory), cells)


def test_panels_are_summed_in_their_order(prepared: Prepare, single_raw: ad.AnnData, entry: Entry, monkeypatch) -> None:
    """A panel smaller than the data: the moments behind the choice of genes are the same to rounding."""
    cells = prepared(single_raw, entry(n_variable_genes=60))
    monkeypatch.setattr("core.io.external_sort.split_rows", partial(split_rows, rows=37))
    assert same(prepared(single_raw, entry(n_variable_genes=60)), cells)


def test_counts_may_be_in_a_layer(
    prepared: Prepare, single_raw: ad.AnnData, single_cells: ad.AnnData, entry: Entry
) -> None:
    raw = ad.AnnData(np.log1p(single_raw.X), obs=single_raw.obs, var=single_raw.var, layers={"raw": single_raw.X})
    assert same(prepared(raw, entry(counts_layer="raw")), single_cells)
    with pytest.raises(UserError, match="layers there are: raw"):
        prepared(raw, entry(counts_layer="counts"))
    with pytest.raises(UserError, match="whole numbers"):
        prepared(raw, entry())


def test_written_cells_are_read_back_with_their_provenance(
    single_raw: ad.AnnData, single_cells: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    single_raw.write_h5ad(tmp_path / "raw.h5ad")
    provenance = {"entry": "screen", "code": "0", "source sha256": None}
    write_cells(tmp_path / "raw.h5ad", entry(), provenance, tmp_path)
    cells = read_cells(tmp_path).to_memory()
    assert same(cells, single_cells)
    assert json.loads(cells.uns["provenance"]) == provenance


def test_matrices_stay_on_disk(single_raw: ad.AnnData, entry: Entry, tmp_path: Path) -> None:
    single_raw.write_h5ad(tmp_path / "raw.h5ad")
    write_cells(tmp_path / "raw.h5ad", entry(), {}, tmp_path)
    cells = read_cells(tmp_path)
    for matrix in (cells.X, cells.layers["counts"]):
        assert not sparse.issparse(matrix)
        assert sparse.issparse(matrix[2:5])


# Step 2: filters


def surveyed(counts: np.ndarray | sparse.csr_matrix, min_genes: int, at_once: int) -> tuple[list[int], list[int]]:
    """Genes of each cell, and cells of each gene, of a small matrix that is read `at_once` rows at a time."""
    stored = sparse.csr_matrix(counts, dtype=np.float32)
    n, width = stored.shape
    matrix = Rows(width, [slice(i, min(i + at_once, n)) for i in range(0, n, at_once)], lambda span: stored[span])
    names = Plan(np.arange(n), pd.DataFrame(index=range(n)), np.arange(width), pd.Index(range(width)), {})
    n_genes, n_cells = count_genes_and_cells(matrix, names, min_genes, "x")
    return n_genes.tolist(), n_cells.tolist()


@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_cells_are_filtered_before_genes(at_once: int) -> None:
    counts = np.array([[1, 1, 1, 0], [1, 1, 0, 1], [0, 1, 0, 9], [2, 3, 4, 5]])
    # The third cell has two genes; it counts for none of them.
    assert surveyed(counts, 3, at_once) == ([3, 3, 2, 4], [3, 3, 2, 2])


def test_a_stored_zero_is_no_gene_of_a_cell() -> None:
    counts = sparse.csr_matrix(np.ones((4, 3), dtype=np.float32))
    counts.data[:2] = 0
    assert surveyed(counts, 2, 4) == ([1, 3, 3, 3], [3, 3, 3])


def test_symbols_that_occur_twice_count_for_no_cell(prepared: Prepare, single_raw: ad.AnnData, entry: Entry) -> None:
    """Step 1 comes before step 2: a cell's genes are counted without the dropped ones."""
    raw = single_raw.copy()
    counts = raw.X.tolil()
    counts[0] = 0
    counts[0, :20] = 1
    raw.X = sparse.csr_matrix(counts)
    assert report_of(prepared(raw, entry(), "x"))["cells dropped for too few genes"] == 0
    raw.var_names = ["a", "a", *raw.var_names[2:]]
    assert report_of(prepared(raw, entry(), "x"))["cells dropped for too few genes"] == 1


# Step 3: normalisation


def test_normalisation_equals_scanpy(single_raw: ad.AnnData) -> None:
    expected = single_raw.copy()
    sc.pp.normalize_total(expected, target_sum=5000)
    sc.pp.log1p(expected)
    np.testing.assert_allclose(normalise_counts(single_raw.X, None, 5000).toarray(), expected.X.toarray(), rtol=1e-6)


def test_normalisation_by_library_size(prepared: Prepare, single_raw: ad.AnnData, entry: Entry) -> None:
    raw = single_raw.copy()
    sizes = np.random.default_rng(0).uniform(500, 5000, raw.n_obs)
    raw.obs["total"] = sizes
    cells = prepared(raw, entry(library_size="total"), "x")
    rows = raw.obs_names.get_indexer(cells.obs_names)
    expected = np.log1p(1e4 * raw[rows][:, cells.var_names].X.toarray() / sizes[rows, None])
    np.testing.assert_allclose(cells.X.toarray(), expected, rtol=1e-6)
    np.testing.assert_array_equal(cells.obs["library_size"], sizes[rows])


def test_a_cell_without_counts_stays_zero() -> None:
    assert normalise_counts(sparse.csr_matrix((2, 3), dtype=np.float32), None, 1e4).nnz == 0


# Step 4: small conditions and cap


def test_small_conditions_go_by_covariate_and_control_stays() -> None:
    sizes = {("x", "A"): 12, ("x", "B"): 11, ("x", "control"): 2, ("y", "A"): 11, ("y", "B"): 12, ("y", "control"): 12}
    obs = pd.DataFrame([key for key, n in sizes.items() for _ in range(n)], columns=["covariate", "condition"])
    left = obs[~mask_small_conditions(obs, 12)].groupby(["covariate", "condition"]).size().to_dict()
    assert left == {("x", "A"): 12, ("x", "control"): 2, ("y", "B"): 12, ("y", "control"): 12}


@pytest.mark.parametrize(
    ("sizes", "most", "kept"),
    [
        ([40, 10, 10, 20], 8192, [20, 10, 10, 20]),  # mean 20 with control (the last) counted as one
        ([30, 10, 10, 100], 50, [30, 10, 10, 50]),  # the mean is that before control's own cap
        ([9, 5, 5, 7], 8192, [6, 5, 5, 7]),  # 6.5 goes to the even number
        ([9, 5, 5, 11], 8192, [8, 5, 5, 11]),  # as does 7.5
        ([5, 5, 5, 5], 3, [5, 5, 5, 3]),
    ],
)
def test_cap(sizes: list[int], most: int, kept: list[int]) -> None:
    names = ["A", "B", "C", "control"]
    obs = pd.DataFrame({"condition": np.repeat(names, sizes), "covariate": "x"})
    obs.index = obs.index.astype(str)
    left = obs[cap_conditions(obs, most, 42)]["condition"].value_counts()
    assert [left[name] for name in names] == kept


def test_cap_counts_each_covariate_for_itself() -> None:
    obs = pd.DataFrame({"condition": ["A"] * 30 + ["control"] * 10 + ["A"] * 4 + ["control"] * 2})
    obs["covariate"] = ["x"] * 40 + ["y"] * 6
    obs.index = [f"{i:02d}" for i in range(len(obs))]
    left = obs[cap_conditions(obs, 100, 42)].groupby(["covariate", "condition"]).size()
    assert left.to_dict() == {("x", "A"): 20, ("x", "control"): 10, ("y", "A"): 3, ("y", "control"): 2}


def test_cap_draws_by_name() -> None:
    obs = pd.DataFrame({"condition": ["A"] * 30 + ["B"] * 10 + ["control"] * 8, "covariate": "x"})
    obs.index = np.random.default_rng(2).permutation([f"c{i:03d}" for i in range(len(obs))])
    kept = set(obs.index[cap_conditions(obs, 100, 42)])
    names = np.array(sorted(obs.index[obs["condition"] == "A"]))
    assert kept & set(names) == set(names[draw("cap", "x", "A", 30, 16)])
    shuffled = obs.iloc[np.random.default_rng(3).permutation(len(obs))]
    assert set(shuffled.index[cap_conditions(shuffled, 100, 42)]) == kept
    assert set(obs.index[cap_conditions(obs, 100, 43)]) != kept


def test_conditions_below_four_cells_go_whatever_is_asked(
    prepared: Prepare, single_raw: ad.AnnData, entry: Entry
) -> None:
    labels = single_raw.obs["perturbation"].astype(str)
    first, second = sorted(set(labels))[:2]
    keep = ~labels.isin([first, second]).to_numpy()
    keep[np.flatnonzero(labels == first)[:3]] = True
    keep[np.flatnonzero(labels == second)[:4]] = True
    cells = prepared(single_raw[keep].copy(), entry(min_cells_per_condition=1, min_genes_per_cell=0), "x")
    assert first not in set(cells.obs["condition"])
    assert (cells.obs["condition"] == second).sum() == 4
    assert report_of(cells)["conditions dropped for too few cells"] == [f"all {first}"]


# Step 5: genes


def test_perturbed_genes_are_always_kept(prepared: Prepare, pairs_raw: ad.AnnData, entry: Entry) -> None:
    cells = prepared(pairs_raw, entry(task="combination", n_variable_genes=1), "x")
    conditions = set(cells.obs["condition"].astype(str)) - {"control"}
    perturbed = {gene for condition in conditions for gene in condition.split("+")}
    measured = perturbed & set(pairs_raw.var_names)
    assert measured < perturbed
    assert measured <= set(cells.var_names)
    assert len(cells.var_names) <= len(measured) + 1
    assert report_of(cells)["perturbed genes that are not measured"] == sorted(perturbed - measured)


# What remains must be enough


@pytest.mark.parametrize(
    ("fields", "field", "found"),
    [
        ({"min_genes_per_cell": 5000}, "filters", "no cell or no gene left"),
        ({"min_cells_per_gene": 50000}, "filters", "no cell or no gene left"),
        (
            {"min_cells_per_condition": 40},
            "obs['perturbation']",
            "perturbed conditions of at least 40 cells; 10 are needed",
        ),
    ],
)
def test_too_little_left_is_refused(
    prepared: Prepare, fields: dict[str, Any], field: str, found: str, single_raw: ad.AnnData, entry: Entry
) -> None:
    with pytest.raises(UserError) as error:
        prepared(single_raw, entry(**fields), "screen.h5ad")
    assert (Path(error.value.where).name, error.value.field) == ("screen.h5ad", field)
    assert found in error.value.found
    assert "`min_cells_per_condition` in the catalog entry" in error.value.remedy


def test_control_that_the_filters_leave_without_cells_is_refused(
    prepared: Prepare, lines_raw: ad.AnnData, entry: Entry
) -> None:
    raw = lines_raw.copy()
    counts = raw.X.tolil()
    controls = (raw.obs["perturbation"] == "control") & (raw.obs["cell_line"] == "line_2")
    counts[np.flatnonzero(controls), 5:] = 0
    raw.X = sparse.csr_matrix(counts)
    with pytest.raises(UserError) as error:
        prepared(raw, entry(covariate_column="cell_line"), "screen.h5ad")
    assert (Path(error.value.where).name, error.value.field) == ("screen.h5ad", "filters")
    assert error.value.found == "no control cell left in line_2"
    assert "`min_genes_per_cell`" in error.value.remedy


# Real and golden data


@pytest.mark.shared
def test_papalexi_panel(prepared: Prepare, shared: Path) -> None:
    cells = prepared(
        open_h5ad(shared / "data" / "papalexi21.h5ad"), Catalog().dataset("papalexi21_panel"), "papalexi21"
    )
    assert cells.shape == (17164, 299)
    assert cells.obs["condition"].nunique() == 26
    sizes = cells.obs["condition"].value_counts()
    # 19,763 sure cells of 26 conditions: the cap is 760.
    assert sizes.drop("control").max() == round(19763 / 26) == 760
    assert sizes["control"] == 2304
    assert sizes["SPI1"] == 47
    assert report_of(cells)["cells dropped by the entry's filters"] == 966


@pytest.mark.shared
def test_norman_panel(prepared: Prepare, shared: Path) -> None:
    raw = open_h5ad(shared / "data" / "norman19_small.h5ad")
    cells = prepared(raw, Catalog().dataset("norman19_small"), "norman19_small")
    conditions = set(cells.obs["condition"]) - {"control"}
    assert len(conditions) == 33
    assert sum("+" in condition for condition in conditions) == 15
    assert "TMSB4X" in cells.var_names
    sizes = raw.obs.loc[cells.obs_names, "norm_total"].to_numpy(float)
    expected = np.log1p(1e4 * cells.layers["counts"].toarray() / sizes[:, None])
    np.testing.assert_allclose(cells.X.toarray(), expected, rtol=1e-6)


@pytest.mark.shared
def test_golden_raw_file(prepared: Prepare, shared: Path, entry: Entry) -> None:
    """The layout of norman19's published file: labels `A_B`."""
    raw = open_h5ad(shared / "golden" / "combo_raw.h5ad")
    spec = entry(
        task="combination",
        labels={"column": "perturbation", "separator": "_", "control": ["control"]},
        covariate="K562",
        min_genes_per_cell=200,
        n_variable_genes=8192,
    )
    cells = prepared(raw, spec, "combo_raw.h5ad")
    labels = raw.obs["perturbation"].astype(str).unique()
    expected = {"+".join(sorted(label.split("_"))) for label in labels}
    assert set(cells.obs["condition"]) == expected
    assert sum("+" in condition for condition in expected) == 16
    assert set(cells.obs["covariate"]) == {"K562"}
    mirror = open_h5ad(shared / "golden" / "combo_mirror.h5ad")
    # The mirror holds the same cells, normalised the same way, beside cells that its own cap left in.
    there = {str(name).rsplit("_", 1)[0]: i for i, name in enumerate(mirror.obs_names)}
    both = [name for name in cells.obs_names if name in there]
    assert len(both) > 1000
    genes = [g for g in cells.var_names if g in set(mirror.var_names)]
    x = cells[both][:, genes].X.toarray()
    y = mirror[[there[name] for name in both]][:, genes].X.toarray()
    np.testing.assert_allclose(x, y, rtol=1e-5)


def test_a_fold_without_training_perturbations_in_a_covariate_is_refused(
    prepared: Prepare,
) -> None:
    settings = SimulationSettings(genes=200, singles=12, cell_lines=("line_1", "line_2"), cells_per_condition=20)
    raw = simulate(settings).cells
    labels = raw.obs["perturbation"].astype(str)
    # In line_2 only control and one perturbation remain: when that one is test, nothing is left to train with.
    one = sorted(set(labels) - {"control"})[0]
    keep = (raw.obs["cell_line"] == "line_1") | labels.isin(["control", one])
    spec = DatasetSpec.model_validate(
        {
            "name": "lopsided",
            "title": "t",
            "task": "single",
            "source": {"kind": "local", "hint": "none"},
            "labels": {"column": "perturbation"},
            "covariate_column": "cell_line",
            "min_genes_per_cell": 0,
        }
    )
    with pytest.raises(UserError, match="no perturbation to train with in line_2"):
        prepared(raw[keep.to_numpy()].copy(), spec, "raw.h5ad")
