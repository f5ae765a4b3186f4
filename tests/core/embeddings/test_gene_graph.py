"""The graph of shared terms: equal to set arithmetic gene by gene, and what of an annotation file counts."""

from __future__ import annotations

import gzip
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.embeddings import gene_graph as module
from core.embeddings.gene_graph import build_gene_graph, read_gene_terms
from core.errors import UserError

TERMS = {"A": "xyz", "B": "xyz", "C": "xy", "D": "zw", "E": "q"}


def table(terms_of: dict[str, str]) -> pd.DataFrame:
    """One row per gene and letter."""
    return pd.DataFrame([(gene, term) for gene, terms in terms_of.items() for term in terms], columns=["gene", "term"])


def by_sets(terms_of: dict[str, set[str]], most: int) -> list[tuple[str, str, float]]:
    """The definition, pair by pair."""
    rows = []
    for gene, mine in sorted(terms_of.items()):
        weights = {
            other: len(mine & theirs) / len(mine | theirs)
            for other, theirs in terms_of.items()
            if other != gene and mine & theirs
        }
        nearest = sorted(weights, key=lambda other: (-weights[other], other))[:most]
        rows += [(gene, other, weights[other]) for other in nearest]
    return rows


def test_a_graph_by_hand():
    graph = build_gene_graph(table(TERMS), 100)
    assert list(graph.columns) == ["gene", "neighbour", "weight"]
    assert list(graph.itertuples(index=False, name=None)) == [
        ("A", "B", 1.0),
        ("A", "C", 2 / 3),
        ("A", "D", 1 / 4),
        ("B", "A", 1.0),
        ("B", "C", 2 / 3),
        ("B", "D", 1 / 4),
        ("C", "A", 2 / 3),
        ("C", "B", 2 / 3),
        ("D", "A", 1 / 4),
        ("D", "B", 1 / 4),
    ], "E shares no term"
    assert graph["weight"].dtype == np.float64


def test_of_equal_neighbours_the_first_by_name_are_kept():
    graph = build_gene_graph(table(TERMS), most=1)
    assert list(graph["neighbour"]) == ["B", "A", "A", "A"]


@given(
    st.dictionaries(
        st.text("ABCDEFGH", min_size=1, max_size=2), st.sets(st.integers(0, 6), min_size=1), min_size=1, max_size=12
    ),
    st.integers(1, 4),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_it_is_that_of_sets_whatever_the_order_and_the_size_of_the_blocks(terms_of, most, at_once, random):
    pairs = [(gene, str(term)) for gene, terms in terms_of.items() for term in terms] * 2
    random.shuffle(pairs)
    expected = by_sets({gene: set(map(str, terms)) for gene, terms in terms_of.items()}, most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GENES_AT_ONCE", at_once)
        found = build_gene_graph(pd.DataFrame(pairs, columns=["gene", "term"]), most)
    assert list(found.itertuples(index=False, name=None)) == expected


def test_no_term_is_shared():
    graph = build_gene_graph(table({"A": "x", "B": "y"}), 100)
    assert list(graph.columns) == ["gene", "neighbour", "weight"]
    assert graph.empty
    assert build_gene_graph(table({}), 100).empty


# ---- files


def annotation(symbol: str, term: str, qualifier: str = "involved_in", aspect: str = "P", taxon: str = "taxon:9606"):
    fields = ["UniProtKB", "P0", symbol, qualifier, term, "PMID:1", "IDA", "", aspect, "", "", "protein", taxon]
    return "\t".join([*fields, "20260101", "UniProt", "", ""]) + "\n"


GAF = (
    "!gaf-version: 2.2\n!\n"
    + annotation("TP53", "GO:2", "enables", "F")
    + annotation("TP53", "GO:1")
    + annotation("TP53", "GO:1", "acts_upstream_of")
    + annotation("TP53", "GO:3", "NOT|involved_in")
    + annotation("ATM", "GO:1", "located_in", "C", "taxon:9606|taxon:1280")
    + annotation("spa", "GO:1", taxon="taxon:1280|taxon:9606")
    + "\n"
    + annotation("Trp53", "GO:1", taxon="taxon:10090")
)
PAIRS = [["ATM", "GO:1"], ["TP53", "GO:1"], ["TP53", "GO:2"]]


@pytest.fixture
def written(tmp_path):
    def write(content: str | bytes, name: str = "terms"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("packed", [False, True])
def test_human_annotations_that_say_yes_count(written, packed):
    found = read_gene_terms(written(gzip.compress(GAF.encode()) if packed else GAF))
    assert list(found.columns) == ["gene", "term"]
    assert found.to_numpy().tolist() == PAIRS


def test_gene_sets_are_terms_too(written, tmp_path):
    gmt = "repair\tR-1\tTP53\tATM\nrepair\tR-2\tBAX\tATM\n"
    expected = [["ATM", "repair\tR-1"], ["ATM", "repair\tR-2"], ["BAX", "repair\tR-2"], ["TP53", "repair\tR-1"]]
    with zipfile.ZipFile(tmp_path / "sets.zip", "w") as archive:
        archive.writestr("sets.gmt", gmt)
    for path in (written(gmt), tmp_path / "sets.zip"):
        assert read_gene_terms(path).to_numpy().tolist() == expected


@pytest.mark.parametrize(
    "line",
    [
        "TP53\tGO:1\n",
        annotation("TP53", "R-HSA-1"),
        annotation("", "GO:1"),
        annotation("TP53", "GO:1", aspect="involved_in"),
    ],
)
def test_a_line_that_is_no_annotation_is_named(written, line):
    with pytest.raises(UserError) as error:
        read_gene_terms(written(GAF + line))
    assert error.value.field == "line 11"
    assert error.value.found == repr(line[:60])


def test_a_file_without_human_genes_is_refused(written):
    with pytest.raises(UserError, match="no annotation of taxon:9606"):
        read_gene_terms(written("!gaf-version: 2.2\n" + annotation("Trp53", "GO:1", taxon="taxon:10090")))


def test_a_file_that_breaks_off_is_refused(written):
    whole = gzip.compress((GAF * 500).encode())
    for content in (whole[:-20], whole[:100], b"\x1f\x8b and no more"):
        with pytest.raises(UserError, match="not readable to its end"):
            read_gene_terms(written(content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_gene_terms(tmp_path / "none.gaf")


def test_a_graph_among_some_genes_is_that_of_their_terms_alone():
    some = {gene: terms for gene, terms in TERMS.items() if gene in ("A", "B", "D")}
    expected = build_gene_graph(table(some), 1)
    pd.testing.assert_frame_equal(build_gene_graph(table(TERMS), 1, among=["D", "B", "A", "absent"]), expected)
    assert build_gene_graph(table(TERMS), 1, among=["absent"]).empty
