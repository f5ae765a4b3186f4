"""What NCBI writes about human genes, and the embedding that vectors of these texts make.

Two files of NCBI Gene: gene_summary.gz (tax_id, GeneID, Source, Summary; all species) and
Homo_sapiens.gene_info.gz (GeneID, Symbol and more). Both are tables separated by tabs, gzipped, with a header.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from core.errors import UserError, shown

HUMAN = "9606"
TAXON = "#tax_id"
NOTHING = ("", "-")  # how NCBI writes that there is none
# Enhancers and silencers, over 100,000 of them, with summaries of one pattern.
NO_GENE = "biological-region"
# A model that takes 8,192 tokens takes 8,000 bytes of any text: a token is a byte at least.
MOST_BYTES = 8_000
# Who wrote a summary, and in which month, says nothing about the gene.
CREDIT = re.compile(r"\s*\[(?:provided|supplied) by [^\]]*\]\.?")


def read_gene_texts(summaries: Path, genes: Path) -> dict[str, str]:
    """Return gene symbol -> what NCBI writes about the human gene; sorted by symbol, whatever the order in the files.

    Parameters
    ----------
    summaries : Path
        The file gene_summary.gz.
    genes : Path
        The file Homo_sapiens.gene_info.gz. A gene is called as HGNC calls it, where HGNC does not name it as NCBI does.
        Of several genes with one symbol the one that HGNC calls so has it, else the one with the smallest GeneID; where
        that one has no summary, another's is not taken. Genes without a summary are left out, and so is what is no gene
        (`NO_GENE`). Of several summaries of a gene the one by RefSeq counts, then the first by source and letters.
        Credits in brackets are taken out, runs of blanks made one, and of a text over `MOST_BYTES` bytes (UTF-8) the
        words beyond are cut off.

    Returns
    -------
    dict[str, str]

    Raises
    ------
    UserError
        For a file that is not there, no gzipped table with these columns, or damaged, and where no gene has a summary.
    """
    named = _gene_of_symbol(genes)
    found: dict[str, tuple[bool, str, str]] = {}
    for gene, source, summary in _human_rows(summaries, ("GeneID", "Source", "Summary")):
        text = " ".join(CREDIT.sub("", summary).split())
        if text not in NOTHING:
            candidate = (source != "RefSeq", source, text)
            found[gene] = min(found.get(gene, candidate), candidate)
    texts = {symbol: _cut(found[gene][2]) for symbol, gene in sorted(named.items()) if gene in found}
    if not texts:
        raise UserError(summaries, "Summary", f"none of a gene in {genes.name}", "give the two files of NCBI Gene")
    return texts


def _gene_of_symbol(path: Path) -> dict[str, str]:
    """Symbol -> GeneID, one for each symbol."""
    columns = ("GeneID", "Symbol", "type_of_gene", "Symbol_from_nomenclature_authority")
    best: dict[str, tuple[bool, int, str]] = {}
    for gene, symbol, kind, authority in _human_rows(path, columns):
        official = authority not in NOTHING
        name = authority if official else symbol
        if kind == NO_GENE or name in NOTHING:
            continue
        # Numbers by their value: those of fewer digits first.
        candidate = (not official, len(gene), gene)
        best[name] = min(best.get(name, candidate), candidate)
    return {name: gene for name, (_, _, gene) in best.items()}


def _human_rows(path: Path, columns: Sequence[str]) -> Iterator[list[str]]:
    """Return the values of these columns in each human row."""
    remedy = "give the file as NCBI publishes it: a gzipped table, separated by tabs, with its header"
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            header = file.readline().rstrip("\n").split("\t")
            missing = [name for name in (TAXON, *columns) if name not in header]
            if missing:
                raise UserError(path, missing[0], f"no such column; there are {shown(header)}", remedy)
            taxon, places = header.index(TAXON), [header.index(name) for name in columns]
            for number, line in enumerate(file, start=2):
                fields = line.rstrip("\n").split("\t")
                if len(fields) != len(header):
                    found = f"{len(fields)} fields, the header has {len(header)}"
                    raise UserError(path, f"line {number}", found, remedy)
                if fields[taxon] == HUMAN:
                    yield [fields[place] for place in places]
    # Zlib's and EOFError: an archive that is damaged or breaks off.
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(path, "format", f"not readable ({type(error).__name__}: {error})", remedy) from error


def _cut(text: str) -> str:
    """Return the text, or its first words that are at most MOST_BYTES long."""
    encoded = text.encode()
    if len(encoded) <= MOST_BYTES:
        return text
    head = encoded[:MOST_BYTES].decode(errors="ignore")
    return head.rpartition(" ")[0] or head


def split_batches(texts: Iterable[str], most_texts: int, most_bytes: int) -> Iterator[list[str]]:
    """Split texts into lists, in order.

    Parameters
    ----------
    texts : Iterable[str]
        In this order.
    most_texts, most_bytes : int
        How many texts a list has at most, and how long (UTF-8) they are together at most; a text that is longer than
        that has a list of its own.

    Yields
    ------
    Iterator[list[str]]
    """
    batch: list[str] = []
    size = 0
    for text in texts:
        length = len(text.encode())
        if batch and (len(batch) == most_texts or size + length > most_bytes):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += length
    if batch:
        yield batch


def embed_texts(texts: Mapping[str, str], vectors: Mapping[str, npt.NDArray[np.float32]]) -> pd.DataFrame:
    """Make an embedding of the vectors of the genes' texts.

    Genes (index, sorted) x d0, d1, ... (float32).

    Parameters
    ----------
    texts : Mapping[str, str]
        Gene -> text.
    vectors : Mapping[str, npt.NDArray[np.float32]]
        Text -> its vector, of every text.

    Returns
    -------
    pd.DataFrame

    Raises
    ------
    UserError
        Where they differ in length.
    """
    genes = sorted(texts)
    lengths = sorted({len(vectors[texts[gene]]) for gene in genes})
    if len(lengths) > 1:
        found = f"vectors of {lengths[0]} and of {lengths[-1]} numbers"
        raise UserError("service of texts", "dimensions", found, "give the entry `dimensions`")
    values = np.stack([vectors[texts[gene]] for gene in genes])
    columns = [f"d{column}" for column in range(values.shape[1])]
    return pd.DataFrame(values, index=pd.Index(genes, name="gene", dtype=object), columns=columns)
