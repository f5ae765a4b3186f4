"""Predicted profiles at the door: aligned by name with the reference, or refused with the reason."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from core.arrays import Floats
from core.errors import UserError, shown
from core.files import open_h5ad, read_genes
from core.harmonising import SEPARATOR
from core.reference import KEYS, read_keys

# A mean of log1p(CP10k) cannot be larger: one gene would have all of a cell's counts.
LARGEST = float(np.log1p(10_000))
SHARED_GENES = 0.95


def align_predictions(data: ad.AnnData, keys: pd.DataFrame, genes: pd.Index, where: str) -> ad.AnnData:
    """Predictions as scoring takes them: X float64, rows sorted by (covariate, condition), genes in the reference's order.

    data: conditions x genes, X predicted mean log1p(CP10k); obs `condition`, and `covariate` unless the reference has one
    only. keys: covariate and condition of everything that may be predicted. genes: the reference's.
    `B+A` is `A+B`. Genes that the reference lacks are left out; of its own at least 95 % must be there. Slightly
    negative values are allowed: linear models predict them.
    Raises UserError for everything else that does not fit.
    """
    conditions = _conditions(data, keys, where)
    repeated = data.var_names[data.var_names.duplicated()]
    if len(repeated):
        raise UserError(where, "var_names", f"gene {repeated[0]!r} more than once", "keep one column per gene")
    found = _covariates(data, keys, where).assign(condition=conditions)
    twice = found[found.duplicated(KEYS)]
    if len(twice):
        raise UserError(
            where, "obs", f"{len(twice)} duplicated rows (first: {twice['condition'].iloc[0]})", "one row per condition"
        )
    known = pd.MultiIndex.from_frame(keys[KEYS].astype(str))
    unknown = found[~pd.MultiIndex.from_frame(found[KEYS]).isin(known)]
    if len(unknown):
        raise _unknown(unknown, keys, where)
    shared = genes[genes.isin(data.var_names)]
    if len(shared) < SHARED_GENES * len(genes):
        missing = sorted(set(genes) - set(shared))
        raise UserError(
            where,
            "var_names",
            f"{len(missing)} of the reference's {len(genes)} genes are missing ({shown(missing)})",
            f"predict at least {SHARED_GENES:.0%} of them, named as in the data set",
        )
    order = np.lexsort([found["condition"].to_numpy(str), found["covariate"].to_numpy(str)])
    values = _dense(data[:, shared])[order]
    _check_values(values, found.iloc[order], shared, where)
    obs = found.iloc[order].copy()
    obs.index = pd.Index(obs["covariate"] + "|" + obs["condition"])
    return ad.AnnData(X=values, obs=obs, var=pd.DataFrame(index=shared))


def check_model_output(
    folder: Path, asked: list[dict[str, str]], genes: pd.Index, model: str
) -> tuple[ad.AnnData, list[dict[str, Any]]]:
    """(predictions, unpredicted) that a model wrote into `folder`, aligned and complete.

    asked: what it was asked for; each must be predicted or stand in unpredicted.json with a reason. Raises UserError
    naming the model where its output breaks the contract.
    """
    where = f"output of {model}"
    keys = pd.DataFrame(asked, columns=KEYS)
    path = folder / "unpredicted.json"
    try:
        unpredicted = json.loads(path.read_text(encoding="utf-8"))
        reasons = {(row["covariate"], row["condition"]): str(row["reason"]) for row in unpredicted}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            where, path.name, f"{type(error).__name__}: {error}", "write a list of covariate, condition and reason"
        ) from error
    predictions = align_predictions(open_h5ad(folder / "predictions.h5ad"), keys, genes, where)
    answered = set(pd.MultiIndex.from_frame(predictions.obs[KEYS]))
    wanted = set(pd.MultiIndex.from_frame(keys))
    if answered & set(reasons) or (answered | set(reasons)) != wanted:
        wrong = sorted((answered & set(reasons)) | ((answered | set(reasons)) ^ wanted))
        raise UserError(
            where,
            "condition",
            f"{len(wrong)} not answered exactly once (first: {' '.join(wrong[0])})",
            "predict each condition asked for, or name it in unpredicted.json",
        )
    rows = [{"covariate": a, "condition": b, "reason": reasons[a, b]} for a, b in sorted(reasons)]
    return predictions, rows


def write_accepted(file: Path, reference: Path, folder: Path) -> None:
    """Align a file of predictions made elsewhere with the reference in the folder `reference`, and write it into `folder`.

    Writes predictions.h5ad and unpredicted.json (the test conditions that the file lacks).
    """
    keys = read_keys(reference)
    tested = keys.loc[keys["test_fold"] >= 0, KEYS].reset_index(drop=True)
    genes = read_genes(reference / "reference.h5ad")
    predictions = align_predictions(open_h5ad(file), tested, genes, str(file))
    lacking = set(pd.MultiIndex.from_frame(tested)) - set(pd.MultiIndex.from_frame(predictions.obs[KEYS]))
    predictions.write_h5ad(folder / "predictions.h5ad")
    rows = [{"covariate": a, "condition": b, "reason": "not in the file"} for a, b in sorted(lacking)]
    (folder / "unpredicted.json").write_text(json.dumps(rows), encoding="utf-8")


def _conditions(data: ad.AnnData, keys: pd.DataFrame, where: str) -> pd.Series[str]:
    known = set(keys["condition"].astype(str))
    if known & set(data.var_names.map(_sorted_genes)) and not known & set(data.obs_names.map(_sorted_genes)):
        looks = "condition" not in data.obs or not known & set(data.obs["condition"].astype(str).map(_sorted_genes))
        # Perturbed genes may be measured genes: only when no row is a condition are the columns taken for them.
        if looks:
            raise UserError(
                where, "shape", "conditions stand among the columns", "transpose it: conditions x genes (adata.T)"
            )
    if "condition" not in data.obs:
        raise UserError(where, "obs['condition']", "no such column", "name each row's condition in obs['condition']")
    if data.n_obs == 0:
        raise UserError(where, "shape", "no row", "one row per predicted condition")
    return data.obs["condition"].astype(str).map(_sorted_genes)


def _sorted_genes(condition: str) -> str:
    return SEPARATOR.join(sorted(condition.split(SEPARATOR)))


def _covariates(data: ad.AnnData, keys: pd.DataFrame, where: str) -> pd.DataFrame:
    if "covariate" in data.obs:
        return pd.DataFrame({"covariate": data.obs["covariate"].astype(str)}, index=data.obs_names)
    covariates = sorted(keys["covariate"].astype(str).unique())
    if len(covariates) > 1:
        raise UserError(
            where,
            "obs['covariate']",
            f"no such column; the data set has {shown(covariates)}",
            "name each row's covariate",
        )
    return pd.DataFrame({"covariate": covariates * data.n_obs}, index=data.obs_names)


def _unknown(unknown: pd.DataFrame, keys: pd.DataFrame, where: str) -> UserError:
    first = unknown.iloc[0]
    near = get_close_matches(first["condition"], sorted(keys["condition"].astype(str)), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return UserError(
        where,
        "obs['condition']",
        f"{len(unknown)} rows that are no test condition (first: {first['condition']} in {first['covariate']})",
        f"{hint}leave out what is not tested, control included",
    )


def _dense(data: ad.AnnData) -> Floats:
    values = data.X.toarray() if sparse.issparse(data.X) else np.asarray(data.X)
    return np.asarray(values, dtype=np.float64)


def _check_values(values: Floats, rows: pd.DataFrame, genes: pd.Index, where: str) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UserError(
            where,
            "X",
            f"{int(bad.sum()):,} values that are NaN or infinite (first: {rows['condition'].iloc[row]}, {genes[column]})",
            "predict every gene of a condition, or leave the condition out",
        )
    whole = values.max() > 1 and (values == np.floor(values)).all()
    if whole or values.max() > LARGEST:
        raise UserError(
            where,
            "X",
            f"values up to {values.max():g}{', all whole numbers' if whole else ''}: counts, or not log1p(CP10k)",
            f"give means of log1p of counts per 10,000 (at most {LARGEST:.2f})",
        )
