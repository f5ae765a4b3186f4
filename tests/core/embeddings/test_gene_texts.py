"""Which text a gene has, from small files in the layout of NCBI's, and what is done with damaged ones."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.embeddings.gene_texts import MOST_BYTES, embed_texts, read_gene_texts, split_batches
from core.errors import UserError

SUMMARY = "#tax_id\tGeneID\tSource\tSummary"
# The columns of gene_info that are read, and two that are not.
INFO = "#tax_id\tGeneID\tSymbol\tLocusTag\tdescription\ttype_of_gene\tSymbol_from_nomenclature_authority"

GENES = [
    "9606\t3717\tJAK2\t-\tkinase\tprotein-coding\tJAK2",
    "9606\t6772\tSTAT1\t-\tfactor\tprotein-coding\tSTAT1",
    # HGNC calls the mitochondrial genes otherwise than NCBI.
    "9606\t4535\tND1\t-\tsubunit\tprotein-coding\tMT-ND1",
    # One symbol: HGNC's gene, though its number is larger.
    "9606\t7795\tMEMO1\t-\told\tunknown\t-",
    "9606\t51072\tMEMO1\t-\tmediator\tprotein-coding\tMEMO1",
    # One symbol, none of HGNC's: the smaller number, not the one that comes first as text.
    "9606\t900\tTRNA\t-\tt\ttRNA\t-",
    "9606\t1000\tTRNA\t-\tt\ttRNA\t-",
    # HGNC's gene has no summary, the other one's is not its own.
    "9606\t11\tTEC\t-\tkinase\tprotein-coding\tTEC",
    "9606\t12\tTEC\t-\tother\tunknown\t-",
    "9606\t110599580\tLOC110599580\t-\tenhancer\tbiological-region\t-",
    "10090\t16452\tJak2\t-\tkinase\tprotein-coding\tJak2",
]
SUMMARIES = [
    "9606\t3717\tRefSeq\tA kinase.  Binds  receptors. [provided by RefSeq, Jul 2020].",
    "9606\t6772\tOMIM\tA factor by OMIM. [supplied by OMIM, Mar 2008]",
    "9606\t6772\tRefSeq\tThe factor.",
    "9606\t6772\tAlliance of Genome Resources\tA factor by the Alliance.",
    "9606\t4535\tRefSeq\tA subunit.",
    "9606\t7795\tRefSeq\tAn old record.",
    "9606\t51072\tRefSeq\tA mediator.",
    "9606\t900\tRefSeq\tThe smaller.",
    "9606\t1000\tRefSeq\tThe larger.",
    "9606\t12\tRefSeq\tAnother gene.",
    "9606\t110599580\tRefSeq\tAn enhancer.",
    "10090\t16452\tRefSeq\tA kinase of the mouse.",
    "9606\t555\tRefSeq\tOf a gene without a name.",
]
TEXTS = {
    "JAK2": "A kinase. Binds receptors.",
    "MEMO1": "A mediator.",
    "MT-ND1": "A subunit.",
    "STAT1": "The factor.",
    "TRNA": "The smaller.",
}


def packed(path: Path, header: str, rows: list[str]) -> Path:
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in [header, *rows]).encode()))
    return path


@pytest.fixture
def texts_of(tmp_path: Path) -> Callable[..., dict[str, str]]:
    def call(summaries: list[str] = SUMMARIES, genes: list[str] = GENES) -> dict[str, str]:
        return read_gene_texts(
            packed(tmp_path / "gene_summary.gz", SUMMARY, summaries), packed(tmp_path / "gene_info.gz", INFO, genes)
        )

    return call


def test_a_gene_has_the_text_of_its_own_record(texts_of: Callable[..., dict[str, str]]) -> None:
    assert texts_of() == TEXTS


def test_the_order_of_the_rows_does_not_matter(texts_of: Callable[..., dict[str, str]]) -> None:
    wanted = list(texts_of().items())
    for seed in range(5):
        shuffled = [random.Random(seed).sample(rows, len(rows)) for rows in (SUMMARIES, GENES)]
        assert list(texts_of(*shuffled).items()) == wanted


@pytest.mark.parametrize("letter", ["x", "é"])
def test_what_is_too_long_is_cut_between_words(texts_of: Callable[..., dict[str, str]], letter: str) -> None:
    words = f"{letter * 99} " * 200
    (text,) = texts_of([f"9606\t3717\tRefSeq\t{words}"]).values()
    assert set(text.split(" ")) == {letter * 99}
    assert MOST_BYTES - 200 < len(text.encode()) <= MOST_BYTES
    (text,) = texts_of([f"9606\t3717\tRefSeq\t{letter * 9000}"]).values()
    assert set(text) == {letter}
    assert len(text.encode()) == MOST_BYTES


def test_without_any_text_there_is_no_embedding(texts_of: Callable[..., dict[str, str]]) -> None:
    with pytest.raises(UserError, match=r"none of a gene in gene_info.gz"):
        texts_of([*SUMMARIES[-3:], "9606\t3717\tRefSeq\t-", "9606\t6772\tRefSeq\t [provided by RefSeq, Jul 2020]"])


@pytest.mark.parametrize(
    ("content", "field", "found"),
    [
        (None, "format", "FileNotFoundError"),
        (b"#tax_id\tGeneID\tSource\tSummary\n", "format", "BadGzipFile"),
        (gzip.compress(f"{SUMMARY}\n9606\t1\tRefSeq\tA\n".encode() * 999)[:-20], "format", "EOFError"),
        (gzip.compress(b"#tax_id\tGeneID\tSource\tSummary\n9606\t1\tRefSeq\t\xff\n"), "format", "UnicodeDecodeError"),
        (gzip.compress(b"#tax_id\tGeneID\tText\n"), "Source", "#tax_id, GeneID, Text"),
        (gzip.compress(b""), "#tax_id", "no such column"),
        (gzip.compress(f"{SUMMARY}\n9606\t3717\tRefSeq\n".encode()), "line 2", "3 fields, the header has 4"),
    ],
    ids=["absent", "not-compressed", "cut-off", "not-utf8", "no-source", "empty", "short-line"],
)
def test_a_file_that_is_not_ncbis_is_named(tmp_path: Path, content: bytes | None, field: str, found: str) -> None:
    path = tmp_path / "gene_summary.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_gene_texts(path, packed(tmp_path / "gene_info.gz", INFO, GENES))
    assert (error.value.where, error.value.field) == (str(path), field)
    assert found in error.value.found


def test_batches_are_limited_in_number_and_length() -> None:
    texts = ["aaaa", "bb", "cc", "é" * 6, "d", "e", "f", "g"]
    # 4 + 2 + 2 bytes are too many, 12 bytes stand alone.
    assert list(split_batches(texts, 3, 7)) == [["aaaa", "bb"], ["cc"], ["é" * 6], ["d", "e", "f"], ["g"]]
    assert list(split_batches([], 3, 7)) == []


def test_genes_of_one_text_have_one_vector() -> None:
    vectors = {"one": np.float32([1, 2]), "two": np.float32([3, 4])}
    table = embed_texts({"B": "one", "A": "two", "C": "one"}, vectors)
    assert table.to_dict() == {"d0": {"A": 3.0, "B": 1.0, "C": 1.0}, "d1": {"A": 4.0, "B": 2.0, "C": 2.0}}
    assert list(table.index) == ["A", "B", "C"]
    assert table.index.name == "gene"


def test_vectors_of_different_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="vectors of 2 and of 3 numbers"):
        embed_texts({"A": "one", "B": "two"}, {"one": np.ones(2, np.float32), "two": np.ones(3, np.float32)})
