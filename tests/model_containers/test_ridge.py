"""Ridge: against scikit-learn, condition by condition."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.kernel_ridge import KernelRidge

from model_containers import contract


@pytest.fixture(scope="module")
def ridge(load):
    return load("ridge")


@pytest.fixture(scope="module")
def tables(two_lines):
    """Cells as a table with their labels, and the unit-norm embedding: what the definition starts from."""
    cells = ad.read_h5ad(two_lines.folder / "train.h5ad")
    embedding = pd.read_parquet(two_lines.folder / "embedding.parquet")
    embedding = embedding[(embedding != 0).any(axis=1)]
    unit = embedding.div(np.sqrt((embedding**2).sum(axis=1)), axis=0)
    return cells.to_df().astype(float), cells.obs.astype(str), unit


def by_definition(tables, covariate: str, asked: list[str], alphas: list[float]) -> np.ndarray:
    values, obs, unit = tables
    here = (obs["covariate"] == covariate) & (obs["condition"] != "control")
    means = values[here].groupby(obs["condition"][here]).mean()
    split = obs[here].groupby("condition")["split"].first()
    dataset_mean = means[split == "train"].mean()
    known = [name for name in means.index if all(gene in unit.index for gene in name.split("+"))]

    def x(names: list[str]) -> np.ndarray:
        return np.array([sum(unit.loc[gene] for gene in name.split("+")) for name in names])

    y = means.loc[known] - dataset_mean
    train, val = ([name for name in known if split[name] == which] for which in ("train", "val"))
    errors = {}
    for alpha in alphas:
        fitted = KernelRidge(alpha=alpha, kernel="linear").fit(x(train), y.loc[train])
        errors[alpha] = ((fitted.predict(x(val)) - y.loc[val]) ** 2).to_numpy().mean()
    best = min(errors, key=lambda alpha: errors[alpha])
    final = KernelRidge(alpha=best, kernel="linear").fit(x(known), y)
    return dataset_mean.to_numpy() + final.predict(x(asked))


@pytest.mark.parametrize("alphas", [[0.1, 1, 10], [10.0], [1e-3, 100.0]])
def test_equals_kernel_ridge_by_definition(ridge, two_lines, tables, tmp_path, alphas):
    ridge.train(two_lines.train_task(tmp_path, hyperparameters={"alphas": alphas}))
    ridge.predict(two_lines.predict_task(tmp_path, tmp_path))
    predictions = ad.read_h5ad(tmp_path / "predictions.h5ad")
    for covariate in ("K562", "RPE1"):
        found = predictions[predictions.obs["covariate"] == covariate]
        expected = by_definition(tables, covariate, list(found.obs["condition"]), alphas)
        np.testing.assert_allclose(found.X, expected, rtol=0, atol=1e-10)


def test_a_combination_is_the_sum_of_its_genes_differences(ridge, two_lines, tmp_path):
    ridge.train(two_lines.train_task(tmp_path))
    keys = tuple(contract.Key("K562", name) for name in ("P02", "P03", "P02+P03"))
    ridge.predict(two_lines.predict_task(tmp_path, tmp_path, conditions=keys))
    predictions = ad.read_h5ad(tmp_path / "predictions.h5ad").to_df()
    dataset_mean = contract.dataset_means(contract.read_means(two_lines.folder / "train.h5ad")).loc["K562"]
    both, first, second = (predictions.loc[f"K562|{name}"] for name in ("P02+P03", "P02", "P03"))
    np.testing.assert_allclose(both - dataset_mean, (first - dataset_mean) + (second - dataset_mean), atol=1e-12)


def test_alpha_is_1_without_val_conditions(ridge):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 4))
    assert ridge.choose_alpha(x, y, np.zeros(6, dtype=bool), (0.1, 10.0)) == (1.0, {})
    assert ridge.choose_alpha(x, y, np.ones(6, dtype=bool), (0.1, 10.0)) == (1.0, {})


def test_training_without_any_embedding_is_refused(ridge, panel, tmp_path):
    strangers = pd.DataFrame({"d0": [1.0, 2.0]}, index=["X", "Y"])
    strangers.to_parquet(tmp_path / "e.parquet")
    with pytest.raises(contract.ContractError, match="no training perturbation has an embedding"):
        ridge.train(panel.train_task(tmp_path, embedding=tmp_path / "e.parquet"))
