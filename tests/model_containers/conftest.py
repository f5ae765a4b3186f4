"""A small screen laid out as the contract hands it to a model, and the models' modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from model_containers import contract

# What models share they import by the names that it has in their containers.
sys.modules["contract"] = contract
from model_containers import neural  # noqa: E402

sys.modules["neural"] = neural

MODELS = Path(contract.__file__).parent
GENES = [f"G{number:02d}" for number in range(30)]
SINGLES = [f"P{number:02d}" for number in range(12)]
PAIRS = ["P00+P01", "P02+P03", "P04+P05", "P01+P06"]
NO_EMBEDDING, ZERO_EMBEDDING = "P10", "P11"


@pytest.fixture(autouse=True, scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A data folder of the tests' own: the engine keeps its scratch there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALIPERT_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@dataclass(frozen=True)
class Panel:
    """One fold: train.h5ad, control.h5ad and embedding.parquet in `folder`, and what is held out of it."""

    folder: Path
    held_out: list[contract.Key]

    def train_task(self, output: Path, **changes: object) -> contract.TrainTask:
        embedding = self.folder / "embedding.parquet"
        fields = {"cells": self.folder / "train.h5ad", "embedding": embedding, "hyperparameters": {}, "seed": 1}
        return contract.TrainTask(**(fields | {"threads": 1, "output": output} | changes))

    def predict_task(self, model: Path, output: Path, **changes: object) -> contract.PredictTask:
        fields = {"model": model, "control": self.folder / "control.h5ad", "conditions": tuple(self.held_out)}
        fields |= {"embedding": self.folder / "embedding.parquet", "seed": 1, "threads": 1, "output": output}
        return contract.PredictTask(**(fields | changes))


def write_panel(folder: Path, covariates: tuple[str, ...]) -> Panel:
    """A screen of sparse cells whose effects are linear in an embedding; P03, P08 and a pair are held out.

    P10 has no embedding and P11 one of zeros; both are also asked for, and a covariate that training lacks.
    """
    rng = np.random.default_rng(7)
    embedding = pd.DataFrame(rng.normal(size=(12, 6)), index=pd.Index(SINGLES, name="gene")).add_prefix("d")
    embedding = 3 * contract.unit_norm(embedding)
    embedding.loc[ZERO_EMBEDDING] = 0.0
    effect = rng.normal(scale=0.3, size=(6, len(GENES)))
    baseline = rng.uniform(1.0, 3.0, size=len(GENES))
    held_out = ["P03", "P08", "P02+P03"]
    blocks, rows = [], []
    for shift, covariate in enumerate(covariates):
        for condition in [contract.CONTROL, *SINGLES, *PAIRS]:
            if condition in held_out or condition == NO_EMBEDDING:
                continue
            genes = list(contract.genes_of(condition))
            mean = baseline + 0.3 * shift + embedding.loc[genes].sum().to_numpy() @ effect
            cells = rng.normal(mean, 0.5, size=(15, len(GENES)))
            blocks.append(np.where(rng.random(cells.shape) < 0.2, 0, np.clip(cells, 0, None)))
            split = "val" if condition in ("P07", "P04+P05") else "train"
            rows += [(covariate, condition, split)] * len(cells)
    obs = pd.DataFrame(rows, columns=["covariate", "condition", "split"]).sort_values(["covariate", "condition"])
    order = obs.index.to_numpy()
    obs.index = [f"cell{row:04d}" for row in range(len(obs))]
    X = sparse.csr_matrix(np.concatenate(blocks)[order].astype(np.float32))
    cells = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=GENES))
    cells.layers["counts"] = X.copy()
    cells.write_h5ad(folder / "train.h5ad")
    cells[cells.obs["condition"] == contract.CONTROL].write_h5ad(folder / "control.h5ad")
    embedding.drop(index=NO_EMBEDDING).to_parquet(folder / "embedding.parquet")
    asked = [contract.Key(covariate, condition) for covariate in covariates for condition in held_out]
    asked += [contract.Key(covariates[0], name) for name in (NO_EMBEDDING, f"P00+{ZERO_EMBEDDING}")]
    return Panel(folder, [*asked, contract.Key("unseen", "P03")])


@pytest.fixture(scope="session")
def panel(tmp_path_factory: pytest.TempPathFactory) -> Panel:
    """A screen in one covariate."""
    return write_panel(tmp_path_factory.mktemp("panel"), ("line",))


@pytest.fixture(scope="session")
def two_lines(tmp_path_factory: pytest.TempPathFactory) -> Panel:
    """A screen in two covariates."""
    return write_panel(tmp_path_factory.mktemp("two_lines"), ("K562", "RPE1"))


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    """Imports the model.py of a folder of model_containers, as its own process would."""

    def module(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_model", MODELS / name / "model.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded  # dataclasses look their module up
        spec.loader.exec_module(loaded)
        return loaded

    return module


@pytest.fixture(autouse=True)
def _processor_as_found() -> Iterator[None]:
    """A model that trains within the tests' process may have told the processor to flush the smallest numbers to 0."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
