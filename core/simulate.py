"""Simulated Perturb-seq screens whose effects are planted, so that what a benchmark finds can be checked.

The model and where each default comes from: docs/simulator.md. Logarithms are natural throughout; a log fold change
(lfc) is one of the expected expression against the control cells of the same cell line. What is planted for a gene,
a condition or a cell line depends on its name and the seed alone: adding conditions, or changing how many cells are
drawn, changes nothing else.
"""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, NamedTuple, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    StringConstraints,
    model_validator,
)
from scipy import sparse
from threadpoolctl import threadpool_limits

from core.conditions import CONTROL, SEPARATOR, genes_of, row_names
from core.errors import UserError
from core.rng import generator

Array = NDArray[np.float64]
CellLine = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$")]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

# No gene lies farther from the median than this many standard deviations: among a few thousand genes an untruncated
# log-normal sometimes gives one gene a fifth of all counts, which no published screen shows.
_MOST_EXTREME = 3.0
# No perturbation is stronger or weaker than the median by more than this many sd of its log: cells that change more
# than the strongest published ones die before they are sequenced.
_STRONGEST = 2.0
# Members of a program differ by this much (sd of the log) in how strongly they follow it.
_LOADING_SPREAD = 0.4
# Dense numbers are in memory for so many cells at a time.
_CELLS_AT_ONCE = 500


class SimulationSettings(BaseModel):
    """What to simulate; the defaults are the `demo` screen (docs/simulator.md says where each comes from)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seed: NonNegativeInt = 42
    """Seed of every draw."""
    genes: Annotated[int, Field(ge=50)] = 1500
    """Measured genes (number)."""
    singles: Count = 40
    """Genes perturbed one at a time (number of conditions)."""
    combinations: NonNegativeInt = 0
    """Pairs of those genes perturbed together (number of conditions)."""
    cell_lines: Annotated[tuple[CellLine, ...], Field(min_length=1)] = ("line_1",)
    """Names of the cell lines (the covariate); all conditions in each."""
    cells_per_condition: Annotated[float, Field(ge=1)] = 100
    """Median cells of a perturbed condition in a line."""
    cells_per_condition_sd: NonNegativeFloat = 0.15
    """Spread of that number: sd of its log (0.15: nine in ten within 78 to 128 %)."""
    control_cells: Count = 800
    """Unperturbed cells in a line (number)."""
    counts_per_gene: PositiveFloat = 1.6
    """Counts (UMIs) of the median cell divided by the number of measured genes."""
    library_size_sd: NonNegativeFloat = 0.37
    """Sd of the log of the counts expected in a cell."""
    expression_sd: NonNegativeFloat = 1.8
    """Sd over genes of the log mean expression."""
    dispersion: PositiveFloat = 0.2
    """Negative-binomial dispersion phi (variance = mean + phi mean^2) of abundant genes."""
    dispersion_of_rare_genes: NonNegativeFloat = 0.03
    """Added to phi, divided by the gene's mean count in the median cell."""
    dispersion_sd: NonNegativeFloat = 0.7
    """Scatter of genes about that trend: sd of log phi."""
    programs: Count = 12
    """Gene programs that perturbations move (number)."""
    program_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the genes that belong to a program (0 to 1)."""
    loading: NonNegativeFloat = 0.25
    """Typical change of a member's log expression when its program's activity moves by its sd from cell to cell."""
    null_share: Share = 0.25
    """Share of single perturbations without any effect."""
    strength: NonNegativeFloat = 2.0
    """Median strength of the others: the move of program activity, in its sd among cells."""
    strength_sd: NonNegativeFloat = 0.7
    """Sd of the log of that strength; cut at 2 sd."""
    general_response: NonNegativeFloat = 0.7
    """Move of the general program, the same way in all perturbations, per unit of strength."""
    private_share: Share = 0.01
    """Share of the genes that a perturbation moves by itself, outside all programs."""
    target_fold_change: PositiveFloat = 0.2
    """Typical expression of a perturbed gene relative to control: below 1 it is knocked down (CRISPRi) and its programs
    fall, above 1 it is activated (CRISPRa) and they rise."""
    target_fold_change_sd: NonNegativeFloat = 0.3
    """Scatter between perturbed genes: sd of the log of the size of that log fold change."""
    interaction_share: Share = 0.2
    """Share of the combinations that are not additive in log expression (0 to 1)."""
    interaction_size: Share = 0.5
    """In those, the sum of the two lfc is multiplied by 1 + this (synergy) or 1 - this (suppression), with equal
    chance; the two perturbed genes themselves stay additive."""
    baseline_sharing: Share = 0.9
    """Correlation of the log baseline expression between two cell lines."""
    effect_sharing: Share = 0.7
    """Share of the genes that play the same part (programs, loadings, strength, private targets) in any two cell lines;
    the others draw a part of their own in each line."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(set(self.cell_lines)) < len(self.cell_lines):
            raise ValueError("cell_lines names a line twice")
        if self.combinations > self.singles * (self.singles - 1) // 2:
            raise ValueError(f"{self.singles} singles do not make {self.combinations} different combinations")
        if self.target_fold_change == 1:
            raise ValueError("a target_fold_change of 1 is no perturbation: below 1 knocks down, above 1 activates")
        return self


class Simulation(NamedTuple):
    """A simulated screen and what was planted in it.

    Attributes
    ----------
    cells
        Cells x genes, X raw counts (CSR float32, whole numbers), obs `perturbation` (`control`, `A` or `A+B`) and
        `cell_line`: the layout of a published raw file. Rows sorted by cell line, condition and number.
    truth
        (cell line, condition) x genes, control included, obs_names `line|condition`. obs: `covariate`, `condition`,
        `n_cells`, `strength` (sd of program activity; 0 = no effect; of a combination the sum of its genes', times its
        interaction), `interaction` (factor on the additive lfc; 1 = additive). layers (float64, no NaN): `lfc` (planted
        natural log fold change against control) and `expected` (share of a cell's counts, rows sum to 1). obsm `shift`:
        planted move of each program's mean activity. var: `dispersion` (phi). varm[line]: genes x programs, loadings in
        that line (0 = not a member).
    settings
        What it was made from.
    """

    cells: AnnData
    truth: AnnData
    settings: SimulationSettings


class _Line(NamedTuple):
    """The genes of one cell line: the part of each in it, shared between lines or not."""

    name: str
    baseline: Array  # genes: share of a control cell's counts, sums to 1
    shared: NDArray[np.bool_]  # genes: plays the part that lines share
    loadings: Array  # genes x (1 + programs), the general program first
    strengths: Array  # genes: strength when perturbed


class _Effect(NamedTuple):
    """What one condition does in one cell line."""

    lfc: Array  # genes
    shift: Array  # programs
    strength: float
    interaction: float


def simulate(settings: SimulationSettings) -> Simulation:
    """Simulate a whole screen (model: docs/simulator.md).

    Parameters
    ----------
    settings
        What to simulate. The same settings give the same bits.

    Returns
    -------
    Simulation
        The cells and what was planted in them.

    Raises
    ------
    UserError
        If fewer genes qualify as perturbed (expression above the median, member of a program) than the settings ask
        for.
    """
    # Products of matrices differ in their last bits between numbers of threads.
    with threadpool_limits(1):
        genes = _name_genes(settings)
        conditions = _choose_conditions(settings, genes)
        lines = [_draw_line(settings, name) for name in sorted(settings.cell_lines)]
        truth = _plant_effects(settings, genes, conditions, lines)
        return Simulation(_draw_cells(settings, truth), truth, settings)


def compute_planted_profiles(simulation: Simulation, effect: float = 1.0, target_sum: float = 10_000.0) -> AnnData:
    """Compute the profile that the mean of many cells of each condition would have.

    Exact for the negative binomial mixed over library sizes and program activity, with one approximation: a cell's
    counts are divided by the sum expected in it, not by the sum drawn (docs/simulator.md gives the error). Source:
    log(1 + y) = integral over t > 0 of exp(-t) (1 - exp(-t y)) / t, so that its expectation needs only the Laplace
    transform of the negative binomial; trapezoidal rule over log t, Gauss-Hermite over the two normals.

    Parameters
    ----------
    simulation
        A screen.
    effect
        Share of every planted lfc that is kept. 1 is the perfect model, 0 knows the control cells only, and values
        between have the right directions, but too small.
    target_sum
        Counts to which each cell is normalised.

    Returns
    -------
    AnnData
        Rows of `truth` x genes, X float64 in log1p(counts per `target_sum`), obs `covariate` and `condition`; no NaN.
    """
    truth, settings = simulation.truth, simulation.settings
    phi = truth.var["dispersion"].to_numpy()
    profiles = np.empty(truth.shape)
    with threadpool_limits(1):
        for row, (line, lfc) in enumerate(zip(truth.obs["covariate"], truth.layers["lfc"], strict=True)):
            baseline = truth.layers["expected"][truth.obs_names.get_loc(f"{line}|control")]
            proportion = _normalise(baseline * np.exp(effect * lfc))
            spread = _measure_activity_spread(truth.varm[line].to_numpy())
            profiles[row] = _expect_log1p(settings, proportion, spread, phi, target_sum)
    return AnnData(profiles, obs=truth.obs[["covariate", "condition"]].copy(), var=pd.DataFrame(index=truth.var_names))


def _name_genes(settings: SimulationSettings) -> list[str]:
    width = max(4, len(str(settings.genes)))
    return [f"G{number:0{width}d}" for number in range(1, settings.genes + 1)]


def _choose_conditions(settings: SimulationSettings, genes: list[str]) -> list[str]:
    """Choose the perturbed conditions; sorted labels.

    Which genes are perturbed and which pairs of them are combined is the head of a seeded ranking: asking for more
    adds to the list and takes nothing from it (more singles, though, bring other pairs).
    """
    expressed = _draw_expression(settings, "") > 0
    regulators = _draw_members(settings, "")[:, 1:].any(axis=1)
    candidates = np.flatnonzero(expressed & regulators)
    if len(candidates) < settings.singles:
        raise UserError(
            "simulation settings",
            "singles",
            f"{settings.singles} genes to perturb, of which only {len(candidates)} are well expressed and in a program",
            "ask for fewer singles, for more genes, or for a larger program_share",
        )
    ranking = generator(settings.seed, "simulate perturbed genes").permutation(len(genes))
    singles = sorted(genes[i] for i in ranking[np.isin(ranking, candidates)][: settings.singles])
    pairs = [SEPARATOR.join(pair) for pair in combinations(singles, 2)]
    order = generator(settings.seed, "simulate combinations").permutation(len(pairs))
    return sorted(singles + [pairs[i] for i in order[: settings.combinations]])


def _draw_expression(settings: SimulationSettings, line: str) -> Array:
    """Draw standard normal scores of the genes' log expression: what all lines share (line ""), or a line's own."""
    scores = generator(settings.seed, "simulate expression", line).standard_normal(settings.genes)
    return np.clip(scores, -_MOST_EXTREME, _MOST_EXTREME)


def _draw_members(settings: SimulationSettings, line: str) -> NDArray[np.bool_]:
    """Draw which genes are in which programs, genes x (1 + programs): what lines share (line ""), or a line's own."""
    shape = (settings.genes, 1 + settings.programs)
    return generator(settings.seed, "simulate members", line).random(shape) < settings.program_share


def _draw_loadings(settings: SimulationSettings, line: str) -> Array:
    """Draw signed loadings, 0 for no member, genes x (1 + programs): what lines share (line ""), or a line's own."""
    member = _draw_members(settings, line)
    shape = member.shape
    rng = generator(settings.seed, "simulate loadings", line)
    sign = np.where(rng.random(shape) < 0.5, -1.0, 1.0)
    size = np.exp(_LOADING_SPREAD * rng.standard_normal(shape) - _LOADING_SPREAD**2)  # root mean square 1
    return np.where(member, sign * settings.loading * size, 0.0)


def _draw_strengths(settings: SimulationSettings, line: str) -> Array:
    """Draw the strength of each gene's perturbation, 0 for none: what lines share (line ""), or a line's own."""
    rng = generator(settings.seed, "simulate strengths", line)
    effective = rng.random(settings.genes) >= settings.null_share
    scores = np.clip(rng.standard_normal(settings.genes), -_STRONGEST, _STRONGEST)
    return np.where(effective, settings.strength * np.exp(settings.strength_sd * scores), 0.0)


def _draw_line(settings: SimulationSettings, name: str) -> _Line:
    # Each line keeps the shared score or part with the square root of the sharing, so that two lines have in common
    # what the setting says, however many lines there are.
    kept = np.sqrt(settings.baseline_sharing)
    scores = kept * _draw_expression(settings, "") + np.sqrt(1 - kept**2) * _draw_expression(settings, name)
    shared = generator(settings.seed, "simulate shared parts", name).random(settings.genes) < np.sqrt(
        settings.effect_sharing
    )
    return _Line(
        name,
        _normalise(np.exp(settings.expression_sd * scores)),
        shared,
        np.where(shared[:, None], _draw_loadings(settings, ""), _draw_loadings(settings, name)),
        np.where(shared, _draw_strengths(settings, ""), _draw_strengths(settings, name)),
    )


def _perturb_gene(settings: SimulationSettings, line: _Line, genes: list[str], target: int) -> _Effect:
    """Perturb one gene: its programs move along its own loadings, and it is itself knocked down or activated."""
    strength = float(line.strengths[target])
    shift = np.zeros(1 + settings.programs)
    if strength == 0:
        return _Effect(np.zeros(len(genes)), shift, 0.0, 1.0)
    direction = line.loadings[target, 1:]
    length = np.linalg.norm(direction)
    rises = 1.0 if settings.target_fold_change > 1 else -1.0
    shift[0] = strength * settings.general_response
    if length > 0:  # 0: in this line the gene belongs to no program
        shift[1:] = rises * strength * direction / length
    rng = generator(settings.seed, "simulate private targets", "" if line.shared[target] else line.name, genes[target])
    private = rng.random(len(genes)) < settings.private_share
    lfc = line.loadings @ shift + private * strength * settings.loading * rng.standard_normal(len(genes))
    scatter = generator(settings.seed, "simulate own gene", line.name, genes[target]).standard_normal()
    lfc[target] = np.log(settings.target_fold_change) * np.exp(settings.target_fold_change_sd * scatter)
    return _Effect(lfc, shift, strength, 1.0)


def _combine_effects(settings: SimulationSettings, condition: str, parts: list[_Effect], targets: list[int]) -> _Effect:
    """Combine two perturbations: additive in log expression, or the sum scaled as a whole.

    As in the regression by which Norman et al. 2019 sort genetic interactions, with their two coefficients equal.
    """
    rng = generator(settings.seed, "simulate interaction", "", condition)
    interacts, synergy = rng.random(2) < (settings.interaction_share, 0.5)
    factor = 1.0 if not interacts else 1 + settings.interaction_size * (1 if synergy else -1)
    total = parts[0].lfc + parts[1].lfc
    lfc = factor * total
    lfc[targets] = total[targets]
    return _Effect(
        lfc,
        factor * (parts[0].shift + parts[1].shift),
        factor * (parts[0].strength + parts[1].strength),
        factor,
    )


def _plant_effects(
    settings: SimulationSettings, genes: list[str], conditions: list[str], lines: list[_Line]
) -> AnnData:
    place = {gene: i for i, gene in enumerate(genes)}
    nothing = _Effect(np.zeros(len(genes)), np.zeros(1 + settings.programs), 0.0, 1.0)
    effects: list[_Effect] = []
    expected: list[Array] = []
    obs: list[tuple[str, str, int]] = []
    for line in lines:
        effect = {CONTROL: nothing}
        for condition in sorted(conditions, key=lambda label: label.count(SEPARATOR)):  # singles first
            targets = [place[gene] for gene in genes_of(condition)]
            effect[condition] = (
                _perturb_gene(settings, line, genes, targets[0])
                if len(targets) == 1
                else _combine_effects(settings, condition, [effect[gene] for gene in genes_of(condition)], targets)
            )
        for condition in sorted(effect):
            effects.append(effect[condition])
            expected.append(_normalise(line.baseline * np.exp(effect[condition].lfc)))
            obs.append((line.name, condition, _draw_number_of_cells(settings, line.name, condition)))
    table = pd.DataFrame(obs, columns=["covariate", "condition", "n_cells"])
    table["strength"] = [effect.strength for effect in effects]
    table["interaction"] = [effect.interaction for effect in effects]
    table.index = row_names(table["covariate"], table["condition"])
    programs = ["general", *(f"program_{number:02d}" for number in range(1, settings.programs + 1))]
    return AnnData(
        obs=table,
        var=pd.DataFrame({"dispersion": _draw_dispersion(settings)}, index=pd.Index(genes)),
        layers={"lfc": np.array([effect.lfc for effect in effects]), "expected": np.array(expected)},
        obsm={"shift": np.array([effect.shift for effect in effects])},
        varm={line.name: pd.DataFrame(line.loadings, index=genes, columns=programs) for line in lines},
        uns={"settings": settings.model_dump_json()},
    )


def _draw_dispersion(settings: SimulationSettings) -> Array:
    """Draw phi of each gene, falling with the mean that the gene has where lines share their expression."""
    proportion = _normalise(np.exp(settings.expression_sd * _draw_expression(settings, "")))
    mean = _expect_library_size(settings) * proportion
    scatter = generator(settings.seed, "simulate dispersion").standard_normal(settings.genes)
    trend = settings.dispersion + settings.dispersion_of_rare_genes / mean
    return trend * np.exp(settings.dispersion_sd * scatter)


def _expect_library_size(settings: SimulationSettings) -> float:
    """Give the counts expected in the median cell."""
    return settings.counts_per_gene * settings.genes


def _draw_number_of_cells(settings: SimulationSettings, line: str, condition: str) -> int:
    if condition == CONTROL:
        return settings.control_cells
    scatter = generator(settings.seed, "simulate number of cells", line, condition).standard_normal()
    return max(1, round(settings.cells_per_condition * float(np.exp(settings.cells_per_condition_sd * scatter))))


def _draw_cells(settings: SimulationSettings, truth: AnnData) -> AnnData:
    obs = truth.obs
    blocks = [
        _draw_counts(settings, line, condition, int(n), truth.layers["expected"][row], truth)
        for row, (line, condition, n) in enumerate(zip(obs["covariate"], obs["condition"], obs["n_cells"], strict=True))
    ]
    of_cell = np.repeat(np.arange(len(obs)), obs["n_cells"])
    number = np.concatenate([np.arange(1, n + 1) for n in obs["n_cells"]])
    line, condition = (obs[column].to_numpy()[of_cell] for column in ("covariate", "condition"))
    names = [f"{x}:{y}:{z:05d}" for x, y, z in zip(line, condition, number, strict=True)]
    return AnnData(
        sparse.vstack(blocks, format="csr"),
        obs=pd.DataFrame({"perturbation": pd.Categorical(condition), "cell_line": pd.Categorical(line)}, index=names),
        var=pd.DataFrame(index=truth.var_names),
    )


def _draw_counts(
    settings: SimulationSettings, line: str, condition: str, n_cells: int, proportion: Array, truth: AnnData
) -> sparse.csr_matrix:
    """Draw n_cells x genes counts: Poisson with a gamma-distributed rate, which is the negative binomial."""
    loadings = truth.varm[line].to_numpy()
    phi = truth.var["dispersion"].to_numpy()
    size, activity, noise, counts = (
        generator(settings.seed, f"simulate {what}", line, condition)
        for what in ("library sizes", "activity", "noise", "counts")
    )
    # The mean of exp(normal) is subtracted, so that over many cells the proportions are those expected.
    correction = _measure_activity_spread(loadings) ** 2 / 2
    blocks = []
    # A stream of draws for each quantity, used cell by cell: neither the size of the blocks nor the number of cells
    # changes the first cells.
    for n in _split_cells(n_cells):
        library = _expect_library_size(settings) * np.exp(settings.library_size_sd * size.standard_normal((n, 1)))
        log_change = activity.standard_normal((n, loadings.shape[1])) @ loadings.T - correction
        rate = library * proportion * np.exp(log_change)
        rate *= noise.standard_gamma(1 / phi, size=rate.shape) * phi
        blocks.append(sparse.csr_matrix(counts.poisson(rate).astype(np.float32)))
    return sparse.csr_matrix(sparse.vstack(blocks))


def _split_cells(n_cells: int) -> list[int]:
    """Split n_cells into numbers of cells that are in memory at a time."""
    whole, rest = divmod(n_cells, _CELLS_AT_ONCE)
    return [_CELLS_AT_ONCE] * whole + [rest] * (rest > 0)


def _measure_activity_spread(loadings: Array) -> Array:
    """Measure the sd from cell to cell of each gene's log expression due to program activity (independent, sd 1)."""
    variance: Array = np.sum(loadings**2, axis=1)
    return np.sqrt(variance)


def _normalise(abundance: Array) -> Array:
    """Turn abundances into proportions."""
    total: np.float64 = abundance.sum()
    return abundance / total


def _expect_log1p(
    settings: SimulationSettings, proportion: Array, spread: Array, phi: Array, target_sum: float
) -> Array:
    """Integrate log1p(target_sum * count / library size) of each gene over cells; see compute_planted_profiles."""
    # Left end: the part cut off is below target_sum * exp(-26), 5e-8 at 10,000. Step 0.8: error about exp(-pi^2 / 0.8).
    t = np.exp(np.arange(-26.0, 3.6, 0.8))
    weight_t = 0.8 * np.exp(-t)
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    result = np.zeros_like(proportion)
    for z_library, w_library in zip(nodes, weights, strict=True):
        size = _expect_library_size(settings) * np.exp(settings.library_size_sd * z_library)
        thinned = -np.expm1(-t * target_sum / size)
        for z, w in zip(nodes, weights, strict=True):
            mean = size * proportion * np.exp(spread * z - spread**2 / 2)
            not_seen = -np.expm1(-np.log1p(np.multiply.outer(phi * mean, thinned)) / phi[:, None])
            result += w_library * w * (not_seen @ weight_t)
    return result
