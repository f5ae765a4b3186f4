"""A small simulated screen, laid out as the contract hands a fold to a model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from model_containers import contract

SINGLES = [f"P{number:02d}" for number in range(12)]
# Perturbed genes are measured too: some models need that.
GENES = [*(f"G{number:02d}" for number in range(18)), *SINGLES]
PAIRS = ["P00+P01", "P02+P03", "P04+P05", "P01+P06"]
NO_EMBEDDING, ZERO_EMBEDDING = "P10", "P11"
UNSEEN = "unseen"


class Panel(NamedTuple):
    """One fold: train.h5ad, control.h5ad, embedding.parquet and graph.parquet in `folder`; what is held out of it."""

    folder: Path
    held_out: list[contract.Key]


def write_panel(folder: Path, covariates: tuple[str, ...]) -> Panel:
    """Write a screen of sparse cells whose effects are linear in an embedding; P03, P08 and a pair are held out.

    P10 has no embedding and P11 one of zeros; predictions are also asked for both, and for a covariate that training
    lacks. The graph is that of the embedding's cosines, of all genes but these two.
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
    make_similarity_graph(embedding.drop(index=[NO_EMBEDDING, ZERO_EMBEDDING])).to_parquet(folder / "graph.parquet")
    asked = [contract.Key(covariate, condition) for covariate in covariates for condition in held_out]
    asked += [contract.Key(covariates[0], name) for name in (NO_EMBEDDING, f"P00+{ZERO_EMBEDDING}")]
    return Panel(folder, [*asked, contract.Key(UNSEEN, "P03")])


def make_similarity_graph(embedding: pd.DataFrame) -> pd.DataFrame:
    """Return a graph between all genes of an embedding, as `contract.read_graph` wants it; weight: (1 + cosine) / 2."""
    unit = contract.unit_norm(embedding).to_numpy()
    names, weight = embedding.index.to_numpy(dtype=object), np.clip((1 + unit @ unit.T) / 2, 1e-6, 1)
    gene, other = np.nonzero(~np.eye(len(names), dtype=bool))
    table = pd.DataFrame({"gene": names[gene], "neighbour": names[other], "weight": weight[gene, other]})
    return table.sort_values(["gene", "weight", "neighbour"], ascending=[True, False, True], ignore_index=True)
