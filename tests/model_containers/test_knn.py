"""kNN: by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from model_containers import contract


@pytest.fixture(scope="module")
def knn(load):
    return load("knn")


def write_cells(path, profiles: Mapping[tuple[str, str], Sequence[float]]) -> None:
    """One cell per (condition, split)."""
    rows = [("line", condition, split) for condition, split in profiles]
    obs = pd.DataFrame(rows, columns=["covariate", "condition", "split"], index=[f"c{row}" for row in range(len(rows))])
    X = np.array(list(profiles.values()), dtype=np.float32)
    ad.AnnData(X, obs=obs, var=pd.DataFrame(index=["g", "h"])).write_h5ad(path)


EMBEDDING = pd.DataFrame(
    {"d0": [2.0, 3.0, 4.0, -1.0, 0.0, 5.0], "d1": [0.0, 3.0, 0.0, 0.0, -2.0, 0.0]},
    index=["A", "B", "C", "D", "E", "Q"],
)


def predict(knn, folder, embedding: pd.DataFrame, conditions: list[str], k: int = 2) -> pd.DataFrame:
    """Train on A (1, 1), B (3, 5) and the val condition D (9, 9); the mean of the train perturbations is (2, 3)."""
    profiles = {("A", "train"): [1, 1], ("B", "train"): [3, 5], ("D", "val"): [9, 9], ("control", "train"): [50, 50]}
    write_cells(folder / "train.h5ad", profiles)
    embedding.to_parquet(folder / "e.parquet")
    task = contract.TrainTask(folder / "train.h5ad", folder / "e.parquet", {"k": k}, 1, 1, folder)
    knn.train(task)
    keys = tuple(contract.Key("line", name) for name in conditions)
    knn.predict(contract.PredictTask(folder, folder, keys, folder / "e.parquet", 1, 1, folder))
    predictions = ad.read_h5ad(folder / "predictions.h5ad")
    return predictions.to_df().set_axis(predictions.obs["condition"].tolist(), axis=0)


def test_prediction_by_hand(knn, tmp_path):
    """Differences: A (-1, -2), B (1, 2), D (7, 6). Cosines of C: A 1, B 1/sqrt 2, D -1."""
    found = predict(knn, tmp_path, EMBEDDING, ["C", "D", "E", "A+C"])
    a, b = 1 / (1 + np.sqrt(0.5)), np.sqrt(0.5) / (1 + np.sqrt(0.5))
    of_c = np.array([-1, -2]) * a + np.array([1, 2]) * b
    np.testing.assert_allclose(found.loc["C"], np.array([2, 3]) + of_c, rtol=1e-12)
    # D is its own nearest neighbour, and the cosines of A and B are negative.
    np.testing.assert_allclose(found.loc["D"], [9, 9], rtol=1e-12)
    # E has no neighbour of positive cosine: the difference is 0.
    np.testing.assert_allclose(found.loc["E"], [2, 3], rtol=1e-12)
    np.testing.assert_allclose(found.loc["A+C"], np.array([2, 3]) + 2 * of_c, rtol=1e-12)


def test_k_limits_the_neighbours(knn, tmp_path):
    found = predict(knn, tmp_path, EMBEDDING, ["C"], k=1)
    np.testing.assert_allclose(found.loc["C"], [1, 1], rtol=1e-12)
    many = predict(knn, tmp_path, EMBEDDING, ["C"], k=50)
    np.testing.assert_allclose(many, predict(knn, tmp_path, EMBEDDING, ["C"], k=3), rtol=1e-12)


def test_of_equally_near_neighbours_the_first_by_name_is_taken(knn, tmp_path):
    """A and B as near to C but for rounding: 0.1 + 0.2 is not 0.3."""
    embedding = EMBEDDING.copy()
    embedding.loc["A"], embedding.loc["B"], embedding.loc["C"] = (1.0, 0.3), (1.0, 0.1 + 0.2), (1.0, 0.0)
    np.testing.assert_allclose(predict(knn, tmp_path, embedding, ["C"], k=1).loc["C"], [1, 1], rtol=1e-12)
    embedding.loc["A"], embedding.loc["B"] = embedding.loc["B"].copy(), embedding.loc["A"].copy()
    np.testing.assert_allclose(predict(knn, tmp_path, embedding, ["C"], k=1).loc["C"], [1, 1], rtol=1e-12)


def test_weights_by_definition(knn):
    rng = np.random.default_rng(5)
    cosines = rng.uniform(-1, 1, size=(4, 9))
    weights = knn.neighbour_weights(cosines, 5)
    for row, found in zip(cosines, weights, strict=True):
        nearest = sorted(range(9), key=lambda column: -row[column])[:5]
        expected = np.array([max(row[column], 0) if column in nearest else 0 for column in range(9)])
        np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-11)


def test_only_conditions_of_one_gene_are_neighbours(knn, panel, tmp_path):
    knn.train(panel.train_task(tmp_path))
    with np.load(tmp_path / "model.npz") as model:
        # 12 singles less two held out and one without an embedding (P10 is not among the cells, P11's is zero).
        assert len(model["difference_of"]) == 8


def test_training_without_any_embedded_gene_is_refused(knn, panel, tmp_path):
    EMBEDDING.to_parquet(tmp_path / "e.parquet")
    with pytest.raises(contract.ContractError, match="no training perturbation of one gene has an embedding"):
        knn.train(panel.train_task(tmp_path, embedding=tmp_path / "e.parquet"))
