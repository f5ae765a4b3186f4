"""k nearest neighbours in a gene embedding (docs/science.md section 3, row `knn, ridge`).

Per covariate. A gene's predicted difference from the fold's dataset_mean is the mean of the differences of its k
nearest train and val single-gene conditions, weighted by the cosine of the embeddings; a combination's is the sum
of its genes'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import contract

if not TYPE_CHECKING:
    np = contract.LateModule("numpy")
else:
    import numpy as np


DESCRIPTION = contract.Description(name="knn", combinations=True, embedding=True, gpu=False, input="means")
# Cosines that differ by less are equal: rounding must not decide which of two equally near genes is a neighbour.
COSINE_DECIMALS = 12


@dataclass(frozen=True)
class Settings:
    """k: how many neighbours."""

    k: int = 5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError("k: wanted at least 1")


def train(task: contract.TrainTask) -> None:
    """Store the single-gene conditions that have an embedding, train and val: model.npz."""
    settings = contract.hyperparameters(task, Settings)
    embedding = contract.unit_norm(contract.read_embedding(task.embedding))
    means = contract.read_means(task.cells)
    dataset_means = contract.dataset_means(means)
    is_single = means.obs["condition"].isin(embedding.index)
    singles = means[(is_single & means.obs["covariate"].isin(dataset_means.index)).to_numpy()]
    if not singles.n_obs:
        raise contract.ContractError(f"{task.cells}: no training perturbation of one gene has an embedding")
    np.savez(
        task.output / "model.npz",
        k=settings.k,
        genes=means.var_names.to_numpy(str),
        covariates=dataset_means.index.to_numpy(str),
        dataset_means=dataset_means.to_numpy(),
        covariate_of=singles.obs["covariate"].to_numpy(str),
        embedding_of=embedding.loc[singles.obs["condition"]].to_numpy(),
        difference_of=singles.X - dataset_means.loc[singles.obs["covariate"]].to_numpy(),
    )
    contract.progress(1, 1, "fit")


def predict(task: contract.PredictTask) -> None:
    """dataset_mean of the covariate plus the sum of the predicted differences of each condition's genes."""
    from scipy.sparse import csr_matrix

    with np.load(task.model / "model.npz", allow_pickle=False) as file:
        model = dict(file)
    embedding = contract.unit_norm(contract.read_embedding(task.embedding, model["embedding_of"].shape[1]))

    def difference_of(covariate: int, conditions: list[str]) -> np.ndarray:
        rows = model["covariate_of"] == model["covariates"][covariate]
        weights = np.zeros((len(conditions), rows.sum()))
        for row, condition in enumerate(conditions):
            cosines = embedding.loc[list(contract.genes_of(condition))].to_numpy() @ model["embedding_of"][rows].T
            weights[row] = neighbour_weights(cosines, int(model["k"])).sum(axis=0)
        differences: np.ndarray = csr_matrix(weights) @ model["difference_of"][rows]
        return differences

    contract.predict_differences(task, model, embedding, model["covariate_of"], difference_of)


def neighbour_weights(cosines: np.ndarray, k: int) -> np.ndarray:
    """Compute the weight of each neighbour (column) for each gene (row), from their cosines.

    The k largest cosines of a row, divided by their sum; of equal ones the earlier column (names are sorted). A
    negative cosine weighs 0. A row without a positive cosine has all weights 0: its predicted difference is 0.
    A gene that was itself perturbed in training is its own neighbour, with cosine 1.
    """
    cosines = np.round(cosines, COSINE_DECIMALS)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    weights = np.zeros_like(cosines)
    np.put_along_axis(weights, nearest, np.clip(np.take_along_axis(cosines, nearest, axis=1), 0, None), axis=1)
    total = weights.sum(axis=1, keepdims=True)
    shares: np.ndarray = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return shares


if __name__ == "__main__":
    contract.main(DESCRIPTION, train, predict)
