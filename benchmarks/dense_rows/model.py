"""The obvious way to train a model of this project, as a model of its own: the peer of `benchmarks.training`.

Its networks, steps and draws are those of the model that the hyperparameter `model` names. What differs:
* cells are held dense, and a DataLoader fetches each batch row by row;
* fmlp takes each cell of a batch through the network, not each condition;
* presage, which sees no single cell, has the means of conditions from dense cells, one condition after the other.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import contract
import neural

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import anndata as ad
    import numpy as np
    import torch
    from scipy.sparse import csr_matrix

DESCRIPTION = contract.Description(
    name="dense_rows", combinations=True, embedding=True, counts=False, gpu=True, input="cells"
)
IMPORTS = "imports"  # instead of a model: what all of them load before they read a cell


def train(task: contract.TrainTask) -> None:
    """Train the model that the hyperparameter `model` names, which gets the others."""
    name, *others = task.hyperparameters["model"], *task.hyperparameters.items()
    if name == IMPORTS:
        neural.start_torch(task.threads)
        for package in ("anndata", "h5py", "pandas", "scipy.sparse"):
            importlib.import_module(package)
        return
    model = loaded(name)
    neural.hold_rows = dense_rows
    contract.read_means = dense_means
    if name == "fmlp":
        model.squared_error = error_of_each(model)
    model.train(replace(task, hyperparameters={key: value for key, value in others if key != "model"}))


def predict(task: contract.PredictTask) -> None:
    """Refuse: this model is for timing only."""
    raise contract.ContractError("dense_rows: does not predict")


def loaded(name: str) -> ModuleType:
    """Import the module of a model's folder."""
    path = Path(contract.__file__).parent / name / "model.py"
    spec = importlib.util.spec_from_file_location(f"{name}_model", path)
    if spec is None or spec.loader is None:
        raise contract.ContractError(f"{path}: not a module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def dense_rows(matrix: csr_matrix, device: Any) -> Callable[[np.ndarray], torch.Tensor]:
    """As neural.hold_rows."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    cells = TensorDataset(torch.from_numpy(matrix.toarray()))
    # A loader draws a number from its generator, which must not be the one that the networks draw from.
    own = torch.Generator()

    def rows(batch: np.ndarray) -> torch.Tensor:
        (fetched,) = next(iter(DataLoader(cells, len(batch), sampler=batch.tolist(), generator=own)))
        dense: torch.Tensor = fetched.to(device)
        return dense

    return rows


def dense_means(path: Path) -> ad.AnnData:
    """As contract.read_means."""
    import anndata as ad
    import numpy as np
    import pandas as pd

    cells = contract.read_cells(path)
    dense = cells.X.toarray()
    rows_of = cells.obs.groupby(["covariate", "condition", "split"]).indices
    means = np.stack([dense[rows].mean(axis=0, dtype=np.float64) for rows in rows_of.values()])
    obs = pd.DataFrame(list(rows_of), columns=["covariate", "condition", "split"], index=list(map("|".join, rows_of)))
    return ad.AnnData(means, obs=obs, var=pd.DataFrame(index=cells.var_names))


def error_of_each(model: ModuleType) -> Callable[..., torch.Tensor]:
    """As squared_error of fmlp."""

    def squared_error(net: Any, conditions: Any, condition: np.ndarray, measured: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import mse_loss

        return mse_loss(model.forward(net, conditions, condition), measured).double()

    return squared_error


if __name__ == "__main__":
    contract.main(DESCRIPTION, train, predict)
