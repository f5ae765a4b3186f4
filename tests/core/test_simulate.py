"""The simulator: what it plants is what the cells show, and nothing hangs on what else is drawn."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy import sparse, stats

from core.errors import UserError
from core.simulate import Simulation, SimulationSettings, compute_planted_profiles, simulate

SMALL = SimulationSettings(genes=300, singles=8, combinations=6, cells_per_condition=20, control_cells=60)
# No programs at work and no spread of library sizes: every count is one negative binomial, of known mean and phi.
PLAIN = SimulationSettings(
    genes=200, singles=1, null_share=1, loading=0, library_size_sd=0, cells_per_condition=1, control_cells=20_000
)


@pytest.fixture(scope="module")
def small() -> Simulation:
    return simulate(SMALL)


@pytest.fixture(scope="module")
def plain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """20,000 cells x 200 genes of one negative binomial per gene, its planted mean and phi."""
    simulation = simulate(PLAIN)
    counts = simulation.cells[simulation.cells.obs["perturbation"] == "control"].X.toarray().astype(float)
    mean = 1.6 * 200 * simulation.truth["line_1|control"].layers["expected"][0]
    return counts, mean, simulation.truth.var["dispersion"].to_numpy()


def changed(settings: SimulationSettings, **fields: object) -> SimulationSettings:
    return SimulationSettings.model_validate(settings.model_dump() | fields)


def counts_of(simulation: Simulation, condition: str, line: str = "line_1") -> np.ndarray:
    obs = simulation.cells.obs
    return simulation.cells[(obs["perturbation"] == condition) & (obs["cell_line"] == line)].X.toarray()


def lfc(simulation: Simulation, condition: str, line: str = "line_1") -> np.ndarray:
    return simulation.truth[f"{line}|{condition}"].layers["lfc"][0]


def mean_log1p(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over cells of log1p(CP10k), and its standard error."""
    x = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    return x.mean(axis=0), x.std(axis=0, ddof=1) / np.sqrt(len(x))


# Layout


def test_cells_look_like_a_published_raw_file(small: Simulation) -> None:
    cells = small.cells
    assert sparse.isspmatrix_csr(cells.X)
    assert cells.X.dtype == np.float32
    assert np.array_equal(cells.X.data, np.round(cells.X.data))
    assert cells.X.data.min() >= 1
    assert list(cells.obs.columns) == ["perturbation", "cell_line"]
    assert cells.obs_names.is_unique
    assert list(cells.var_names[:2]) == ["G0001", "G0002"]
    labels = set(cells.obs["perturbation"].cat.categories)
    singles = {label for label in labels if "+" not in label} - {"control"}
    pairs = {label for label in labels if "+" in label}
    assert len(singles) == 8
    assert len(pairs) == 6
    assert singles <= set(cells.var_names)
    assert {gene for pair in pairs for gene in pair.split("+")} <= singles


def test_truth_lines_up_with_the_cells(small: Simulation) -> None:
    truth = small.truth
    assert list(truth.var_names) == list(small.cells.var_names)
    counted = small.cells.obs.groupby("perturbation", observed=True).size()
    assert counted.to_dict() == truth.obs.set_index("condition")["n_cells"].to_dict()
    np.testing.assert_allclose(truth.layers["expected"].sum(axis=1), 1, rtol=1e-12)
    assert np.isfinite(truth.layers["lfc"]).all()


def test_both_objects_survive_a_file(small: Simulation, tmp_path: Path) -> None:
    for name, written in (("cells", small.cells), ("truth", small.truth)):
        written.write_h5ad(tmp_path / name)
    cells, truth = (anndata.read_h5ad(tmp_path / name) for name in ("cells", "truth"))
    assert (cells.X != small.cells.X).nnz == 0
    pd.testing.assert_frame_equal(truth.varm["line_1"], small.truth.varm["line_1"])
    assert SimulationSettings.model_validate_json(truth.uns["settings"]) == SMALL


# Independence of draws


def test_same_settings_give_the_same_bytes(small: Simulation) -> None:
    again = simulate(SMALL)
    assert again.cells.X.data.tobytes() == small.cells.X.data.tobytes()
    assert again.cells.X.indices.tobytes() == small.cells.X.indices.tobytes()
    assert again.truth.layers["lfc"].tobytes() == small.truth.layers["lfc"].tobytes()
    pd.testing.assert_frame_equal(again.cells.obs, small.cells.obs)


def test_another_seed_is_another_screen(small: Simulation) -> None:
    other = simulate(changed(SMALL, seed=43))
    assert set(other.cells.obs["perturbation"]) != set(small.cells.obs["perturbation"])
    assert not np.array_equal(other.truth.layers["expected"], small.truth.layers["expected"])


@pytest.mark.parametrize(
    "more",
    [
        {"singles": 12},
        {"combinations": 20},
        {"cells_per_condition": 35.0},
        {"control_cells": 600},  # crosses the limit of cells held in memory at a time
        {"cell_lines": ["line_1", "line_0"]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_is_there_stays_when_more_is_asked_for(small: Simulation, more: dict[str, object]) -> None:
    larger = simulate(changed(SMALL, **more))
    shared = [row for row in small.truth.obs_names if row in larger.truth.obs_names]
    singles = [row for row in small.truth.obs_names if "+" not in row]
    assert set(singles) <= set(shared)
    if "singles" not in more:  # other singles make other pairs
        assert len(shared) == len(small.truth)
    for layer in ("lfc", "expected"):
        assert np.array_equal(larger.truth[shared].layers[layer], small.truth[shared].layers[layer])
    names = [name for name in small.cells.obs_names if "|".join(name.split(":")[:2]) in shared]
    assert (larger.cells[names].X != small.cells[names].X).nnz == 0


# Moments of the counts


def test_mean_of_the_counts(plain: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    counts, mean, phi = plain
    z = (counts.mean(axis=0) - mean) / np.sqrt((mean + phi * mean**2) / len(counts))
    assert 1e-4 < stats.chi2.sf(np.sum(z**2), len(z)) < 1 - 1e-4


def test_variance_of_the_counts_is_that_of_the_negative_binomial(
    plain: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    counts, mean, phi = plain
    variance, kurtosis = stats.nbinom.stats(1 / phi, 1 / (1 + phi * mean), moments="vk")
    np.testing.assert_allclose(variance, mean + phi * mean**2, rtol=1e-9)
    se = variance * np.sqrt((kurtosis + 2) / len(counts))
    # The sample variance of a skewed count is nearly normal only where its own error is small.
    usable = se < 0.1 * variance
    z = (counts.var(axis=0, ddof=1) - variance)[usable] / se[usable]
    assert usable.sum() > 100
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert 0.8 < z.std() < 1.2
    assert np.abs(counts.var(axis=0) - mean)[usable].sum() > 10 * (se[usable]).sum()  # a Poisson would not pass


def test_share_of_zeros_is_that_of_the_negative_binomial(plain: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    counts, mean, phi = plain
    zero = (1 + phi * mean) ** (-1 / phi)
    z = ((counts == 0).mean(axis=0) - zero) / np.sqrt(zero * (1 - zero) / len(counts))
    assert 1e-4 < stats.chi2.sf(np.sum(z**2), len(z)) < 1 - 1e-4


def test_dispersion_follows_its_trend() -> None:
    settings = SimulationSettings(genes=4000, singles=1, cells_per_condition=1, control_cells=1, baseline_sharing=1)
    truth = simulate(settings).truth
    mean = 1.6 * 4000 * truth["line_1|control"].layers["expected"][0]
    scatter = np.log(truth.var["dispersion"] / (0.2 + 0.03 / mean))
    assert abs(scatter.mean()) < 4 * 0.7 / np.sqrt(4000)
    assert scatter.std() == pytest.approx(0.7, abs=0.03)


def test_library_sizes_are_log_normal() -> None:
    simulation = simulate(changed(PLAIN, genes=1500, control_cells=3000, library_size_sd=0.37))
    sizes = np.log(counts_of(simulation, "control").sum(axis=1))
    expected = simulation.truth["line_1|control"].layers["expected"][0]
    # Counting adds its own spread to the planted one: 1/n of the Poisson, and phi of every gene by its share squared.
    noise = 1 / 2400 + np.sum(expected**2 * simulation.truth.var["dispersion"].to_numpy())
    assert noise < 0.01
    fit = stats.norm(np.log(2400) - noise / 2, np.sqrt(0.37**2 + noise))
    assert stats.kstest(sizes, fit.cdf).pvalue > 1e-3
    assert sizes.std() == pytest.approx(fit.std(), rel=0.05)


def test_program_activity_leaves_the_expected_proportions() -> None:
    simulation = simulate(SimulationSettings(genes=200, singles=1, cells_per_condition=1, control_cells=20_000))
    counts = counts_of(simulation, "control")
    expected = simulation.truth["line_1|control"].layers["expected"][0]
    share = counts / (1.6 * 200 * np.exp(0.37**2 / 2))
    z = (share.mean(axis=0) - expected) / (share.std(axis=0) / np.sqrt(len(counts)))
    # Genes move together here, so that the sum of squares varies more than a chi-square's.
    assert 0.5 < np.mean(z**2) < 2


def test_sparsity_is_that_of_a_published_screen() -> None:
    cells = simulate(SimulationSettings(singles=4)).cells
    assert cells.X.nnz / np.prod(cells.shape) == pytest.approx(0.36, abs=0.04)  # docs/simulator.md
    assert np.median(np.asarray(cells.X.sum(axis=1))) == pytest.approx(2400, rel=0.05)


# Programs


def test_members_of_a_program_are_coexpressed_in_control_cells() -> None:
    simulation = simulate(SimulationSettings(genes=600, singles=1, cells_per_condition=1, control_cells=3000))
    counts = counts_of(simulation, "control")
    x = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    abundant = counts.mean(axis=0) > 1
    loadings = simulation.truth.varm["line_1"].to_numpy()[abundant]
    pairs = np.triu_indices(abundant.sum(), 1)
    planted = (loadings @ loadings.T)[pairs]
    seen = np.corrcoef(x[:, abundant].T)[pairs]
    unrelated = seen[planted == 0].mean()  # above 0: log1p of deeper cells is larger for all genes
    assert unrelated < 0.03
    assert seen[planted > 0.03].mean() > unrelated + 0.03
    assert seen[planted < -0.03].mean() < unrelated - 0.03


def test_a_regulator_moves_its_programs_along_its_own_loadings(small: Simulation) -> None:
    obs = small.truth.obs
    rows = obs.index[(obs["strength"] > 0) & ~obs["condition"].str.contains("+", regex=False)]
    assert len(rows) > 3
    for row in rows:
        one = small.truth[row]
        loadings = small.truth.varm["line_1"].loc[one.obs["condition"].iloc[0]].to_numpy()[1:]
        shift, strength = one.obsm["shift"][0], one.obs["strength"].iloc[0]
        assert shift[0] == pytest.approx(0.7 * strength)
        assert np.linalg.norm(shift[1:]) == pytest.approx(strength)
        assert shift[1:] @ loadings == pytest.approx(-strength * np.linalg.norm(loadings))  # knock-down: it falls


def test_effects_lie_in_the_programs_but_for_the_private_targets() -> None:
    truth = simulate(changed(SMALL, singles=20, combinations=0, private_share=0)).truth
    carried = truth.obsm["shift"] @ truth.varm["line_1"].to_numpy().T
    own = np.array([[gene == condition for gene in truth.var_names] for condition in truth.obs["condition"]])
    np.testing.assert_allclose(truth.layers["lfc"][~own], carried[~own], atol=1e-12)
    with_private = simulate(changed(SMALL, singles=20, combinations=0, private_share=0.1)).truth
    moved = ~np.isclose(with_private.layers["lfc"], truth.layers["lfc"])[with_private.obs["strength"] > 0]
    assert moved.mean() == pytest.approx(0.1, abs=0.02)


def test_strengths_range_from_none_to_strong() -> None:
    truth = simulate(
        SimulationSettings(genes=4000, singles=600, cells_per_condition=1, control_cells=1, cells_per_condition_sd=0)
    ).truth
    strength = truth.obs.loc[truth.obs["condition"] != "control", "strength"]
    assert stats.binomtest(int((strength == 0).sum()), 600, 0.25).pvalue > 1e-3
    effective = strength[strength > 0]
    assert effective.median() == pytest.approx(2, rel=0.15)
    assert effective.max() <= 2 * np.exp(2 * 0.7) + 1e-9
    assert effective.quantile(0.95) > 3 * effective.median() * 0.8


# Perturbations


def test_a_null_perturbation_is_null_and_a_strong_one_is_not() -> None:
    simulation = simulate(SimulationSettings(genes=400, singles=12, cells_per_condition=400))
    obs = simulation.truth.obs.query("condition != 'control'").sort_values("strength")
    null, strong = obs["condition"].iloc[0], obs["condition"].iloc[-1]
    assert obs["strength"].iloc[0] == 0
    assert not lfc(simulation, null).any()
    control = counts_of(simulation, "control")
    assert not np.array_equal(counts_of(simulation, null)[:300], control[:300])  # same truth, other cells
    abundant = control.mean(axis=0) > 0.5
    p = {c: stats.ttest_ind(counts_of(simulation, c), control, equal_var=False).pvalue for c in (null, strong)}
    assert np.mean(p[null][abundant] < 0.05) < 0.1
    assert np.mean(p[strong][abundant] < 0.05) > 0.3


@pytest.mark.parametrize("fold", [0.2, 5.0])
def test_the_perturbed_gene_itself_is_knocked_down_or_activated(fold: float) -> None:
    settings = SimulationSettings(
        genes=300, singles=6, null_share=0, cells_per_condition=1500, control_cells=3000, target_fold_change=fold
    )
    simulation = simulate(settings)
    expected = simulation.truth.to_df("expected")
    control = counts_of(simulation, "control")
    for gene in simulation.truth.obs["condition"].drop("line_1|control"):
        change = lfc(simulation, gene)[simulation.truth.var_names.get_loc(gene)]
        assert np.sign(change) == np.sign(np.log(fold))
        assert abs(change) == pytest.approx(abs(np.log(fold)), rel=1.5)  # 3 sd of 0.3 in the log
        place = simulation.cells.var_names.get_loc(gene)
        counts = counts_of(simulation, gene)[:, place]
        ratio = counts.mean() / control[:, place].mean()
        planted = expected.loc[f"line_1|{gene}", gene] / expected.loc["line_1|control", gene]
        error = np.hypot(stats.variation(counts) / np.sqrt(1500), stats.variation(control[:, place]) / np.sqrt(3000))
        assert abs(ratio / planted - 1) < 4 * error


def test_expected_proportions_follow_the_planted_fold_changes(small: Simulation) -> None:
    expected = small.truth.layers["expected"]
    baseline = small.truth["line_1|control"].layers["expected"]
    unclosed = baseline * np.exp(small.truth.layers["lfc"])
    np.testing.assert_allclose(expected, unclosed / unclosed.sum(axis=1, keepdims=True), rtol=1e-12)


# Combinations


def pairs_of(simulation: Simulation) -> list[str]:
    return [condition for condition in simulation.truth.obs["condition"] if "+" in condition]


def test_combinations_without_interactions_are_exactly_additive() -> None:
    simulation = simulate(changed(SMALL, combinations=28, interaction_share=0))
    assert len(pairs_of(simulation)) == 28
    for pair in pairs_of(simulation):
        first, second = pair.split("+")
        assert np.array_equal(lfc(simulation, pair), lfc(simulation, first) + lfc(simulation, second))


def test_interactions_are_synergy_or_suppression_and_spare_the_perturbed_genes() -> None:
    simulation = simulate(changed(SMALL, combinations=28, interaction_share=1, interaction_size=0.4))
    factors = simulation.truth.obs.set_index("condition")["interaction"]
    assert set(factors[pairs_of(simulation)]) == {0.6, 1.4}
    assert set(factors.drop(pairs_of(simulation))) == {1.0}
    for pair in pairs_of(simulation):
        first, second = pair.split("+")
        additive = lfc(simulation, first) + lfc(simulation, second)
        own = simulation.truth.var_names.isin([first, second])
        np.testing.assert_allclose(lfc(simulation, pair)[~own], factors[pair] * additive[~own], rtol=1e-12)
        assert np.array_equal(lfc(simulation, pair)[own], additive[own])


def test_the_share_of_interactions_is_the_one_asked_for() -> None:
    settings = SimulationSettings(
        genes=300, singles=30, combinations=400, cells_per_condition=1, control_cells=1, interaction_share=0.3
    )
    interacting = (simulate(settings).truth.obs["interaction"] != 1).sum()
    assert stats.binomtest(int(interacting), 400, 0.3).pvalue > 1e-3


# Cell lines

TWO = SimulationSettings(
    genes=2000, singles=60, cells_per_condition=1, control_cells=1, cell_lines=("line_1", "line_2"), null_share=0
)


def similarity(simulation: Simulation) -> tuple[float, float, float]:
    """Between the lines: correlation of log baselines, share of genes with the same part, mean correlation of lfc."""
    base = [np.log(simulation.truth[f"{line}|control"].layers["expected"][0]) for line in ("line_1", "line_2")]
    one, two = (simulation.truth.varm[line].to_numpy() for line in ("line_1", "line_2"))
    members = (one != 0).any(axis=1)
    genes = simulation.truth.obs["condition"].unique()
    effects = [
        stats.pearsonr(lfc(simulation, gene, "line_1"), lfc(simulation, gene, "line_2")).statistic
        for gene in genes
        if gene != "control"
    ]
    return np.corrcoef(base)[0, 1], (one == two).all(axis=1)[members].mean(), float(np.mean(effects))


def test_cell_lines_share_baselines_and_effects_as_asked() -> None:
    baseline, parts, effects = similarity(simulate(TWO))
    assert baseline == pytest.approx(0.9, abs=0.02)
    assert parts == pytest.approx(0.7, abs=0.05)
    assert 0.2 < effects < 0.9


def test_cell_lines_can_share_everything_or_nothing() -> None:
    same = simulate(changed(TWO, effect_sharing=1, baseline_sharing=1, target_fold_change_sd=0))
    for gene in set(same.truth.obs["condition"]):
        assert np.array_equal(lfc(same, gene, "line_1"), lfc(same, gene, "line_2"))
    assert not np.array_equal(counts_of(same, "control", "line_1"), counts_of(same, "control", "line_2"))
    baseline, parts, effects = similarity(simulate(changed(TWO, effect_sharing=0, baseline_sharing=0, loading=0.25)))
    assert abs(baseline) < 0.1
    assert parts == 0
    assert abs(effects) < 0.1


# Planted profiles


def test_planted_profiles_are_what_many_cells_average_to() -> None:
    simulation = simulate(
        SimulationSettings(singles=3, null_share=0, cells_per_condition=4000, cells_per_condition_sd=0)
    )
    profiles = compute_planted_profiles(simulation)
    assert list(profiles.obs_names) == list(simulation.truth.obs_names)
    for row, condition in enumerate(profiles.obs["condition"]):
        if condition == "control":
            continue
        mean, se = mean_log1p(counts_of(simulation, condition))
        error = profiles.X[row] - mean
        # Sampling explains the whole of it but for 0.004 (docs/simulator.md); profiles differ from gene to gene by 1.
        assert np.sqrt(max(0.0, np.mean(error**2 - se**2))) < 0.004
        assert abs(error.mean()) < 0.004
        assert np.abs(error).max() < 6 * se.max()


def test_planted_profiles_beat_the_control_mean_and_a_degraded_model_lies_between(small: Simulation) -> None:
    perfect, half, none = (compute_planted_profiles(small, effect).X for effect in (1.0, 0.5, 0.0))
    control = perfect[list(small.truth.obs["condition"]).index("control")]
    np.testing.assert_array_equal(none, np.broadcast_to(control, none.shape))
    strong = small.truth.obs["strength"].to_numpy() > 0
    away, halfway = (np.linalg.norm((x - none)[strong], axis=1) for x in (perfect, half))
    assert (away > 0.5).all()
    assert ((0.3 * away < halfway) & (halfway < 0.7 * away)).all()


def test_planted_profiles_of_counts_without_spread_match_the_poisson_sum() -> None:
    settings = changed(PLAIN, control_cells=1, dispersion=1e-6, dispersion_of_rare_genes=0)
    simulation = simulate(settings)
    profile = compute_planted_profiles(simulation)["line_1|control"].X[0]
    size = 1.6 * 200
    mean = size * simulation.truth["line_1|control"].layers["expected"][0]
    k = np.arange(400)
    exact = stats.poisson.pmf(k, mean[:, None]) @ np.log1p(1e4 * k / size)
    np.testing.assert_allclose(profile, exact, atol=2e-4)


# Settings


def test_every_setting_is_described_and_none_is_invented() -> None:
    assert all(field.description for field in SimulationSettings.model_fields.values())
    with pytest.raises(ValidationError, match="extra"):
        SimulationSettings.model_validate({"cells": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"singles": 3, "combinations": 4}, "different combinations"),
        ({"cell_lines": ["a", "a"]}, "twice"),
        ({"cell_lines": ["a|b"]}, "pattern"),
        ({"target_fold_change": 1}, "no perturbation"),
        ({"null_share": 1.1}, "less than or equal to 1"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SimulationSettings.model_validate(fields)


def test_too_many_perturbed_genes_is_an_error_the_user_can_mend() -> None:
    with pytest.raises(UserError, match="ask for fewer singles"):
        simulate(SimulationSettings(genes=60, singles=50))


# The real files behind the defaults (docs/simulator.md)


@pytest.mark.shared
def test_library_size_spread_is_that_of_norman19(shared: Path) -> None:
    obs = anndata.read_h5ad(shared / "data" / "norman19_small.h5ad").obs
    within = np.log(obs["norm_total"]).groupby(obs["perturbation"], observed=True).std()
    assert within.median() == pytest.approx(SimulationSettings().library_size_sd, abs=0.01)


@pytest.mark.shared
def test_dispersion_and_strengths_are_those_of_papalexi21(shared: Path) -> None:
    cells = anndata.read_h5ad(shared / "data" / "papalexi21.h5ad")
    cells = cells[(cells.obs["guide_fraction"] >= 0.5) & (cells.obs["guide_umi"] >= 5)]
    size = cells.obs["panel_counts"].to_numpy() / cells.obs["panel_counts"].median()
    counts = cells.X.toarray().astype(float)
    groups = cells.obs.groupby(["perturbation", "replicate"], observed=True).indices
    numerator, denominator = np.zeros((2, counts.shape[1]))
    for rows in groups.values():
        mean = np.outer(size[rows], counts[rows].sum(axis=0) / size[rows].sum())
        numerator += ((counts[rows] - mean) ** 2 - mean).sum(axis=0)
        denominator += (mean**2).sum(axis=0)
    abundant = counts.mean(axis=0) > 0.3
    phi = np.median((numerator / denominator)[abundant])
    settings = SimulationSettings()
    # Of what the real genes show, the simulator gives a part to the programs: two loadings squared or so.
    shared_part = (1 + settings.programs) * settings.program_share * settings.loading**2
    assert phi == pytest.approx(settings.dispersion + shared_part, rel=0.25)

    labels = cells.obs["perturbation"].to_numpy()

    def change(gene: str) -> float:
        bulk = [counts[labels == label].sum(axis=0) / size[labels == label].sum() for label in (gene, "control")]
        return float(np.sqrt(np.mean(np.log(bulk[0][abundant] / bulk[1][abundant]) ** 2)))

    simulated = simulate(settings).truth
    rms = np.sqrt(np.mean(simulated.layers["lfc"] ** 2, axis=1))
    strongest = np.quantile(rms[rms > 0], 0.9)
    assert 0.3 < change("STAT1") < strongest  # the strongest of that screen is well within what is simulated
    assert change("CD86") < 0.1  # and it has perturbations that do nothing
