"""Gene embeddings: equal to scikit-learn and scanpy, the same bytes always, and missing genes stay missing."""

import zipfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scanpy as sc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.decomposition import PCA, TruncatedSVD
from threadpoolctl import threadpool_limits

from core.embeddings import tables as module
from core.embeddings.tables import (
    embed_coexpression,
    embed_fold,
    embed_pathways,
    join_tables,
    list_known_genes,
    read_embedding,
    read_foreign_embedding,
    read_gene_sets,
    require_coverage,
    split_by_coverage,
    write_embedding,
)
from core.errors import UserError
from model_containers import contract

GMT = "repair\tR-1\tBRCA1\tTP53\tATM\ncycle\tR-2\tTP53\tCDK1\ndeath\tR-3\tTP53\tBAX\tATM\tCASP3\n"


@pytest.fixture
def gmt(tmp_path):
    def write(text, name="sets.gmt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def random_gmt(genes, pathways, seed=0):
    rng = np.random.default_rng(seed)
    members = [rng.choice(genes, size=rng.integers(1, 8), replace=False) for _ in range(pathways)]
    return "".join(
        f"pathway {i}\tR-{i}\t" + "\t".join(f"G{gene:03d}" for gene in sorted(set(some))) + "\n"
        for i, some in enumerate(members)
    )


def dense_membership(text):
    """Genes, and the membership matrix with its columns divided by the root of the pathway's size."""
    lines = [line.split("\t") for line in text.splitlines()]
    genes = sorted({gene for _, _, *some in lines for gene in some})
    M = np.zeros((len(genes), len(lines)))
    for j, (_, _, *some) in enumerate(lines):
        M[[genes.index(gene) for gene in some], j] = 1 / np.sqrt(len(some))
    return genes, M


def cells(n=300, genes=40, seed=0):
    """log1p expression driven by three programmes of different strength: cells x genes."""
    rng = np.random.default_rng(seed)
    rate = np.exp(rng.normal(size=(n, 3)) * [1.0, 0.7, 0.5] @ rng.normal(size=(3, genes)) * 0.5)
    return sparse.csr_matrix(np.log1p(rng.poisson(rate)).astype(np.float32)), [f"G{i:02d}" for i in range(genes)]


def aligned(found, expected):
    """`expected` with the sign of each of its columns that fits `found`."""
    return expected * np.sign((found * expected).sum(axis=0))


# GMT files


def test_membership_has_one_sorted_row_per_pathway_and_gene(gmt):
    table = read_gene_sets(gmt(GMT))
    assert list(table.columns) == ["pathway", "description", "gene"]
    assert table.to_numpy().tolist() == [
        ["cycle", "R-2", "CDK1"],
        ["cycle", "R-2", "TP53"],
        ["death", "R-3", "ATM"],
        ["death", "R-3", "BAX"],
        ["death", "R-3", "CASP3"],
        ["death", "R-3", "TP53"],
        ["repair", "R-1", "ATM"],
        ["repair", "R-1", "BRCA1"],
        ["repair", "R-1", "TP53"],
    ]


@pytest.mark.parametrize(
    "text",
    [
        GMT.replace("\n", "\r\n"),
        "\ufeff" + GMT,
        GMT + "\n\n",
        GMT.replace("\tATM\n", "\tATM\tATM\t\n"),
        GMT.replace("TP53", " TP53 "),
    ],
    ids=["windows", "byte order mark", "blank lines", "repeated gene and trailing tab", "spaces"],
)
def test_harmless_differences_between_files_change_nothing(gmt, text):
    pd.testing.assert_frame_equal(read_gene_sets(gmt(text)), read_gene_sets(gmt(GMT, "plain.gmt")))


def test_an_empty_description_is_allowed_and_two_pathways_may_share_a_name(gmt):
    table = read_gene_sets(gmt("a\t\tG1\na\tother\tG1\n"))
    assert table[["pathway", "description"]].to_numpy().tolist() == [["a", ""], ["a", "other"]]


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        (GMT + "broken\n", "line 4", "no genes"),
        (GMT + "broken\tR-4\n", "line 4", "no genes"),
        (GMT + "broken\tR-4\t \t\n", "line 4", "no genes"),
        ("\n" + "\tR-1\tTP53\n", "line 2", "no name"),
        (GMT + "cycle\tR-2\tBAX\n", "line 4", "second time"),
        ("\n", "lines", "no pathway"),
        ("", "lines", "no pathway"),
    ],
)
def test_a_malformed_line_is_named(gmt, text, line, found):
    path = gmt(text)
    with pytest.raises(UserError) as error:
        read_gene_sets(path)
    assert (error.value.where, error.value.field) == (str(path), line)
    assert found in error.value.found


def test_a_zip_gives_what_its_gmt_gives(tmp_path, gmt):
    path = tmp_path / "sets.gmt.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/._sets.gmt", "junk")
        archive.writestr("README.txt", "about")
        archive.writestr("sets.gmt", GMT)
    pd.testing.assert_frame_equal(read_gene_sets(path), read_gene_sets(gmt(GMT)))


@pytest.mark.parametrize("names", [[], ["a.gmt", "b.gmt"]])
def test_a_zip_holds_one_gmt(tmp_path, names):
    path = tmp_path / "sets.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, GMT)
    with pytest.raises(UserError, match=rf"{len(names)} \.gmt files"):
        read_gene_sets(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path, gmt):
    with pytest.raises(UserError, match="No such file"):
        read_gene_sets(tmp_path / "none.gmt")
    with pytest.raises(UserError, match="neither text nor a whole archive"):
        read_gene_sets(gmt(b"\xff\xfe\x00a\tb"))


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "sets.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sets.gmt", GMT * 20)
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(UserError, match="neither text nor a whole archive"):
        read_gene_sets(path)


# Pathways


@pytest.mark.parametrize(("genes", "pathways"), [(60, 25), (25, 60)], ids=["more genes", "more pathways"])
def test_pathway_embedding_is_the_truncated_svd(gmt, genes, pathways):
    text = random_gmt(genes, pathways)
    names, M = dense_membership(text)
    found = embed_pathways(gmt(text), 6)
    assert list(found.index) == names
    assert list(found.columns) == [f"d{i}" for i in range(6)]
    expected = TruncatedSVD(6, algorithm="arpack", random_state=0).fit_transform(M)
    np.testing.assert_allclose(found, aligned(found.to_numpy(), expected), atol=1e-10)


def test_all_dimensions_keep_every_product_of_genes(gmt):
    text = random_gmt(30, 12)
    _, M = dense_membership(text)
    found = embed_pathways(gmt(text), 500).to_numpy()
    assert found.shape[1] == np.linalg.matrix_rank(M)
    np.testing.assert_allclose(found @ found.T, M @ M.T, atol=1e-12)


def test_signs_are_fixed(gmt):
    found = embed_pathways(gmt(random_gmt(40, 20)), 8).to_numpy()
    assert (np.take_along_axis(found, np.abs(found).argmax(axis=0)[None], axis=0) > 0).all()


def test_genes_outside_the_kept_dimensions_are_missing_not_zero(gmt):
    # Two separate pairs of pathways: one dimension holds the larger pair only.
    text = "a\t1\tA\tB\tC\nb\t2\tA\tB\tC\tD\nc\t3\tX\tY\n"
    assert list(embed_pathways(gmt(text), 1).index) == ["A", "B", "C", "D"]
    assert list(embed_pathways(gmt(text), 2).index) == ["A", "B", "C", "D", "X", "Y"]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_order_of_a_gmt_does_not_change_a_byte(tmp_path, gmt, data):
    lines = random_gmt(30, 15).splitlines()
    shuffled = [
        "\t".join([*line.split("\t")[:2], *data.draw(st.permutations(line.split("\t")[2:]))])
        for line in data.draw(st.permutations(lines))
    ]
    written = []
    for some in (lines, shuffled):
        write_embedding(embed_pathways(gmt("\n".join(some)), 10), tmp_path / "embedding.parquet")
        written.append((tmp_path / "embedding.parquet").read_bytes())
    assert written[0] == written[1]


@pytest.mark.shared
def test_reactome(shared):
    path = shared / "data" / "ReactomePathways.gmt"
    membership = read_gene_sets(path)
    assert membership["pathway"].nunique() == 2546
    assert membership["gene"].nunique() == 11391
    found = embed_pathways(path, 128)
    assert found.shape == (11391, 128)
    for file, covered, of in (("papalexi21.h5ad", 23, 25), ("norman19_small.h5ad", 18, 31)):
        labels = ad.read_h5ad(shared / "data" / file).obs["perturbation"].astype(str).unique()
        targets = {gene for label in labels if label != "control" for gene in label.split("+")}
        assert [len(some) for some in split_by_coverage(found.index, targets)] == [covered, of - covered]

    size = membership.groupby("pathway")["gene"].transform("size")
    row, column = (pd.factorize(membership[name], sort=True)[0] for name in ("gene", "pathway"))
    M = sparse.csr_matrix((1 / np.sqrt(size.to_numpy()), (row, column)))
    expected = TruncatedSVD(128, algorithm="arpack", random_state=0).fit_transform(M)
    np.testing.assert_allclose(found, aligned(found.to_numpy(), expected), atol=1e-9)


# Co-expression


def test_coexpression_equals_scikit_learn():
    X, genes = cells()
    found = embed_coexpression(X, genes, 5)
    pca = PCA(5, svd_solver="full").fit(X.toarray().astype(np.float64))
    expected = (pca.components_ * np.sqrt(pca.explained_variance_)[:, None]).T
    assert list(found.index) == genes
    np.testing.assert_allclose(found, aligned(found.to_numpy(), expected), atol=1e-10)


def test_coexpression_equals_scanpy():
    X, genes = cells()
    found = embed_coexpression(X, genes, 5)
    adata = ad.AnnData(X.astype(np.float64), var=pd.DataFrame(index=genes))
    sc.pp.pca(adata, n_comps=5, svd_solver="arpack")
    expected = adata.varm["PCs"] * np.sqrt(adata.uns["pca"]["variance"])
    np.testing.assert_allclose(found, aligned(found.to_numpy(), expected), atol=1e-5)


def test_with_all_dimensions_products_are_covariances_and_cosines_correlations():
    X, genes = cells()
    found = embed_coexpression(X, genes, 40).to_numpy()
    dense = X.toarray().astype(np.float64)
    np.testing.assert_allclose(found @ found.T, np.cov(dense, rowvar=False), atol=1e-10)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(unit @ unit.T, np.corrcoef(dense, rowvar=False), atol=1e-10)


def test_genes_of_one_programme_lie_close_together():
    rng = np.random.default_rng(1)
    activity = rng.normal(size=(400, 2))
    rate = np.exp(1 + np.repeat(activity, 10, axis=1))
    X = sparse.csr_matrix(np.log1p(rng.poisson(rate)).astype(np.float32))
    found = embed_coexpression(X, [f"G{i:02d}" for i in range(20)], 2).to_numpy()
    cosine = found @ found.T / np.outer(*[np.linalg.norm(found, axis=1)] * 2)
    same = np.kron(np.eye(2, dtype=bool), np.ones((10, 10), dtype=bool))
    assert cosine[same].min() > 0.8
    assert np.abs(cosine[~same]).max() < 0.5


def test_constant_genes_are_missing():
    X, genes = cells(n=50, genes=6)
    dense = X.toarray()
    dense[:, 1] = 0
    dense[:, 4] = np.float32(0.7)
    found = embed_coexpression(sparse.csr_matrix(dense), genes, 4)
    assert list(found.index) == ["G00", "G02", "G03", "G05"]
    others = [0, 2, 3, 5]
    without = embed_coexpression(sparse.csr_matrix(dense[:, others]), [genes[i] for i in others], 4)
    pd.testing.assert_frame_equal(found, without, check_exact=True)


def test_fewer_cells_than_dimensions_give_fewer_dimensions():
    X, genes = cells(n=6, genes=40)
    found = embed_coexpression(X, genes, 32)
    assert found.shape[1] == 5
    dense = X.toarray().astype(np.float64)[:, [genes.index(gene) for gene in found.index]]
    np.testing.assert_allclose(found @ found.T, np.cov(dense, rowvar=False), atol=1e-12)


def test_the_order_of_the_genes_does_not_change_a_bit():
    X, genes = cells()
    order = np.random.default_rng(3).permutation(len(genes))
    shuffled = embed_coexpression(X[:, order], [genes[i] for i in order], 8)
    pd.testing.assert_frame_equal(embed_coexpression(X, genes, 8), shuffled, check_exact=True)


def test_the_number_of_threads_does_not_change_a_bit(monkeypatch):
    X, genes = cells(n=700, genes=260)
    monkeypatch.setattr(module, "GENES_AT_ONCE", 64)
    monkeypatch.setattr(module, "CELLS_AT_ONCE", 200)
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(
            module, "ThreadPoolExecutor", lambda workers=threads, pool=module.ThreadPoolExecutor: pool(workers)
        )
        with threadpool_limits(threads):
            results.append(embed_coexpression(X, genes, 16))
    pd.testing.assert_frame_equal(*results, check_exact=True)


@pytest.mark.parametrize(("genes_at_once", "cells_at_once"), [(7, 1), (40, 300), (13, 64)])
def test_tiles_add_up_to_the_whole(monkeypatch, genes_at_once, cells_at_once):
    X, genes = cells()
    whole = embed_coexpression(X, genes, 5)
    monkeypatch.setattr(module, "GENES_AT_ONCE", genes_at_once)
    monkeypatch.setattr(module, "CELLS_AT_ONCE", cells_at_once)
    np.testing.assert_allclose(embed_coexpression(X, genes, 5), whole, atol=1e-11)


@pytest.mark.parametrize("n", [0, 1, 20])
def test_cells_in_which_no_gene_varies_are_refused(n):
    X = sparse.csr_matrix(np.full((n, 3), 0.5, dtype=np.float32))
    with pytest.raises(UserError, match=f"{n} cells in which no gene varies"):
        embed_coexpression(X, ["A", "B", "C"], 2)


@pytest.mark.parametrize("genes", [["A", "B"], ["A", "B", "B"]])
def test_gene_names_must_fit_the_matrix(genes):
    with pytest.raises(ValueError, match=r"3 columns for \d genes, 2 of them distinct"):
        embed_coexpression(sparse.csr_matrix(np.eye(3, dtype=np.float32)), genes, 2)


# Files and coverage


def test_an_embedding_survives_its_file(tmp_path, gmt):
    table = embed_pathways(gmt(GMT), 2)
    path = tmp_path / "embedding.parquet"
    write_embedding(table, path)
    pd.testing.assert_frame_equal(read_embedding(path), table, check_exact=True)


@pytest.mark.parametrize(
    ("table", "field", "found"),
    [
        (pd.DataFrame({"d0": [1.0]}, index=["A"]), "index", "None"),
        (pd.DataFrame({"d0": [1.0]}, index=pd.Index([7], name="gene")), "index", "int"),
        (pd.DataFrame({"d0": [1.0, 2.0]}, index=pd.Index(["A", "A"], name="gene")), "gene", "more than once: A"),
        (pd.DataFrame({"d0": ["x"]}, index=pd.Index(["A"], name="gene")), "columns", "d0"),
        (pd.DataFrame(index=pd.Index(["A"], name="gene")), "columns", "1 genes"),
        (pd.DataFrame({"d0": []}, index=pd.Index([], name="gene", dtype=str)), "columns", "0 genes"),
        (pd.DataFrame({"d0": [1.0, 0.0]}, index=pd.Index(["A", "B"], name="gene")), "gene", "B"),
        (pd.DataFrame({"d0": [1.0, np.nan]}, index=pd.Index(["A", "B"], name="gene")), "gene", "B"),
        (pd.DataFrame({"d0": [np.inf, 1.0]}, index=pd.Index(["A", "B"], name="gene")), "gene", "A"),
    ],
)
def test_a_file_that_is_no_embedding_is_refused(tmp_path, table, field, found):
    path = tmp_path / "embedding.parquet"
    table.to_parquet(path)
    with pytest.raises(UserError) as error:
        read_embedding(path)
    assert (error.value.where, error.value.field) == (str(path), field)
    assert found in error.value.found


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    path = tmp_path / "embedding.parquet"
    path.write_text("gene,d0\nA,1\n")
    with pytest.raises(UserError, match="not a readable parquet table"):
        read_embedding(path)
    with pytest.raises(UserError, match="not a readable parquet table"):
        read_embedding(tmp_path / "none.parquet")


def test_several_stand_side_by_side(tmp_path):
    one = pd.DataFrame({"d0": [1.0, 2.0]}, index=pd.Index(["B", "A"], name="gene"))
    other = pd.DataFrame({"d0": [3.0, 4.0], "d1": [5.0, 0.0]}, index=pd.Index(["A", "C"], name="gene"))
    found = join_tables({"one": one, "other": other})
    nan = np.nan
    expected = pd.DataFrame(
        {"one/d0": [2, 1, nan], "other/d0": [3, nan, 4], "other/d1": [5, nan, 0]},
        index=pd.Index(["A", "B", "C"], name="gene"),
    )
    pd.testing.assert_frame_equal(found, expected)
    write_embedding(found, tmp_path / "several.parquet")
    assert list(list_known_genes(tmp_path / "several.parquet")) == ["A", "B", "C"]
    read = contract.read_sources(tmp_path / "several.parquet")
    assert list(read) == ["one", "other"]
    for name, table in (("one", one), ("other", other)):
        np.testing.assert_array_equal(read[name].sort_index(), table.sort_index())
        assert sorted(read[name].index) == sorted(table.index)


def test_a_plain_embedding_is_one_source(tmp_path):
    table = pd.DataFrame({"d0": [1.0, 2.0]}, index=pd.Index(["B", "A"], name="gene"))
    write_embedding(table, tmp_path / "embedding.parquet")
    read = contract.read_sources(tmp_path / "embedding.parquet")
    assert list(read) == ["embedding"]
    pd.testing.assert_frame_equal(read["embedding"], table)
    assert list(list_known_genes(tmp_path / "embedding.parquet")) == ["B", "A"]


def test_a_graph_is_read_in_one_order(tmp_path):
    edges = [("B", "A", 0.5), ("A", "C", 0.5), ("A", "B", 0.5), ("A", "D", 1.0)]
    pd.DataFrame(edges, columns=["gene", "neighbour", "weight"]).to_parquet(tmp_path / "graph.parquet")
    read = contract.read_graph(tmp_path / "graph.parquet")
    assert read.to_numpy().tolist() == [["A", "D", 1.0], ["A", "B", 0.5], ["A", "C", 0.5], ["B", "A", 0.5]]
    assert set(list_known_genes(tmp_path / "graph.parquet")) == {"A", "B"}


@pytest.mark.parametrize(
    ("columns", "fault"), [({"weight": [1.5]}, "weight that is not"), ({"weight": [0.0]}, "weight that is not"),
                           ({"share": [0.5]}, "wanted gene, neighbour, weight")]
)  # fmt: skip
def test_what_is_no_graph_is_refused(tmp_path, columns, fault):
    pd.DataFrame({"gene": ["A"], "neighbour": ["B"]} | columns).to_parquet(tmp_path / "graph.parquet")
    with pytest.raises(contract.ContractError, match=fault):
        contract.read_graph(tmp_path / "graph.parquet")
    with pytest.raises(contract.ContractError, match="needs a graph"):
        contract.read_graph(None)


def test_coverage_tells_apart_what_an_embedding_has(gmt):
    table = embed_pathways(gmt(GMT), 2)
    assert split_by_coverage(table.index, ["TP53", "NONE", "ATM", "TP53"]) == (["ATM", "TP53"], ["NONE"])
    assert require_coverage("mine", table.index, ["NONE", "ATM"]) == (["ATM"], ["NONE"])
    assert split_by_coverage(table.index, []) == ([], [])


def test_an_embedding_without_any_perturbed_gene_is_refused(gmt):
    table = embed_pathways(gmt(GMT), 2)
    with pytest.raises(UserError, match=r"none of the 2 perturbed genes \(G0001, G0002\)") as error:
        require_coverage("reactome", table.index, ["G0002", "G0001"])
    assert error.value.where == "embedding reactome"
    assert "ATM" in error.value.found


def test_the_coexpression_of_a_fold_comes_from_its_train_cells_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X = sparse.csr_matrix(rng.poisson(1.0, (60, 12)).astype(np.float32))
    genes = [f"g{number:02d}" for number in range(12)]
    split = np.array(["train"] * 40 + ["val"] * 20)
    obs = pd.DataFrame({"split": split}, index=[f"c{number}" for number in range(60)])
    cells = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=genes))
    cells.write_h5ad(tmp_path / "train.h5ad")
    pd.testing.assert_frame_equal(embed_fold(tmp_path, 4), embed_coexpression(X[:40], genes, 4))


TABLE = {"gene": ["B", "A"], "x": [1.0, 2.0], "y": [3, 4]}


def test_a_foreign_table_is_read_sorted_whatever_its_columns_are_called(tmp_path: Path) -> None:
    pd.DataFrame(TABLE).set_index("gene").to_parquet(tmp_path / "embedding.parquet")
    found = read_foreign_embedding(tmp_path / "embedding.parquet")
    expected = pd.DataFrame({"d0": [2.0, 1.0], "d1": [4.0, 3.0]}, index=pd.Index(["A", "B"], name="gene"))
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ({"gene": ["A"], "x": [[0.0] * 9]}, "no numbers in x"),
        ({"gene": ["A"], "x": ["a"]}, "no numbers in x"),
        ({"gene": [1], "x": [1.0]}, "no numbers in"),
        ({"x": [1.0]}, "no numbers in"),
        ({"gene": ["A" * 101], "x": [1.0]}, "longer than 100 characters"),
        ({"gene": ["A", None], "x": [1.0, 2.0]}, "a name that is none"),
        ({"gene": ["A" * 10**6] * 3, "x": [1.0] * 3}, "longer than 100 characters"),
        ({"gene": ["A", "A"], "x": [1.0, 2.0]}, "more than once: A"),
        ({"gene": ["A"], "x": [float("nan")]}, "zero or not finite: A"),
        ({"gene": ["A"], "x": [0.0]}, "zero or not finite: A"),
        ({"gene": pd.Series([], dtype=str), "x": pd.Series([], dtype=float)}, "0 genes"),
    ],
)
def test_a_foreign_table_that_is_none_is_refused(tmp_path: Path, table: dict[str, Any], found: str) -> None:
    path = tmp_path / "embedding.parquet"
    pq.write_table(pa.Table.from_pandas(pd.DataFrame(table), preserve_index=False), path)
    with pytest.raises(UserError) as error:
        read_foreign_embedding(path)
    assert found in error.value.found
    assert len(error.value.found) < 500


def test_a_foreign_table_of_too_much_is_refused_before_it_is_read(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "embedding.parquet"
    pq.write_table(pa.table({"gene": [f"{row:098d}" for row in range(1100)], "x": [1.0] * 1100}), path)
    monkeypatch.setattr(pq, "read_table", None)
    monkeypatch.setattr(module, "MOST_NAMES_BYTES", 100_000)
    with pytest.raises(UserError, match="1,100 rows of 2 columns, names of 1"):
        read_foreign_embedding(path)
    monkeypatch.setattr(module, "MOST_NAMES_BYTES", 10**9)
    monkeypatch.setattr(module, "MOST_VALUES", 2000)
    with pytest.raises(UserError, match="1,100 rows of 2 columns"):
        read_foreign_embedding(path)


def test_what_is_no_parquet_file_or_none_of_its_own_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "embedding.parquet"
    with pytest.raises(UserError, match="not there"):
        read_foreign_embedding(path)
    path.write_bytes(b"PAR1 and more")
    with pytest.raises(UserError, match="no parquet table"):
        read_foreign_embedding(path)
    path.unlink()
    pd.DataFrame(TABLE).to_parquet(tmp_path / "other.parquet")
    path.symlink_to(tmp_path / "other.parquet")
    with pytest.raises(UserError, match="not there"):
        read_foreign_embedding(path)
