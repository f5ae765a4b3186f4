"""A graph between genes: which genes share annotated terms, and how many of them.

The terms come from a Gene Ontology annotation file (GAF) or from gene sets (GMT). Two genes' weight is the Jaccard
index of their term sets: the number of terms that both carry over the number that at least one carries.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from core.arrays import Floats, Ints
from core.embeddings.tables import read_gene_sets
from core.errors import UserError

GENES_AT_ONCE = 256
HUMAN = "taxon:9606"
# Columns of GAF 2.2, counted from 0: symbol, qualifier (`NOT|involved_in`), GO id, aspect, taxon.
SYMBOL, QUALIFIER, TERM, ASPECT, TAXON = 2, 3, 4, 8, 12
ASPECTS = {"C", "F", "P"}


def build_gene_graph(terms: pd.DataFrame, most: int, among: Collection[str] = ()) -> pd.DataFrame:
    """Find the most similar genes of every gene.

    The columns are `gene`, `neighbour` (str) and `weight` (float64, 0 < weight <= 1). A gene that shares no term with
    another has no row. A neighbour's own neighbours need not hold the gene.

    Parameters
    ----------
    terms : pd.DataFrame
        Columns `gene`, `term`; a pair that occurs twice counts once.
    most : int
        How many neighbours a gene keeps at most, those of the largest weight, of equal ones those first by name.
    among : Collection[str]
        The genes that the graph is between; if empty, all that carry a term. Rows are sorted by gene, falling weight,
        neighbour.

    Returns
    -------
    pd.DataFrame
    """
    pairs = terms[["gene", "term"]].drop_duplicates()
    pairs = pairs[pairs["gene"].isin(list(among))] if among else pairs
    genes, gene = np.unique(pairs["gene"].to_numpy(dtype=str), return_inverse=True)
    names, term = np.unique(pairs["term"].to_numpy(dtype=str), return_inverse=True)
    carries = sparse.csr_matrix((np.ones(len(gene)), (gene, term)), shape=(len(genes), len(names)))
    of_term = carries.T.tocsr()
    n_terms = np.bincount(gene, minlength=len(genes)).astype(np.float64)
    parts = []
    for start in range(0, len(genes), GENES_AT_ONCE):
        shared = (carries[start : start + GENES_AT_ONCE] @ of_term).tocsr()
        shared.sort_indices()  # genes by name: what decides between equal weights
        for row in range(shared.shape[0]):
            entries = slice(shared.indptr[row], shared.indptr[row + 1])
            parts.append(_nearest(start + row, shared.indices[entries], shared.data[entries], n_terms, most))
    table = np.concatenate(parts) if parts else np.empty((0, 3))
    of, neighbour = (genes[table[:, column].astype(np.intp)].astype(object) for column in (0, 1))
    return pd.DataFrame({"gene": of, "neighbour": neighbour, "weight": table[:, 2]})


def _nearest(gene: int, others: Ints, shared: Floats, n_terms: Floats, most: int) -> Floats:
    """Return one gene's rows (gene, neighbour, weight) by falling weight.

    others, shared: the genes that it shares terms with, and how many terms.
    """
    is_other = others != gene
    others, shared = others[is_other], shared[is_other]
    weight = shared / (n_terms[gene] + n_terms[others] - shared)
    if len(weight) > most:
        # Sorting is for the few: a term such as `protein binding` makes neighbours of nearly all genes.
        enough = weight >= np.partition(weight, -most)[-most]
        others, weight = others[enough], weight[enough]
    order = np.argsort(-weight, kind="stable")[:most]
    return np.column_stack([np.full(len(order), float(gene)), others[order], weight[order]])


def read_gene_terms(path: Path) -> pd.DataFrame:
    """Read which terms each gene carries: columns `gene`, `term`, sorted, each pair once; from a GAF or a GMT file.

    A file that begins with `!gaf-version` is one of annotations to the Gene Ontology (`read_annotations`); any other is
    taken for gene sets (core.embeddings.tables.read_gene_sets), whose terms are name and description. A GAF may be
    gzipped, a GMT zipped.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    pd.DataFrame
    """
    if _is_gaf(path):
        return read_annotations(path)
    membership = read_gene_sets(path)
    term = membership["pathway"] + "\t" + membership["description"]
    table = pd.DataFrame({"gene": membership["gene"], "term": term})
    return table.sort_values(["gene", "term"], ignore_index=True)


def read_annotations(path: Path) -> pd.DataFrame:
    """Read the human annotations of a GAF 2.x file, plain or gzipped: columns `gene` (symbol), `term` (GO id).

    All three aspects count (process, function, component). Left out are lines whose qualifier says NOT and those of
    other organisms; of two taxa in a line the first is the gene's, the second that of an organism it acts on.

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
        With the line, for one that is no annotation, and where no line is left.
    """
    pairs = set()
    for number, content in _lines(path):
        line = content.decode("utf-8", errors="replace")
        if line.startswith("!") or not line.strip():
            continue
        fields = line.split("\t")
        is_annotation = len(fields) > TAXON and fields[TERM].startswith("GO:") and fields[ASPECT] in ASPECTS
        if not is_annotation or not fields[SYMBOL]:
            remedy = "give a GAF 2.2 file: 13 fields or more, separated by tabs, with symbol, GO id, aspect and taxon"
            raise UserError(path, f"line {number}", f"{line[:60]!r}", remedy)
        is_human = fields[TAXON].split("|")[0] == HUMAN
        if is_human and "NOT" not in fields[QUALIFIER].upper().split("|"):
            pairs.add((fields[SYMBOL], fields[TERM]))
    if not pairs:
        raise UserError(path, "taxon", f"no annotation of {HUMAN}", "give the annotations of human genes")
    return pd.DataFrame(sorted(pairs), columns=["gene", "term"])


def _is_gaf(path: Path) -> bool:
    return next(_lines(path), (1, b""))[1].startswith(b"!gaf-version")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Return the lines of a file, unzipped where it is gzipped, counted from 1."""
    try:
        with path.open("rb") as file:
            is_zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_zipped else path.open("rb") as file:
            yield from enumerate(file, start=1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            path, "file", f"not readable to its end: {error}", "check the path, or download it again"
        ) from error
