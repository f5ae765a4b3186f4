"""Labels read as the entry says, and files that cannot be used are refused with file, field, found and remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from core.catalog.schema import DatasetSpec
from core.conditions import CONTROL, genes_of
from core.errors import UserError, shown
from core.io.h5ad import open_h5ad
from core.prepare.cells import write_cells
from core.prepare.labels import harmonise_labels
from core.prepare.plan import plan_preparation, sample_conditions
from core.prepare.settings import Labels, Sampling

Entry = Callable[..., DatasetSpec]
GENES = st.text("ABCXYZ0123-.", min_size=1, max_size=6)


def read(labels: list[Any], **rules: Any) -> list[Any]:
    found = harmonise_labels(pd.Series(labels), Labels(column="label", **rules), "file.h5ad")
    return [None if pd.isna(condition) else condition for condition in found]


# Labels


@pytest.mark.parametrize(
    ("rules", "labels", "conditions"),
    [
        ({}, ["control", "A", "B+A", "A+B"], ["control", "A", "A+B", "A+B"]),
        ({"control": ("non-targeting", "NT")}, ["non-targeting", "NT", "A"], ["control", "control", "A"]),
        # `control` is the name that control has here: no entry can make a perturbation of it.
        ({"control": ("NT",)}, ["NT", "control", "A+control"], ["control", "control", "A"]),
        ({}, ["A+control", "control+A"], ["A", "A"]),
        ({"separator": "_", "control": ("ctrl",)}, ["A_ctrl", "ctrl_B", "ctrl", "B_A"], ["A", "B", "control", "A+B"]),
        ({"separator": "_"}, ["B_A", "B+A", "C_B_A"], ["A+B", "A+B", "A+B+C"]),
        ({"separator": "+"}, ["B+A", "A_B"], ["A+B", "A_B"]),
        ({}, ["A_B", "HLA-A", "AC000.1"], ["A_B", "HLA-A", "AC000.1"]),
        ({"cut_at": "_"}, ["A_guide1", "A_guide2", "A"], ["A", "A", "A"]),
        ({"cut_at": "g"}, ["ATF2g1", "NFKBIAg12", "control"], ["ATF2", "NFKBIA", "control"]),
        # Adamson et al.: up to the first `_`; labels that contain `(` are control.
        ({"cut_at": "_", "control_contains": "("}, ["SPI1_pDS255", "62(mod)_pBA581"], ["SPI1", "control"]),
        ({"cut_at": "_", "separator": "|"}, ["A|B_1", "C_2"], ["A+B", "C"]),
        ({}, [" A + B ", "A "], ["A+B", "A"]),
        ({}, ["A+A"], ["A"]),
        ({}, ["A", None, np.nan, "B"], ["A", None, None, "B"]),
        ({"control": ("0",)}, [0, 1, 2], ["control", "1", "2"]),
    ],
)
def test_labels(rules: dict[str, Any], labels: list[Any], conditions: list[Any]) -> None:
    assert read(labels, **rules) == conditions


def test_categories_read_as_text_does() -> None:
    labels = pd.Series(["B+A", None, "control", "C", "B+A"], index=list("vwxyz"))
    rules = Labels(column="label")
    text = harmonise_labels(labels, rules, "file")
    assert list(text.index) == list("vwxyz")
    categories = pd.Categorical(labels, categories=["never seen +", "C", "control", "B+A"])
    found = harmonise_labels(pd.Series(categories, labels.index), rules, "file")
    pd.testing.assert_series_equal(found.fillna("none"), text.fillna("none"))
    assert found.isna().tolist() == [False, True, False, False, False]


@given(
    genes=st.sets(GENES, min_size=1, max_size=4), separator=st.sampled_from(["+", "_", " ", "&", ";;"]), data=st.data()
)
def test_the_order_of_genes_and_the_separator_do_not_matter(
    genes: set[str], separator: str, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(sorted(genes)))
    condition = "+".join(sorted(genes))
    assert read([separator.join(order)], separator=separator) == [condition]
    assert read(["+".join(order)], separator=separator) == [condition]
    assert genes_of(condition) == sorted(genes)
    # A condition reads as itself, and control beside a gene adds nothing.
    assert read([condition]) == [condition]
    assert read([separator.join([*order, "control"])], separator=separator) == [condition]


@given(label=st.text("AB+_ ", max_size=8))
def test_a_label_is_read_or_refused_never_half_read(label: str) -> None:
    parts = [part.strip() for part in label.replace("_", "+").split("+")]
    if not label.strip():
        assert read([label], separator="_") == [None]
    elif ("+" in label and "_" in label) or not all(parts):
        with pytest.raises(UserError, match=re.escape(repr(label))):
            read([label], separator="_")
    else:
        assert read([label], separator="_") == ["+".join(sorted(set(parts)))]


def test_control_has_no_genes() -> None:
    assert genes_of(CONTROL) == []
    assert genes_of("A") == ["A"]
    assert genes_of("A+B") == ["A", "B"]


# The harmonised counts


def published() -> ad.AnnData:
    """Six cells and six genes of a published file."""
    counts = sparse.csr_matrix(np.arange(36, dtype=np.float64).reshape(6, 6))
    obs = pd.DataFrame(
        {
            "label": pd.Categorical(["ctrl", "b_a", None, "a", "ctrl", "c"]),
            "line": ["x", "x", "x", "y", "y", "y"],
            "share": [0.9, 0.5, 0.9, np.nan, 0.6, 0.7],
            "total": [10, 20, 30, 40, 50, 60],
        },
        index=["f", "e", "d", "c", "b", "a"],
    )
    var = pd.DataFrame({"symbol": ["g2", "g1", "g2", "g3", "g0", None]}, index=["e1", "e2", "e3", "e4", "e5", "e6"])
    return ad.AnnData(counts, obs=obs, var=var)


def test_what_the_names_decide(entry: Entry) -> None:
    raw = published()
    spec = entry(
        labels={"column": "label", "separator": "_", "control": ["ctrl"]},
        covariate_column="line",
        symbol_column="symbol",
        library_size="total",
    )
    names = plan_preparation(raw.obs, raw.var, spec, "file.h5ad")
    assert list(names.obs.index) == ["f", "e", "c", "b", "a"]
    assert list(names.obs["condition"]) == ["control", "a+b", "a", "control", "c"]
    assert list(names.obs["covariate"]) == ["x", "x", "y", "y", "y"]
    assert list(names.obs["library_size"]) == [10, 20, 40, 50, 60]
    assert list(names.genes) == ["g0", "g1", "g3"]
    assert names.rows.tolist() == [0, 1, 3, 4, 5]
    assert names.columns.tolist() == [4, 1, 3]
    assert names.report == {
        "cells in the file": 6,
        "cells of conditions that were not sampled": 0,
        "cells dropped by the entry's filters": 0,
        "cells without a label": 1,
        "control labels that are also measured genes": [],
        "genes in the file": 6,
        "genes dropped because their symbol occurs more than once": ["g2"],
        "genes dropped because they have no symbol": 1,
    }


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ([{"column": "share", "op": ">=", "value": 0.6}], "fdba"),
        ([{"column": "share", "op": "<=", "value": 0.6}], "eb"),
        ([{"column": "share", "op": "==", "value": 0.9}], "fd"),
        ([{"column": "line", "op": "==", "value": "y"}], "cba"),
        ([{"column": "label", "op": "in", "value": ["ctrl", "a"]}], "fcb"),
        ([{"column": "share", "op": ">=", "value": 0.6}, {"column": "total", "op": "<=", "value": 30}], "fd"),
    ],
)
def test_filters(filters: list[dict[str, Any]], left: str, entry: Entry) -> None:
    """A missing value passes no filter; several filters must all hold."""
    raw = published()
    raw.obs["label"] = raw.obs["label"].cat.add_categories("d").fillna("d")
    spec = entry(labels={"column": "label", "separator": "_", "control": ["ctrl", "c"]}, filters=filters)
    names = plan_preparation(raw.obs, raw.var, spec, "file.h5ad")
    assert "".join(names.obs.index) == left
    assert names.report["cells dropped by the entry's filters"] == 6 - len(left)
    assert set(names.obs["covariate"]) == {"all"}


def test_what_the_filters_drop_need_not_be_right(entry: Entry) -> None:
    """Only cells that are used must have readable labels."""
    raw = published()
    raw.obs["label"] = ["ctrl", "b", "a", "x_y+z", "ctrl", "c"]
    labels = {"column": "label", "separator": "_", "control": ["ctrl"]}
    filters = [{"column": "share", "op": ">=", "value": 0.1}]
    names = plan_preparation(raw.obs, raw.var, entry(labels=labels, filters=filters), "file.h5ad")
    assert "".join(names.obs.index) == "fedba"


# Refusals


def change(part: str, rows: Any, value: Any) -> Callable[[ad.AnnData], None]:
    def apply(raw: ad.AnnData) -> None:
        if part == "X":
            counts = raw.X.toarray().astype(np.float64)
            counts[rows] = value
            raw.X = counts
        else:
            column = raw.obs[part].astype(object)
            column.iloc[rows] = value
            raw.obs[part] = column

    return apply


def relabel(old: str, new: str, line: str | None = None) -> Callable[[ad.AnnData], None]:
    def apply(raw: ad.AnnData) -> None:
        labels = raw.obs["perturbation"].astype(object)
        mine = (labels == old) & ((raw.obs["cell_line"] == line) | (line is None))
        raw.obs["perturbation"] = labels.mask(mine, new)

    return apply


def keep_conditions(n: int) -> Callable[[ad.AnnData], None]:
    def apply(raw: ad.AnnData) -> None:
        labels = raw.obs["perturbation"].astype(str)
        kept = ["control", *sorted(set(labels) - {"control"})[:n]]
        raw._inplace_subset_obs(labels.isin(kept).to_numpy())

    return apply


def add(column: str, value: Any) -> Callable[[ad.AnnData], None]:
    def apply(raw: ad.AnnData) -> None:
        raw.obs[column] = value(raw) if callable(value) else value

    return apply


def two_names_alike(raw: ad.AnnData) -> None:
    raw.obs_names = ["same", "same", "other", "other", *raw.obs_names[4:]]


def empty_x(raw: ad.AnnData) -> None:
    raw.X = None


def nothing(_: ad.AnnData) -> None:
    """The file is right, the entry is not."""


EXPECTED = {"cells": 5, "genes": 6, "conditions": 7}
BY_LINE = {"covariate_column": "cell_line"}
REFUSED: dict[str, tuple[Callable[[ad.AnnData], None], dict[str, Any], str, str, str]] = {
    "no label column": (
        nothing,
        {"labels": {"column": "gene"}},
        "obs['gene']",
        "no such column; there are: cell_line, perturbation",
        "name the right column in the catalog entry (`labels.column`",
    ),
    "no filter column": (
        nothing,
        {"filters": [{"column": "umi", "op": ">=", "value": 5}]},
        "obs['umi']",
        "no such column; there are: cell_line, perturbation",
        "`filters`",
    ),
    "no covariate column": (
        nothing,
        {"covariate_column": "donor"},
        "obs['donor']",
        "no such column",
        "`covariate_column`",
    ),
    "no library size column": (nothing, {"library_size": "umi"}, "obs['umi']", "no such column", "`library_size`"),
    "no symbol column": (nothing, {"symbol_column": "name"}, "var['name']", "no such column", "(`symbol_column`)"),
    "filter of numbers on text": (
        nothing,
        {"filters": [{"column": "cell_line", "op": ">=", "value": 0.5}]},
        "obs['cell_line']",
        "of which none is >= 0.5",
        "filter by a column of numbers",
    ),
    "filters that nothing passes": (
        nothing,
        {"filters": [{"column": "cell_line", "op": "==", "value": "K562"}]},
        "filters",
        "no cell passes",
        "check `filters`",
    ),
    "no control": (
        relabel("control", "unperturbed"),
        {},
        "obs['perturbation']",
        "no control cells in all; labels there: G",
        "set `labels.control` in the catalog entry (now control)",
    ),
    "no control in one of two covariates": (
        relabel("control", "A", "line_2"),
        BY_LINE,
        "obs['perturbation']",
        "no control cells in line_2",
        "set `labels.control`",
    ),
    "labels all missing": (
        add("perturbation", np.nan),
        {},
        "obs['perturbation']",
        "no control cells in any covariate",
        "set `labels.control`",
    ),
    "negative counts": (
        change("X", (3, slice(4)), -1.0),
        {},
        "X",
        "4 negative values (first: -1)",
        "give raw counts, not scaled or corrected",
    ),
    "NaN": (change("X", (3, 4), np.nan), {}, "X", "1 NaN or infinite values (first: nan)", "remove or correct"),
    "infinite": (change("X", (3, 4), np.inf), {}, "X", "1 NaN or infinite values (first: inf)", "remove or correct"),
    "fractions": (
        change("X", ([3, 5], [4, 4]), 0.5),
        {},
        "X",
        "2 counts that are not whole numbers (first: 0.5)",
        "normalised or log-transformed values cannot be used",
    ),
    "no matrix": (empty_x, {}, "X", "no matrix there", "put the raw counts into X"),
    "duplicated cell names": (
        two_names_alike,
        {},
        "obs_names",
        "2 duplicated cell names (same, other)",
        "obs_names_make_unique()",
    ),
    "both separators": (
        change("perturbation", [0, 1], "A_B+C"),
        {"labels": {"column": "perturbation", "separator": "_"}},
        "obs['perturbation']",
        "the label 'A_B+C' holds both separators, '_' and '+'",
        "set `labels.separator`",
    ),
    "an empty gene": (
        change("perturbation", [0, 1], "A++B"),
        {},
        "obs['perturbation']",
        "the label 'A++B' names no gene, or an empty one",
        "correct the label",
    ),
    "an empty label": (
        change("perturbation", [0, 1], "A+ "),
        {},
        "obs['perturbation']",
        "the label 'A+ ' names no gene, or an empty one",
        "correct the label",
    ),
    "missing covariates": (
        change("cell_line", [0, 1, 2], None),
        BY_LINE,
        "obs['cell_line']",
        "3 labelled cells without a covariate",
        "fill the column",
    ),
    "library sizes of zero": (
        add("umi", lambda raw: [0, *range(1, raw.n_obs)]),
        {"library_size": "umi"},
        "obs['umi']",
        "library sizes that are missing, zero or negative",
        "fill the column",
    ),
    "library sizes that are no numbers": (
        add("umi", "many"),
        {"library_size": "umi"},
        "obs['umi']",
        "library sizes that are missing",
        "take `library_size` out",
    ),
    "another shape": (
        nothing,
        {"expected": EXPECTED},
        "shape",
        "screen has 5 x 6",
        "give the file that the catalog entry describes",
    ),
    "fewer than ten conditions": (
        keep_conditions(9),
        {},
        "obs['perturbation']",
        "9 perturbed conditions of at least 12 cells; 10 are needed",
        "give more data",
    ),
    "combinations in single-gene data": (
        relabel("control", "G+H", "line_2"),
        {},
        "task",
        "combinations (first: G+H)",
        "set `task",
    ),
}


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_used_is_refused(case: str, lines_raw: ad.AnnData, entry: Entry, tmp_path: Path) -> None:
    spoil, fields, field, found, remedy = REFUSED[case]
    raw = lines_raw.copy()
    spoil(raw)
    path = tmp_path / "screen.h5ad"
    raw.write_h5ad(path)
    with pytest.raises(UserError) as error:
        write_cells(path, entry(**fields), {}, tmp_path)
    where = "catalog entry" if field == "task" else str(path)
    assert (error.value.where, error.value.field) == (where, field)
    assert found in error.value.found
    assert remedy in error.value.remedy
    # The message has all four, one a line.
    lines = str(error.value).splitlines()
    assert lines[0] == where
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["field", "found", "remedy"]
    assert not (tmp_path / "cells.h5ad").exists()


def test_a_missing_file_is_refused(entry: Entry, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file") as error:
        write_cells(tmp_path / "absent.h5ad", entry(), {}, tmp_path)
    assert (error.value.where, error.value.field) == (str(tmp_path / "absent.h5ad"), "file")
    assert error.value.remedy.startswith("check the path")


def write_text(path: Path) -> None:
    path.write_text("cell,gene\n")


def write_half_a_file(path: Path) -> None:
    published().write_h5ad(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_other_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["table"] = [1, 2]


def write_unknown_encoding(path: Path) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"] = "of another age"
        group.attrs["encoding-version"] = "0.1.0"


@pytest.mark.filterwarnings("ignore:Element '/table' was written without encoding metadata")
@pytest.mark.parametrize("write", [write_text, write_half_a_file, write_other_hdf5, write_unknown_encoding])
def test_what_is_not_an_h5ad_is_refused(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "file.h5ad"
    write(path)
    with pytest.raises(UserError, match="not a readable h5ad") as error:
        open_h5ad(path)
    assert (error.value.where, error.value.field) == (str(path), "format")
    assert error.value.remedy.startswith("give an AnnData .h5ad file; if it is one, it is damaged")


def test_a_file_too_large_for_the_memory_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> ad.AnnData:
        raise MemoryError(path)

    published().write_h5ad(tmp_path / "file.h5ad")
    monkeypatch.setattr(ad, "read_h5ad", fail)
    with pytest.raises(MemoryError):
        open_h5ad(tmp_path / "file.h5ad")


def test_a_file_without_cells_is_refused(entry: Entry) -> None:
    with pytest.raises(UserError, match="0 cells x 6 genes") as error:
        plan_preparation(published().obs[:0], published().var, entry(), "empty.h5ad")
    assert (error.value.where, error.value.field) == ("empty.h5ad", "shape")


def test_long_lists_of_names_are_cut() -> None:
    assert shown(["a", "b"]) == "a, b"
    assert shown(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert shown(list("abc"), 2) == "a, b and 1 more"


@pytest.mark.parametrize("label", ["nan", "None", "NA", " <NA> "])
def test_text_that_stands_for_no_label_is_no_perturbation(label: str) -> None:
    with pytest.raises(UserError, match=r"stands for no label") as error:
        read(["A", label])
    assert "`labels.dropped`" in error.value.remedy
    assert read(["A", label], dropped=(label.strip(),)) == ["A", None]
    assert read(["A", label], control=(label.strip(),)) == ["A", "control"]


@pytest.mark.parametrize("label", ["A+ctrl", "NT", "non-targeting"])
def test_a_name_of_control_that_the_entry_does_not_list_is_no_gene(label: str) -> None:
    with pytest.raises(UserError, match="is no gene, but a name of control") as error:
        read(["A", label])
    assert "`labels.control`" in error.value.remedy
    assert read(["A", label], control=("ctrl", "NT", "non-targeting")) == ["A", "A" if "A" in label else "control"]


def test_a_file_without_gene_symbols_is_refused(entry: Entry) -> None:
    raw = published()
    raw.var["symbol"] = "G"
    labels = {"column": "label", "separator": "_", "control": ["ctrl"]}
    with pytest.raises(UserError, match="no gene with a symbol of its own among 6") as error:
        plan_preparation(raw.obs, raw.var, entry(labels=labels, symbol_column="symbol"), "x")
    assert error.value.field == "var['symbol']"


def test_dropped_labels_are_those_of_no_condition(entry: Entry) -> None:
    assert read(["A", "*", " * ", "B"], dropped=("*",)) == ["A", None, None, "B"]
    raw = published()
    names = plan_preparation(
        raw.obs,
        raw.var,
        entry(labels={"column": "label", "separator": "_", "control": ["ctrl"], "dropped": ["c"]}),
        "x",
    )
    assert "".join(names.obs.index) == "fecb"
    assert names.report["cells without a label"] == 2


# Sampling of conditions


def test_sampled_conditions_hold_the_priority_ones_and_a_seeded_draw_of_the_rest() -> None:
    conditions = {f"G{i}" for i in range(50)}
    sampling = Sampling(conditions=10, priority=("G7", "ABSENT", "G3"))
    digest = sha256(b"sample_conditions//").digest()
    rng = np.random.default_rng([42, int.from_bytes(digest[:8], "big")])
    others = sorted(conditions - {"G3", "G7"})
    expected = {"G3", "G7", *(others[i] for i in rng.choice(48, size=8, replace=False))}
    assert sample_conditions(conditions, sampling, 42) == expected
    assert sample_conditions(conditions, sampling, 43) != expected
    assert sample_conditions(conditions, Sampling(conditions=99), 42) == conditions
    assert sample_conditions(conditions, Sampling(conditions=1, priority=("G7", "G3")), 42) == {"G7"}


def test_conditions_are_sampled_before_any_filter_and_control_stays(entry: Entry) -> None:
    """A condition that the filters would empty can be drawn: the sample does not know of them."""
    raw = published()
    rules = {"column": "label", "separator": "_", "control": ["ctrl"]}
    sample = {"conditions": 1, "priority": ["c"]}
    names = plan_preparation(raw.obs, raw.var, entry(labels=rules, sample=sample), "file.h5ad")
    assert "".join(names.obs.index) == "fba"
    assert names.report["cells of conditions that were not sampled"] == 2
    assert names.report["cells without a label"] == 1
    without_c = [{"column": "total", "op": "<=", "value": 50}]
    names = plan_preparation(raw.obs, raw.var, entry(labels=rules, sample=sample, filters=without_c), "file.h5ad")
    assert "".join(names.obs.index) == "fb"
    assert names.report["cells dropped by the entry's filters"] == 1
