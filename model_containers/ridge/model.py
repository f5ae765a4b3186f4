"""Ridge regression from gene embeddings to expression differences (docs/science.md section 3, row `knn, ridge`).

Per covariate. Target of a condition: its mean profile minus the fold's dataset_mean. A gene enters as its
unit-norm embedding, a combination as the sum of its genes', so that its predicted difference is the sum of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import contract

if not TYPE_CHECKING:
    np = contract.LateModule("numpy")
else:
    import numpy as np


DESCRIPTION = contract.Description(name="ridge", combinations=True, embedding=True, gpu=False, input="means")


@dataclass(frozen=True)
class Settings:
    """alphas: the penalties to choose from by the val conditions."""

    alphas: tuple[float, ...] = (0.1, 1.0, 10.0)

    def __post_init__(self) -> None:
        if not self.alphas or min(self.alphas) <= 0:
            raise ValueError("alphas: wanted one or more numbers above 0")


def train(task: contract.TrainTask) -> None:
    """Fit every covariate that has a train perturbation and a perturbation with an embedding: model.npz."""
    settings = contract.hyperparameters(task, Settings)
    embedding = contract.unit_norm(contract.read_embedding(task.embedding))
    means = contract.read_means(task.cells)
    dataset_means = contract.dataset_means(means)
    coefficients = {}
    is_embedded = contract.perturb_known(means.obs["condition"], embedding.index)
    for done, covariate in enumerate(dataset_means.index, start=1):
        known = means[is_embedded & (means.obs["covariate"] == covariate).to_numpy()]
        if known.n_obs:
            x = contract.sum_embeddings(known.obs["condition"].tolist(), embedding)
            y = known.X - dataset_means.loc[covariate].to_numpy()
            is_val = (known.obs["split"] == "val").to_numpy()
            alpha, errors = choose_alpha(x, y, is_val, settings.alphas)
            coefficients[covariate] = solve(x, y, alpha)
            tried = ", ".join(f"{error:.3g} with {value:g}" for value, error in errors.items()) or "no val conditions"
            contract.log(f"{covariate}: {known.n_obs} conditions, alpha {alpha:g} (squared error of val: {tried})")
        contract.progress(done, len(dataset_means), "covariate")
    if not coefficients:
        raise contract.ContractError(f"{task.cells}: no training perturbation has an embedding")
    np.savez(
        task.output / "model.npz",
        covariates=np.array(list(coefficients)),
        genes=means.var_names.to_numpy(str),
        dataset_means=dataset_means.loc[list(coefficients)].to_numpy(),
        coefficients=np.stack(list(coefficients.values())),
    )


def predict(task: contract.PredictTask) -> None:
    """dataset_mean of the covariate plus the predicted difference of each condition."""
    with np.load(task.model / "model.npz", allow_pickle=False) as file:
        model = dict(file)
    embedding = contract.unit_norm(contract.read_embedding(task.embedding, model["coefficients"].shape[1]))

    def difference_of(covariate: int, conditions: list[str]) -> np.ndarray:
        differences: np.ndarray = contract.sum_embeddings(conditions, embedding) @ model["coefficients"][covariate]
        return differences

    contract.predict_differences(task, model, embedding, model["covariates"], difference_of)


def solve(x: np.ndarray, y: np.ndarray, alpha: float) -> np.ndarray:
    """Compute the ridge coefficients X'(XX' + alpha I)^-1 Y (dimensions x genes), no intercept, in the dual form."""
    return x.T @ np.linalg.solve(x @ x.T + alpha * np.eye(len(x)), y)


def choose_alpha(
    x: np.ndarray, y: np.ndarray, is_val: np.ndarray, alphas: tuple[float, ...]
) -> tuple[float, dict[float, float]]:
    """Choose the alpha of the least mean squared error on the val rows (the first such), and every alpha's error.

    Fitted on the other rows. Without val rows, or without others, there is nothing to choose by: 1.
    """
    if not is_val.any() or is_val.all():
        return 1.0, {}
    errors = {}
    for alpha in alphas:
        predicted = x[is_val] @ solve(x[~is_val], y[~is_val], alpha)
        errors[alpha] = float(np.mean((predicted - y[is_val]) ** 2))
    return min(errors, key=lambda alpha: errors[alpha]), errors


if __name__ == "__main__":
    contract.main(DESCRIPTION, train, predict)
