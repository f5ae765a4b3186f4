"""Predictions at the door: what is aligned, what is refused and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from core.errors import UserError
from core.scoring.predictions import align_predictions, check_model_output, write_aligned_predictions

GENES = pd.Index([f"G{number:02d}" for number in range(40)])
CONDITIONS = ["A+B", "G03", "G04", "G05"]
KEYS = pd.DataFrame({"covariate": "all", "condition": CONDITIONS})
TWO_LINES = pd.concat([KEYS.assign(covariate=line) for line in ("K562", "RPE1")], ignore_index=True)
HIGHEST = np.log1p(10_000.0)


def value(covariate: str, condition: str, gene: str) -> float:
    """A profile that tells every row and column from the others, whatever their order."""
    number = sum(map(ord, covariate)) + 7 * sum(map(ord, "".join(sorted(condition)))) + int(gene[1:])
    return (number % 83) / 10 + 0.05


def predictions(keys: pd.DataFrame = KEYS, genes: pd.Index = GENES) -> ad.AnnData:
    rows = keys[["covariate", "condition"]].to_numpy()
    values = [[value(covariate, condition, gene) for gene in genes] for covariate, condition in rows]
    X = np.array(values).reshape(len(rows), len(genes))
    return ad.AnnData(X, obs=keys.set_index(keys.index.astype(str)), var=pd.DataFrame(index=genes))


def refused(data: ad.AnnData, keys: pd.DataFrame = KEYS) -> str:
    with pytest.raises(UserError) as caught:
        align_predictions(data, keys, GENES, "theirs.h5ad")
    assert caught.value.where == "theirs.h5ad"
    return str(caught.value)


@settings(max_examples=40)
@given(st.permutations(range(len(TWO_LINES))), st.permutations(range(len(GENES))), st.booleans(), st.integers(0, 8))
def test_rows_and_genes_are_aligned_by_name(rows, columns, as_sparse, n_left_out):
    data = predictions(TWO_LINES)[list(rows)[n_left_out:], list(columns)].copy()
    data.obs["condition"] = data.obs["condition"].replace("A+B", "B+A").astype("category")
    if as_sparse:
        data.X = sparse.csr_matrix(data.X)
    aligned = align_predictions(data, TWO_LINES, GENES, "theirs.h5ad")
    assert aligned.var_names.equals(GENES)
    assert aligned.n_obs == len(TWO_LINES) - n_left_out
    assert aligned.X.dtype == np.float64
    keys = list(zip(aligned.obs["covariate"], aligned.obs["condition"], strict=True))
    assert keys == sorted(keys)
    assert "B+A" not in set(aligned.obs["condition"])
    expected = [[value(*key, gene) for gene in GENES] for key in keys]
    np.testing.assert_array_equal(aligned.X, np.array(expected).reshape(aligned.shape))
    assert aligned.obs_names.tolist() == ["|".join(key) for key in keys]


def test_a_combination_gets_the_name_that_the_reference_has():
    """A reference made from a mirror file keeps that file's order of genes."""
    keys = KEYS.replace("A+B", "B+A")
    for name in ("A+B", "B+A"):
        aligned = align_predictions(predictions(KEYS.replace("A+B", name)), keys, GENES, "theirs.h5ad")
        assert aligned.obs["condition"].tolist() == ["B+A", "G03", "G04", "G05"]


def test_covariate_may_be_missing_where_there_is_one():
    data = predictions()
    del data.obs["covariate"]
    assert set(align_predictions(data, KEYS, GENES, "theirs.h5ad").obs["covariate"]) == {"all"}
    data = predictions(TWO_LINES)
    del data.obs["covariate"]
    assert "K562, RPE1" in refused(data, TWO_LINES)


def test_an_unknown_covariate_is_named():
    message = refused(predictions(KEYS.assign(covariate="k562")), TWO_LINES)
    assert "k562" in message
    assert "K562, RPE1" in message


@pytest.mark.parametrize(("condition", "hint"), [("g03", "did you mean G03?"), ("A+C", "did you mean A+B?")])
def test_an_unknown_condition_is_shown_with_its_nearest_match(condition, hint):
    message = refused(predictions(KEYS.replace("G03", condition)))
    assert f"first: {condition} in all" in message
    assert hint in message


def test_control_rows_are_refused():
    message = refused(predictions(KEYS.replace("G03", "control")))
    assert "control in all" in message
    assert "leave out" in message


def test_a_missing_condition_column_is_told_from_a_transposed_matrix():
    data = predictions()
    data.obs = data.obs.drop(columns="condition").set_index(data.obs["condition"].rename(None))
    assert "obs['condition']" in refused(data)
    transposed = predictions().T.copy()
    message = refused(transposed)
    assert "genes are in rows" in message
    assert "adata.T" in message


def test_rows_named_as_measured_genes_are_no_transposed_matrix():
    """All perturbed genes may be measured genes."""
    genes = list(GENES)
    keys = pd.DataFrame({"covariate": "all", "condition": genes}, index=genes)
    assert align_predictions(predictions(keys), keys, GENES, "theirs.h5ad").n_obs == len(GENES)


@pytest.mark.parametrize("twin", ["G03", "B+A"])
def test_a_condition_given_twice_is_refused(twin):
    message = refused(predictions(pd.concat([KEYS, pd.DataFrame({"covariate": ["all"], "condition": [twin]})])))
    assert "1 duplicated rows" in message


def test_a_gene_given_twice_is_refused():
    assert "'G07' more than once" in refused(predictions(genes=GENES.insert(3, "G07")))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_place(wrong):
    data = predictions()
    data.X[2, 5] = wrong
    assert "first: G04, G05" in refused(data)


@pytest.mark.parametrize(
    "X",
    [np.full((4, 40), 9.3), np.random.default_rng(0).poisson(2.0, (4, 40)).astype(float), np.full((4, 40), 250.7)],
    ids=["above log1p(10,000)", "whole numbers", "counts per 10,000"],
)
def test_values_that_are_not_log1p_are_refused(X):
    data = predictions()
    data.X = X
    assert "on another scale" in refused(data)


@pytest.mark.parametrize(
    "X",
    [np.zeros((4, 40)), np.full((4, 40), -0.02), np.full((4, 40), np.float32(HIGHEST), dtype=np.float32)],
    ids=["all zero", "slightly negative", "the largest possible in float32"],
)
def test_unusual_but_possible_values_are_taken(X):
    data = predictions()
    data.X = X
    aligned = align_predictions(data, KEYS, GENES, "theirs.h5ad")
    np.testing.assert_array_equal(aligned.X, X.astype(np.float64))


def test_values_that_are_no_numbers_are_refused():
    data = predictions()
    data.X = np.full(data.shape, "high", dtype=object)
    assert "not numbers" in refused(data)


def test_missing_genes_are_reported_up_to_a_twentieth_and_refused_beyond():
    enough = GENES[2:].append(pd.Index(["X1", "X0"]))
    aligned = align_predictions(predictions(genes=enough), KEYS, GENES, "theirs.h5ad")
    assert aligned.var_names.equals(GENES[2:])
    assert not aligned.var_names.isin(["G00", "G01", "X0", "X1"]).any()
    message = refused(predictions(genes=GENES[3:]))
    assert "3 of the reference's 40 genes are missing (G00, G01, G02)" in message


# ---- what a model wrote

Output = Callable[..., Path]


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """Writes a model's output: some predicted, some not."""

    def make(predicted: list[str], unpredicted: Any) -> Path:
        predictions(KEYS[KEYS["condition"].isin(predicted)]).write_h5ad(tmp_path / "predictions.h5ad")
        (tmp_path / "unpredicted.json").write_text(json.dumps(unpredicted))
        return tmp_path

    return make


def reasons(*conditions: str) -> list[dict[str, str]]:
    return [{"covariate": "all", "condition": condition, "reason": "why"} for condition in conditions]


def check(folder: Path) -> tuple[ad.AnnData, list[dict[str, Any]]]:
    return check_model_output(folder, KEYS.to_dict("records"), GENES, "ridge")


def test_each_asked_condition_is_answered(output):
    aligned, unpredicted = check(output(["G03", "A+B"], reasons("G05", "G04")))
    assert aligned.obs["condition"].tolist() == ["A+B", "G03"]
    assert unpredicted == reasons("G04", "G05")


def test_a_model_that_can_predict_nothing_has_answered(output, tmp_path):
    """One test condition a fold, and its gene without an embedding: the fold must not fail."""
    aligned, unpredicted = check(output([], reasons(*CONDITIONS)))
    assert aligned.shape == (0, len(GENES))
    assert len(unpredicted) == len(CONDITIONS)
    aligned.write_h5ad(tmp_path / "kept.h5ad")
    assert ad.concat([ad.read_h5ad(tmp_path / "kept.h5ad"), predictions()], join="inner").n_obs == len(CONDITIONS)


@pytest.mark.parametrize(
    ("predicted", "unpredicted", "first"),
    [
        (["A+B", "G03"], reasons("G04"), "all G05"),
        (CONDITIONS, reasons("G04"), "all G04"),
        (CONDITIONS, reasons("G99"), "all G99"),
    ],
    ids=["left out", "answered twice", "never asked"],
)
def test_an_answer_too_few_or_too_many_is_refused(output, predicted, unpredicted, first):
    with pytest.raises(UserError, match=rf"output of ridge(.|\n)*1 not answered exactly once \(first: {first}\)"):
        check(output(predicted, unpredicted))


@pytest.mark.parametrize("unpredicted", [{}, {"a": 1}, [{"condition": "G03"}], None, 3])
def test_a_malformed_list_of_the_unpredicted_is_refused(output, unpredicted):
    folder = output(CONDITIONS[1:], unpredicted)
    with pytest.raises(UserError, match="output of ridge"):
        check(folder)


def test_a_missing_list_of_the_unpredicted_is_refused(output):
    folder = output(CONDITIONS, [])
    (folder / "unpredicted.json").unlink()
    with pytest.raises(UserError, match=r"unpredicted\.json"):
        check(folder)


# ---- a file from elsewhere


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A reference of which G05 is never tested."""
    data = predictions()
    data.obs["test_fold"] = [0, 1, 0, -1]
    folder = tmp_path / "reference"
    folder.mkdir()
    data.write_h5ad(folder / "reference.h5ad")
    return folder


def test_a_file_from_elsewhere_may_lack_conditions(reference, tmp_path):
    file, folder = tmp_path / "theirs.h5ad", tmp_path / "accepted"
    folder.mkdir()
    predictions(KEYS[KEYS["condition"].isin(["G04", "A+B"])]).write_h5ad(file)
    write_aligned_predictions(file, reference, 10_000, folder)
    assert ad.read_h5ad(folder / "predictions.h5ad").obs["condition"].tolist() == ["A+B", "G04"]
    lacking = json.loads((folder / "unpredicted.json").read_text())
    assert lacking == [{"covariate": "all", "condition": "G03", "reason": "not in the file"}]


def test_a_file_from_elsewhere_must_predict_something(reference, tmp_path):
    file = tmp_path / "theirs.h5ad"
    predictions(KEYS.iloc[:0]).write_h5ad(file)
    with pytest.raises(UserError, match="no row"):
        write_aligned_predictions(file, reference, 10_000, tmp_path)


@pytest.mark.parametrize("content", [None, b"condition,G01\nA,0.5\n"], ids=["no file", "no h5ad"])
def test_a_file_that_cannot_be_read_is_named(reference, tmp_path, content):
    file = tmp_path / "theirs.h5ad"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"theirs\.h5ad"):
        write_aligned_predictions(file, reference, 10_000, tmp_path)
