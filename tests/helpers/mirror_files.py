"""A file in the layout of the public preprocessed mirror, made of our cells with pandas and scanpy alone."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc


def mirror_of(cells: ad.AnnData, seed: int = 0) -> ad.AnnData:
    """cells: as prepared, combinations in two folds. Rows, genes and stored tables stand in no order.

    Like the public files it holds cells labelled `ctrl_synthetic_mean` that are not perturbations, and its
    second-half DE has control in the rest.
    """
    rng = np.random.default_rng(seed)
    genes = cells.var_names.to_numpy()
    folds = [column for column in cells.obs.columns if column.startswith("fold_")]
    obs = cells.obs.astype(str)
    x = pd.DataFrame(cells.X.toarray().astype(np.float64), index=obs.index, columns=genes)

    key = obs["covariate"] + "_" + obs["condition"]
    first, second = obs["half"] == "first_half", obs["half"] == "second_half"
    perturbed = obs["condition"] != "control"
    uns: dict[str, object] = {
        "technical_duplicate_first_half_baseline": x[first].groupby(key[first]).mean(),
        "technical_duplicate_second_half_baseline": x[second].groupby(key[second]).mean(),
        "ctrl_baseline": x[~perturbed].groupby(obs["covariate"][~perturbed]).mean(),
    }
    for fold, column in enumerate(folds):
        training = perturbed & (obs[column] == "train")
        means = x[training].groupby([obs["covariate"][training], obs["condition"][training]]).mean()
        uns[f"split_fold_{fold}_split_mean_baseline"] = means.groupby(level="covariate").mean()
    for suffix, used in (("_gt", first & perturbed), ("", second)):
        results = _differential(cells[used.to_numpy()], key[used])
        for slot, table in results.items():
            uns[slot + suffix] = table

    additive, interpolated = {}, {}
    for (covariate, condition), rows in obs[perturbed].groupby(["covariate", "condition"]):
        test = [fold for fold, column in enumerate(folds) if (rows[column] == "test").all()]
        if not test:
            continue
        name = f"{covariate}_{condition}"
        padj = pd.Series(uns["pvals_adj_df_dict"][name], index=uns["names_df_dict"][name])[genes]
        mean = uns[f"split_fold_{test[0]}_split_mean_baseline"].loc[covariate]
        duplicate = uns["technical_duplicate_second_half_baseline"].loc[name]
        interpolated[name] = (1 - padj) * duplicate + padj * mean
        singles = [f"{covariate}_{gene}" for gene in condition.split("+")]
        if len(singles) == 2 and set(singles) <= set(key):
            control = x[(obs["condition"] == "control") & (obs[folds[test[0]]] == "train")].mean()
            additive[name] = control + sum(x[key == single].mean() - control for single in singles)
    uns["interpolated_duplicate_baseline"] = pd.DataFrame(interpolated).T
    uns["additive_baseline"] = pd.DataFrame(additive).T
    for slot, table in uns.items():
        if isinstance(table, pd.DataFrame):
            uns[slot] = table.sample(frac=1, random_state=seed).sample(frac=1, axis=1, random_state=seed + 1)
            uns[slot].index.name = None

    table = pd.DataFrame({"condition": obs["condition"], "donor_id": obs["covariate"], "tech_dup_split": obs["half"]})
    for fold, column in enumerate(folds):
        table[f"split_fold_{fold}"] = obs[column]
    synthetic = table.iloc[:5].assign(condition="ctrl_synthetic_mean")
    synthetic.index = [f"synthetic_{number}" for number in range(5)]
    mirror = ad.AnnData(
        np.vstack([x.to_numpy(), np.full((5, len(genes)), 0.5)]).astype(np.float32),
        obs=pd.concat([table, synthetic]),
        var=pd.DataFrame(index=genes),
    )
    mirror = mirror[rng.permutation(mirror.n_obs)][:, rng.permutation(mirror.n_vars)].copy()
    mirror.uns.update(uns)
    return mirror


def _differential(cells: ad.AnnData, key: pd.Series) -> dict[str, dict[str, list]]:
    data = ad.AnnData(cells.X, obs=pd.DataFrame({"key": pd.Categorical(key)}, index=cells.obs_names), var=cells.var)
    data.uns["log1p"] = {"base": None}
    groups = [name for name in data.obs["key"].cat.categories if not name.endswith("_control")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy's own, of how it fills its table
        sc.tl.rank_genes_groups(data, "key", groups=groups, reference="rest", method="t-test_overestim_var")
    slots = {"names_df_dict": "names", "scores_df_dict": "scores", "pvals_adj_df_dict": "pvals_adj"}
    return {slot: {g: list(data.uns["rank_genes_groups"][field][g]) for g in groups} for slot, field in slots.items()}
