"""Gene embeddings: tables genes x dimensions that tell a model what a gene is.

A gene without an embedding is missing from the table, never a row of zeros: what a model cannot predict for lack of
one can then be reported.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import linalg, sparse

from core.arrays import Floats, fix_signs, limit_blas_threads
from core.errors import UserError, shown
from core.prepare.files import FOLD_CELLS

CELLS_AT_ONCE = 2048
GENES_AT_ONCE = 1024
# A row this much shorter than its gene's full profile holds rounding errors, no knowledge.
VANISHING = 1e-10
# In an embedding that others made: 100,000 genes x 4,096 dimensions, 3.3 GB.
MOST_VALUES = 100_000 * 4_096
LONGEST_NAME, MOST_NAMES_BYTES = 100, 100_000 * 100


def read_gene_sets(path: Path) -> pd.DataFrame:
    """Read the pathways of a GMT file, one row per (pathway, gene): columns `pathway`, `description`, `gene`.

    Parameters
    ----------
    path : Path
        GMT text (name, description, genes; separated by tabs), or a .zip that holds one .gmt. A gene listed twice in a
        pathway counts once; rows are sorted, so that the order of lines and genes in the file does not matter.

    Returns
    -------
    pd.DataFrame

    Raises
    ------
    UserError
        With the line, for a line without a name or without genes and for a pathway that occurs twice (same name and
        description); and for a file that is not text or holds no pathway.
    """
    rows: dict[tuple[str, str], set[str]] = {}
    for number, line in enumerate(_gmt_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        name, description, *genes = (field.strip() for field in [*line.split("\t"), ""])
        members = {gene for gene in genes if gene}
        if not name or not members:
            remedy = "give lines of name, description and genes, separated by tabs"
            raise UserError(path, f"line {number}", f"{line[:60]!r}: {'no genes' if name else 'no name'}", remedy)
        if (name, description) in rows:
            raise UserError(path, f"line {number}", f"{name!r} for the second time", "keep one of the two")
        rows[name, description] = members
    if not rows:
        raise UserError(path, "lines", "no pathway", "give a GMT file: name, description and genes, separated by tabs")
    return pd.DataFrame(
        [(*pathway, gene) for pathway in sorted(rows) for gene in sorted(rows[pathway])],
        columns=["pathway", "description", "gene"],
    )


def _gmt_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                held = [name for name in archive.namelist() if name.endswith(".gmt") and "__MACOSX" not in name]
                if len(held) != 1:
                    raise UserError(path, "archive", f"{len(held)} .gmt files", "give a .zip that holds one .gmt")
                content = archive.read(held[0])
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(path, "file", error.strerror or str(error), "check the path and its permissions") from error
    # RuntimeError: an encrypted archive, or one packed in a way that zipfile does not know.
    except (UnicodeDecodeError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise UserError(
            path, "format", f"neither text nor a whole archive ({error})", "give a GMT file, or a .zip that holds one"
        ) from error


def embed_pathways(path: Path, dimensions: int) -> pd.DataFrame:
    """Make an embedding by truncated SVD of pathway membership.

    Genes (index, sorted) x d0, d1, ... (float64). M (genes x pathways) is 1/sqrt(pathway size) where the gene is a
    member, else 0, so that every pathway weighs the same; M = U S V', and a gene's row is its first `dimensions`
    entries of M V. From the exact eigendecomposition of the smaller Gram matrix. Fewer columns where M has a lower
    rank: the others would be zero. A gene whose pathways lie outside the kept dimensions is missing.

    Parameters
    ----------
    path : Path
        The file.
    dimensions : int
        The most columns.

    Returns
    -------
    pd.DataFrame

    Raises
    ------
    UserError
        As `read_gene_sets` does.
    """
    membership = read_gene_sets(path)
    genes, gene = np.unique(membership["gene"].to_numpy(dtype=str), return_inverse=True)
    pathway = membership.groupby(["pathway", "description"], sort=True).ngroup().to_numpy()
    size = np.bincount(pathway)
    M = sparse.csr_matrix((1 / np.sqrt(size[pathway]), (gene, pathway)), shape=(len(genes), len(size)))
    with limit_blas_threads():
        if len(genes) < len(size):
            values, vectors = _leading((M @ M.T).toarray(), dimensions)
            scores = vectors * np.sqrt(values)
        else:
            values, vectors = _leading((M.T @ M).toarray(), dimensions)
            scores = np.asarray(M @ vectors)
    return _table(scores, genes, norms=np.sqrt(np.asarray(M.multiply(M).sum(axis=1)).ravel()))


def embed_coexpression(X: sparse.csr_matrix, genes: Sequence[str], dimensions: int) -> pd.DataFrame:
    """Make an embedding of the genes' principal component loadings.

    Genes (index, sorted) x d0, d1, ... (float64). With the gene-gene covariance C = V L V' (over cells, n-1), a gene's
    row is its entries of V sqrt(L) for the largest eigenvalues: the product of two rows approximates the genes'
    covariance, their cosine the genes' correlation. Exact eigendecomposition; the result does not depend on the number
    of threads. Fewer columns than `dimensions` where C has a lower rank. Genes that are constant over the cells, or
    whose variance lies outside the kept dimensions, have no embedding and are missing.

    Parameters
    ----------
    X : sparse.csr_matrix
        Cells x genes, log1p, of a fold's training cells only (test cells would leak into the embedding).
    genes : Sequence[str]
        The names of its columns.
    dimensions : int
        The most columns.

    Returns
    -------
    pd.DataFrame

    Raises
    ------
    UserError
        Where no gene varies; ValueError where `genes` does not fit X or repeats a name.
    """
    names = np.asarray(genes, dtype=str)
    if X.shape[1] != len(names) or len(np.unique(names)) != len(names):
        raise ValueError(f"{X.shape[1]} columns for {len(names)} genes, {len(np.unique(names))} of them distinct")
    order = np.argsort(names)
    # Extremes, not a variance: rounding would give a constant gene a tiny one.
    varies = _dense_row(X.max(axis=0)) > _dense_row(X.min(axis=0)) if X.shape[0] else np.zeros(len(names), dtype=bool)
    order = order[varies[order]]
    if not len(order):
        found = f"{X.shape[0]} cells in which no gene varies"
        remedy = "choose an embedding that is made without cells, e.g. reactome"
        raise UserError("coexpression embedding", "training cells", found, remedy)
    n = X.shape[0]
    total, covariance = _sums(X, order)
    covariance -= np.outer(total, total / n)
    covariance /= n - 1
    norms = np.sqrt(covariance.diagonal())
    with limit_blas_threads():
        values, vectors = _leading(covariance, dimensions)
    return _table(vectors * np.sqrt(values), names[order], norms)


def _sums(X: sparse.csr_matrix, columns: npt.NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Return sums of the given columns and of all their products (X'X), in float64.

    Dense blocks: at the density of log1p expression faster than a sparse product. Every tile of the result is summed by
    one thread in the order of the cells, so that the number of threads changes time only.
    """
    total, products = np.zeros(len(columns)), np.zeros((len(columns), len(columns)))
    spans = [slice(start, start + GENES_AT_ONCE) for start in range(0, len(columns), GENES_AT_ONCE)]
    tiles = list(combinations_with_replacement(spans, 2))
    with limit_blas_threads(), ThreadPoolExecutor() as pool:
        for start in range(0, X.shape[0], CELLS_AT_ONCE):
            block = X[start : start + CELLS_AT_ONCE][:, columns].toarray().astype(np.float64)
            total += block.sum(axis=0)

            def add(tile: tuple[slice, slice], block: Floats = block) -> None:
                products[tile] += block[:, tile[0]].T @ block[:, tile[1]]

            list(pool.map(add, tiles))
    for rows, others in tiles:
        products[others, rows] = products[rows, others].T
    return total, products


def _leading(gram: Floats, dimensions: int) -> tuple[Floats, Floats]:
    """Return the largest eigenvalues (k) of a symmetric matrix and their eigenvectors (n x k), largest first.

    k is `dimensions`, or the matrix's numerical rank where that is lower. Call it within limit_blas_threads().
    """
    n = len(gram)
    values, vectors = linalg.eigh(gram, subset_by_index=[max(n - dimensions, 0), n - 1])
    values, vectors = values[::-1], vectors[:, ::-1]
    real = values > values[0] * n * np.finfo(np.float64).eps
    return values[real], vectors[:, real]


def _table(scores: Floats, genes: npt.NDArray[np.str_], norms: Floats) -> pd.DataFrame:
    """Frame an embedding with fixed signs, without the genes whose row vanishes against `norms`, their full length."""
    scores = fix_signs(scores.T).T
    kept = np.linalg.norm(scores, axis=1) > VANISHING * norms
    columns = [f"d{i}" for i in range(scores.shape[1])]
    return pd.DataFrame(scores[kept], index=pd.Index(genes[kept], name="gene", dtype=object), columns=columns)


def _dense_row(row: sparse.coo_matrix) -> Floats:
    return np.asarray(row.toarray(), dtype=np.float64).ravel()


def embed_fold(fold: Path, dimensions: int) -> pd.DataFrame:
    """Make the coexpression embedding of the training cells of a fold.

    Only cells of the split `train` count: val cells, which models may use to stop early, are left out.

    Parameters
    ----------
    fold : Path
        The folder with its train.h5ad (core.prepare.training_data).
    dimensions : int
        The most columns.

    Returns
    -------
    pd.DataFrame
    """
    cells = ad.read_h5ad(fold / FOLD_CELLS)
    training = cells[(cells.obs["split"] == "train").to_numpy()]
    return embed_coexpression(training.X, list(training.var_names), dimensions)


def join_tables(embeddings: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Put several embeddings into one table.

    The union of their genes (index, sorted) x `<name>/<dimension>` (float64); NaN in all dimensions of an embedding
    that lacks the gene.

    Parameters
    ----------
    embeddings : Mapping[str, pd.DataFrame]
        Name -> table.

    Returns
    -------
    pd.DataFrame
    """
    named = [table.add_prefix(f"{name}/") for name, table in embeddings.items()]
    return pd.concat(named, axis=1, join="outer").sort_index().rename_axis("gene")


def write_embedding(embedding: pd.DataFrame, path: Path) -> None:
    """Write an embedding as parquet, `gene` (the index), d0, d1, ...; the same table gives the same bytes.

    Parameters
    ----------
    embedding : pd.DataFrame
        Genes x dimensions.
    path : Path
        The file.
    """
    embedding.to_parquet(path)


def read_embedding(path: Path) -> pd.DataFrame:
    """Read the embedding in a parquet file: index `gene` (str), float64 columns.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    pd.DataFrame

    Raises
    ------
    UserError
        For a file that is no parquet table, an index other than `gene`, a gene that is missing or occurs twice, columns
        that are not numbers, and rows that are not finite or all zero.
    """
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(
            path, "format", f"not a readable parquet table: {error}", "give an embedding.parquet"
        ) from error
    return _checked(table, path)


def _checked(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return a table that is an embedding, float64.

    Raises UserError as `read_embedding` does.
    """
    remedy = "give genes (index `gene`) x dimensions, numbers only, without genes that have no embedding"
    if table.index.name != "gene" or not table.index.map(lambda gene: isinstance(gene, str)).all():
        raise UserError(path, "index", f"{table.index.name!r}, {table.index.dtype}", remedy)
    if table.index.has_duplicates:
        raise UserError(path, "gene", f"more than once: {shown(sorted(table.index[table.index.duplicated()]))}", remedy)
    if table.empty or not all(pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes):
        raise UserError(path, "columns", f"{len(table)} genes, columns {shown(list(map(str, table.columns)))}", remedy)
    table = table.astype(np.float64)
    values = table.to_numpy()
    useless = ~np.isfinite(values).all(axis=1) | (values == 0).all(axis=1)
    if useless.any():
        raise UserError(path, "gene", f"zero or not finite: {shown(sorted(table.index[useless]))}", remedy)
    return table


def read_foreign_embedding(path: Path) -> pd.DataFrame:
    """Read an embedding that others wrote, rows sorted by gene, columns d0, d1, ...

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    pd.DataFrame

    Raises
    ------
    UserError
        Also where it is not there, is no plain file, or holds anything but names (of at most LONGEST_NAME characters)
        and plain numbers, or more than MOST_VALUES of them: compressed, they may take little room.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "write a table genes x dimensions: `gene`, d0, d1, ... (docs/models.md)"
    if path.is_symlink() or not path.is_file():
        raise UserError(path.name, "file", "not there", remedy)
    try:
        about = pq.read_metadata(path)
        schema = about.schema.to_arrow_schema()
        others = {field.name for field in schema if not _is_number(field.type)}
        if others != {"gene"}:
            raise UserError(path.name, "columns", f"no numbers in {shown(sorted(others - {'gene'}))}", remedy)
        column = schema.get_field_index("gene")
        groups = [about.row_group(number).column(column) for number in range(about.num_row_groups)]
        names_bytes = sum(group.total_uncompressed_size for group in groups)
        if about.num_rows * len(schema) > MOST_VALUES or names_bytes > MOST_NAMES_BYTES:
            found = f"{about.num_rows:,} rows of {len(schema):,} columns, names of {names_bytes:,} bytes"
            raise UserError(path.name, "size", found, f"write at most {MOST_VALUES:,} values: one row a gene")
        # Each name once, however often it occurs.
        names = pq.read_table(path, columns=["gene"], read_dictionary=["gene"])["gene"].unique().to_pylist()
        if any(not isinstance(name, str) or len(name) > LONGEST_NAME for name in names):
            found = f"a name that is none, or longer than {LONGEST_NAME} characters"
            raise UserError(path.name, "gene", found, "give symbols")
        table = pq.read_table(path, use_pandas_metadata=False).to_pandas(ignore_metadata=True).set_index("gene")
    except (OSError, pa.ArrowException) as error:
        raise UserError(path.name, "format", f"no parquet table: {error}", remedy) from error
    checked = _checked(table, path).sort_index()
    return checked.set_axis([f"d{column}" for column in range(checked.shape[1])], axis=1)


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def list_known_genes(path: Path) -> pd.Index:
    """Return the genes that a file of any form knows: an embedding, several side by side, or a graph.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    pd.Index
    """
    import pyarrow.parquet as pq

    names = pq.read_schema(path).names
    if "neighbour" in names:
        return pd.Index(pd.read_parquet(path, columns=["gene"])["gene"].unique())
    if any("/" in name for name in names):
        return pd.read_parquet(path, columns=["gene"]).index
    return read_embedding(path).index


def split_by_coverage(known: pd.Index, genes: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the distinct genes that are known and those that are not, each sorted.

    Parameters
    ----------
    known : pd.Index
        Genes that have an embedding.
    genes : Iterable[str]
        The wanted genes.

    Returns
    -------
    tuple[list[str], list[str]]
    """
    wanted = set(genes)
    covered = wanted.intersection(known)
    return sorted(covered), sorted(wanted - covered)


def require_coverage(name: str, known: pd.Index, genes: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split the perturbed genes by coverage, as `split_by_coverage` does.

    Parameters
    ----------
    name : str
        Of the embedding.
    known : pd.Index
        Genes that have an embedding.
    genes : Iterable[str]
        The wanted genes.

    Returns
    -------
    tuple[list[str], list[str]]

    Raises
    ------
    UserError
        Where the embedding `name` has none of them.
    """
    covered, missing = split_by_coverage(known, genes)
    if not covered:
        raise UserError(
            f"embedding {name}",
            "gene",
            f"none of the {len(missing)} perturbed genes ({shown(missing)}); its genes are like "
            f"{shown(sorted(map(str, known)), 3)}",
            "choose an embedding with the symbols of the data set",
        )
    return covered, missing
