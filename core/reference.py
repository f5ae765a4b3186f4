"""reference.h5ad and negatives.h5ad: all that scoring and calibration need, so that nothing reads cells again."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from core.arrays import Floats, Ints
from core.controls import additive, interpolate, sparse_means
from core.differential import against_rest, deg_mask
from core.files import read_obs
from core.harmonising import CONTROL, genes_of
from core.linear import linear
from core.moments import Moments, group_codes, group_means, group_moments
from core.splits import draw_halves, fold_columns

KEYS = ["covariate", "condition"]
HALF_LAYERS = (
    "truth",
    "technical_duplicate",
    "interpolated_duplicate",
    "t_first",
    "padj_first",
    "t_second",
    "padj_second",
)


def write_reference(cells: ad.AnnData, seed: int, half_seeds: int, folder: Path) -> None:
    """Write reference.h5ad, negatives.h5ad and half_splits/seed_<s>.h5ad of the further half splits into `folder`.

    seed: the seed of the cells' own halves and of sparse_mean; the further splits have seed + 1, seed + 2, ...
    """
    negatives = build_negatives(cells)
    negatives.write_h5ad(folder / "negatives.h5ad")
    build_reference(cells, negatives, seed).write_h5ad(folder / "reference.h5ad")
    (folder / "half_splits").mkdir()
    for further in range(seed + 1, seed + half_seeds):
        split = build_half_split(cells, draw_halves(cells.obs, further), negatives)
        split.write_h5ad(folder / "half_splits" / f"seed_{further}.h5ad")


def read_reference(folder: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """(reference, negatives) that `write_reference` wrote into `folder`."""
    return ad.read_h5ad(folder / "reference.h5ad"), ad.read_h5ad(folder / "negatives.h5ad")


def read_keys(folder: Path) -> pd.DataFrame:
    """Only the rows' description (covariate, condition, n_cells, test_fold, ...) of the reference in `folder`."""
    keys = read_obs(folder / "reference.h5ad").astype(dict.fromkeys(KEYS, str)).reset_index(drop=True)
    return keys


def half_split_files(folder: Path) -> dict[int, Path]:
    """Seed -> file of the further half splits in `folder`, in the order of the seeds."""
    files = (folder / "half_splits").glob("seed_*.h5ad")
    return dict(sorted((int(file.stem.removeprefix("seed_")), file) for file in files))


def reference_keys(cells: ad.AnnData) -> pd.DataFrame:
    """(covariate, condition) of all perturbed conditions, sorted, with `n_cells` and `test_fold` (-1: never test)."""
    obs = cells.obs
    perturbed = obs[obs["condition"] != CONTROL]
    groups = perturbed.groupby([perturbed[k].astype(str) for k in KEYS], observed=True, sort=True)
    table = groups.size().rename("n_cells").to_frame()
    table["test_fold"] = -1
    for fold, column in enumerate(fold_columns(obs)):
        is_test = groups[column].first() == "test"
        table.loc[is_test[is_test].index, "test_fold"] = fold
    keys: pd.DataFrame = table.reset_index()
    return keys


def build_negatives(cells: ad.AnnData) -> ad.AnnData:
    """negatives.h5ad: per covariate control_mean (fold -1) and each fold's dataset_mean (rows x genes, log1p).

    dataset_mean is the mean over the fold's training perturbations of their mean profiles: every perturbation
    weighs the same, control does not take part.
    """
    keys = reference_keys(cells)
    means = group_means(cells.X, group_codes(cells.obs, keys[KEYS]), len(keys))
    rows, profiles = [], []
    for covariate in sorted(keys["covariate"].unique()):
        of_covariate = (cells.obs["covariate"] == covariate).to_numpy()
        controls = of_covariate & (cells.obs["condition"] == CONTROL).to_numpy()
        rows.append((covariate, "control_mean", -1))
        profiles.append(_mean(cells, controls))
        for fold, column in enumerate(fold_columns(cells.obs)):
            in_training = (keys["covariate"] == covariate) & condition_split(cells.obs, keys, column).eq("train")
            rows.append((covariate, "dataset_mean", fold))
            profiles.append(means[in_training.to_numpy()].mean(axis=0))
    obs = pd.DataFrame(rows, columns=["covariate", "kind", "fold"])
    obs.index = pd.Index(obs["covariate"] + "|" + obs["kind"] + "|" + obs["fold"].astype(str))
    return ad.AnnData(X=np.vstack(profiles), obs=obs, var=pd.DataFrame(index=cells.var_names))


def condition_split(obs: pd.DataFrame, keys: pd.DataFrame, column: str) -> pd.Series:
    """The split of each row of `keys` in the fold `column`, aligned with `keys`."""
    by_condition = obs.groupby([obs[k].astype(str) for k in KEYS], observed=True)[column].first()
    return pd.Series(
        by_condition.reindex(pd.MultiIndex.from_frame(keys[KEYS])).astype(str).to_numpy(), index=keys.index
    )


def build_half_split(cells: ad.AnnData, half: pd.Series, negatives: ad.AnnData) -> ad.AnnData:
    """What depends on the halves: truth, duplicates and differential expression of each half.

    half: `first_half` or `second_half` for each cell. Returns (covariate, condition) x genes with the layers of
    HALF_LAYERS, float64; interpolated_duplicate is NaN for conditions that are never test.
    """
    keys = reference_keys(cells)
    is_first = half.to_numpy() == "first_half"
    codes = group_codes(cells.obs, keys[KEYS])
    first = group_moments(cells.X, np.where(is_first, codes, -1), len(keys))
    second = group_moments(cells.X, np.where(is_first, -1, codes), len(keys))
    t_first, padj_first = _differential(first, keys)
    t_second, padj_second = _differential(second, keys)
    truth, duplicate = first.mean(), second.mean()
    layers = {
        "truth": truth,
        "technical_duplicate": duplicate,
        "interpolated_duplicate": interpolate(duplicate, dataset_means(negatives, keys), padj_second),
        "t_first": t_first,
        "padj_first": padj_first,
        "t_second": t_second,
        "padj_second": padj_second,
    }
    obs = keys.assign(n_first=first.n, n_second=second.n, n_degs=deg_mask(padj_first).sum(axis=1))
    return by_condition(obs, layers, cells.var_names)


def build_reference(cells: ad.AnnData, negatives: ad.AnnData, seed: int) -> ad.AnnData:
    """reference.h5ad of the cells' own halves: HALF_LAYERS and mean, sparse_mean, additive, linear.

    Rows without a value in a layer (conditions never test; combinations with an unknown single; genes not
    measured) are NaN.
    """
    reference = build_half_split(cells, cells.obs["half"], negatives)
    keys = reference.obs
    codes = group_codes(cells.obs, keys[KEYS])
    means = group_means(cells.X, codes, len(keys))
    layers = {name: np.full(means.shape, np.nan) for name in ("sparse_mean", "additive", "linear")}
    folds = fold_columns(cells.obs)
    for covariate in sorted(keys["covariate"].unique()):
        for fold, column in enumerate(folds):
            rows = np.flatnonzero((keys["covariate"] == covariate) & (keys["test_fold"] == fold))
            if len(rows):
                for name, values in _fold_baselines(cells, keys, means, covariate, column, rows, seed).items():
                    layers[name][rows] = values
    reference.layers["mean"] = means
    for name, values in layers.items():
        reference.layers[name] = values
    return reference


def _fold_baselines(
    cells: ad.AnnData, keys: pd.DataFrame, means: Floats, covariate: str, column: str, rows: Ints, seed: int
) -> dict[str, Floats]:
    """sparse_mean, additive and linear of the conditions `rows`, tested in the fold `column` of one covariate."""
    obs = cells.obs
    in_training = (obs["covariate"] == covariate).to_numpy() & (obs[column] == "train").to_numpy()
    is_control = (obs["condition"] == CONTROL).to_numpy()
    training = np.flatnonzero((keys["covariate"] == covariate) & condition_split(obs, keys, column).eq("train"))
    conditions = keys["condition"].to_numpy()
    singles = [row for row in training if len(genes_of(conditions[row])) == 1]
    tests = {conditions[row]: int(keys["n_cells"].iloc[row]) for row in rows}
    return {
        "sparse_mean": sparse_means(cells.X, obs, covariate, tests, np.flatnonzero(in_training & ~is_control), seed),
        "additive": additive(
            list(tests),
            {conditions[row]: means[row] for row in singles},
            _mean(cells, in_training & is_control),
        ),
        "linear": linear([conditions[row] for row in singles], means[singles], cells.var_names, list(tests)),
    }


def dataset_means(negatives: ad.AnnData, keys: pd.DataFrame) -> Floats:
    """For each (covariate, condition) the dataset_mean of the fold in which it is test; NaN if it never is."""
    return _rows_of(negatives, "dataset_mean", keys["covariate"], keys["test_fold"])


def control_means(negatives: ad.AnnData, keys: pd.DataFrame) -> Floats:
    """For each (covariate, condition) the control_mean of its covariate."""
    return _rows_of(negatives, "control_mean", keys["covariate"], pd.Series(-1, index=keys.index))


def _rows_of(negatives: ad.AnnData, kind: str, covariate: pd.Series, fold: pd.Series) -> Floats:
    of_kind = negatives[negatives.obs["kind"] == kind]
    index = pd.MultiIndex.from_arrays([of_kind.obs["covariate"].astype(str), of_kind.obs["fold"].astype(int)])
    rows = index.get_indexer(pd.MultiIndex.from_arrays([covariate.astype(str), fold.astype(int)]))
    profiles = np.asarray(of_kind.X, dtype=np.float64)[rows]
    profiles[rows < 0] = np.nan
    return np.asarray(profiles)


def _differential(moments: Moments, keys: pd.DataFrame) -> tuple[Floats, Floats]:
    t, padj = np.empty(moments.total.shape), np.empty(moments.total.shape)
    for covariate in keys["covariate"].unique():
        rows = np.flatnonzero(keys["covariate"] == covariate)
        t[rows], padj[rows] = against_rest(moments.of(rows))
    return t, padj


def _mean(cells: ad.AnnData, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Floats:
    mean = group_means(cells.X, np.where(mask, 0, -1), 1)[0]
    return np.asarray(mean)


def by_condition(keys: pd.DataFrame, layers: dict[str, Floats], genes: pd.Index) -> ad.AnnData:
    """(covariate, condition) x genes with `keys` as obs, named `covariate|condition`."""
    obs = keys.copy()
    obs.index = pd.Index(obs["covariate"].astype(str) + "|" + obs["condition"].astype(str))
    return ad.AnnData(obs=obs, var=pd.DataFrame(index=genes), layers=layers)
