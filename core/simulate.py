"""Simulated Perturb-seq screens whose effects are planted, so that what a benchmark finds can be checked.

The model and where each default comes from: docs/simulator.md. Logarithms are natural throughout; a log fold change
(lfc) is one of the expected expression against the control cells of the same cell line. What is planted for a gene,
a condition or a cell line hangs on its name and the seed alone: adding conditions, or changing how many cells are
drawn, leaves everything else as it was.
"""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, NamedTuple, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from scipy import sparse
from threadpoolctl import threadpool_limits

from core.conditions import CONTROL, SEPARATOR, genes_of, row_names
from core.errors import UserError
from core.rng import generator

Array = NDArray[np.float64]
CellLine = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$")]

# No gene lies farther from the median than this many standard deviations: among a few thousand genes an untruncated
# log-normal now and then gives one gene a fifth of all counts, which no published screen shows.
_MOST_EXTREME = 3.0
# Nor is a perturbation stronger or weaker than the median by more than this many sd of its log: cells that change
# more than the strongest published ones do not live to be sequenced.
_STRONGEST = 2.0
# Members of a program differ by this much (sd of the log) in how strongly they follow it.
_LOADING_SPREAD = 0.4
# Dense numbers are held for so many cells at a time.
_CELLS_AT_ONCE = 500


class SimulationSettings(BaseModel):
    """What to simulate; the defaults are the `demo` screen (docs/simulator.md says where each comes from)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=42, ge=0, description="Seed of every draw.")
    genes: int = Field(default=1500, ge=50, description="Measured genes (number).")
    singles: int = Field(default=40, ge=1, description="Genes perturbed one at a time (number of conditions).")
    combinations: int = Field(
        default=0, ge=0, description="Pairs of those genes perturbed together (number of conditions)."
    )
    cell_lines: tuple[CellLine, ...] = Field(
        default=("line_1",),
        min_length=1,
        description="Names of the cell lines (the covariate); all conditions in each.",
    )
    cells_per_condition: float = Field(
        default=100, ge=1, description="Median cells of a perturbed condition in a line."
    )
    cells_per_condition_sd: float = Field(
        default=0.15, ge=0, description="Spread of that number: sd of its log (0.15: nine in ten within 78 to 128 %)."
    )
    control_cells: int = Field(default=800, ge=1, description="Unperturbed cells in a line (number).")
    counts_per_gene: float = Field(
        default=1.6, gt=0, description="Counts (UMIs) of the median cell divided by the number of measured genes."
    )
    library_size_sd: float = Field(default=0.37, ge=0, description="Sd of the log of the counts expected in a cell.")
    expression_sd: float = Field(default=1.8, ge=0, description="Sd over genes of the log mean expression.")
    dispersion: float = Field(
        default=0.2,
        gt=0,
        description="Negative-binomial dispersion phi (variance = mean + phi mean^2) of abundant genes.",
    )
    dispersion_of_rare_genes: float = Field(
        default=0.03, ge=0, description="Added to phi, divided by the gene's mean count in the median cell."
    )
    dispersion_sd: float = Field(default=0.7, ge=0, description="Scatter of genes about that trend: sd of log phi.")
    programs: int = Field(default=12, ge=1, description="Gene programs that perturbations move (number).")
    program_share: float = Field(
        default=0.1, gt=0, le=1, description="Share of the genes that belong to a program (0 to 1)."
    )
    loading: float = Field(
        default=0.25,
        ge=0,
        description="Typical change of a member's log expression when its program's activity moves by 1, "
        "the sd of that activity from cell to cell.",
    )
    null_share: float = Field(default=0.25, ge=0, le=1, description="Share of single perturbations without any effect.")
    strength: float = Field(
        default=2.0,
        ge=0,
        description="Median strength of the others: the move of program activity, in its sd among cells.",
    )
    strength_sd: float = Field(default=0.7, ge=0, description="Sd of the log of that strength; cut at 2 sd.")
    general_response: float = Field(
        default=0.7,
        ge=0,
        description="Move of the general program, the same way in all perturbations, per unit of strength.",
    )
    private_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of the genes a perturbation moves for itself, outside all programs.",
    )
    target_fold_change: float = Field(
        default=0.2,
        gt=0,
        description="Typical expression of a perturbed gene relative to control: below 1 it is knocked "
        "down (CRISPRi) and its programs fall, above 1 it is activated (CRISPRa) and they rise.",
    )
    target_fold_change_sd: float = Field(
        default=0.3,
        ge=0,
        description="Scatter between perturbed genes: sd of the log of the size of that log fold change.",
    )
    interaction_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Share of the combinations that are not additive in log expression (0 to 1).",
    )
    interaction_size: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="In those, the sum of the two lfc is multiplied by 1 + this (synergy) or 1 - this "
        "(suppression), with equal chance; the two perturbed genes themselves stay additive.",
    )
    baseline_sharing: float = Field(
        default=0.9, ge=0, le=1, description="Correlation of the log baseline expression between two cell lines."
    )
    effect_sharing: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="Share of the genes that play the same part (programs, loadings, strength, "
        "private targets) in any two cell lines; the others draw a part of their own in each line.",
    )

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

    cells: cells x genes, X raw counts (CSR float32, whole numbers), obs `perturbation` (`control`, `A` or `A+B`) and
        `cell_line`: the layout of a published raw file. Rows sorted by cell line, condition and number.
    truth: (cell line, condition) x genes, control included, obs_names `line|condition`.
        obs: `covariate`, `condition`, `n_cells`, `strength` (sd of program activity; 0 = no effect; of a combination
        the sum of its genes', times its interaction), `interaction` (factor on the additive lfc; 1 = additive).
        layers (float64, no NaN): `lfc` (planted natural log fold change against control) and `expected` (share of a
        cell's counts, rows sum to 1). obsm `shift`: planted move of each program's mean activity.
        var: `dispersion` (phi). varm[line]: genes x programs, loadings in that line (0 = not a member).
    settings: what it was made from.
    """

    cells: AnnData
    truth: AnnData
    settings: SimulationSettings


class _Line(NamedTuple):
    """The genes of one cell line: their shared or own part in it."""

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
    """A whole screen from its settings (model: docs/simulator.md).

    Raises UserError if fewer genes qualify as perturbed (expression above the median, member of a program) than the
    settings ask for.
    """
    # Products of matrices differ in their last bits between numbers of threads.
    with threadpool_limits(1):
        genes = _gene_names(settings)
        conditions = _conditions(settings, genes)
        lines = [_line(settings, name) for name in sorted(settings.cell_lines)]
        truth = _truth(settings, genes, conditions, lines)
        return Simulation(_cells(settings, truth), truth, settings)


def planted_profiles(simulation: Simulation, effect: float = 1.0, target_sum: float = 10_000.0) -> AnnData:
    """The profile that many cells of each condition would average to: rows of `truth` x genes, X float64 in
    log1p(counts per `target_sum`), obs `covariate` and `condition`; no NaN.

    effect: share of every planted lfc that is kept. 1 is the perfect model, 0 knows the control cells only, and what
    lies between has the right directions but too little of them.

    Exact for the negative binomial mixed over library sizes and program activity, but for one approximation: a
    cell's counts are divided by the sum expected in it, not by the sum drawn (docs/simulator.md gives the error).
    Source: log(1 + y) = integral over t > 0 of exp(-t) (1 - exp(-t y)) / t, so that its expectation needs only the
    Laplace transform of the negative binomial; trapezoidal rule over log t, Gauss-Hermite over the two normals.
    """
    truth, settings = simulation.truth, simulation.settings
    phi = truth.var["dispersion"].to_numpy()
    profiles = np.empty(truth.shape)
    with threadpool_limits(1):
        for row, (line, lfc) in enumerate(zip(truth.obs["covariate"], truth.layers["lfc"], strict=True)):
            baseline = truth.layers["expected"][truth.obs_names.get_loc(f"{line}|control")]
            proportion = _closed(baseline * np.exp(effect * lfc))
            spread = _activity_spread(truth.varm[line].to_numpy())
            profiles[row] = _expected_log1p(settings, proportion, spread, phi, target_sum)
    return AnnData(profiles, obs=truth.obs[["covariate", "condition"]].copy(), var=pd.DataFrame(index=truth.var_names))


def _gene_names(settings: SimulationSettings) -> list[str]:
    width = max(4, len(str(settings.genes)))
    return [f"G{number:0{width}d}" for number in range(1, settings.genes + 1)]


def _conditions(settings: SimulationSettings, genes: list[str]) -> list[str]:
    """Sorted labels of the perturbed conditions.

    Which genes are perturbed and which pairs of them are combined is the head of a seeded ranking: asking for more
    adds to the list and takes nothing from it (more singles, though, bring other pairs).
    """
    expressed = _expression(settings, "") > 0
    regulators = _members(settings, "")[:, 1:].any(axis=1)
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


def _expression(settings: SimulationSettings, line: str) -> Array:
    """Standard normal scores of the genes' log expression: what all lines share (line ""), or a line's own."""
    scores = generator(settings.seed, "simulate expression", line).standard_normal(settings.genes)
    return np.clip(scores, -_MOST_EXTREME, _MOST_EXTREME)


def _members(settings: SimulationSettings, line: str) -> NDArray[np.bool_]:
    """genes x (1 + programs): who belongs to what; the part that lines share (line ""), or a line's own."""
    shape = (settings.genes, 1 + settings.programs)
    return generator(settings.seed, "simulate members", line).random(shape) < settings.program_share


def _loadings(settings: SimulationSettings, line: str) -> Array:
    """genes x (1 + programs): signed loadings, 0 for no member; the part that lines share (line ""), or its own."""
    member = _members(settings, line)
    shape = member.shape
    rng = generator(settings.seed, "simulate loadings", line)
    sign = np.where(rng.random(shape) < 0.5, -1.0, 1.0)
    size = np.exp(_LOADING_SPREAD * rng.standard_normal(shape) - _LOADING_SPREAD**2)  # root mean square 1
    return np.where(member, sign * settings.loading * size, 0.0)


def _strengths(settings: SimulationSettings, line: str) -> Array:
    """genes: strength of each one's perturbation, 0 for none; the part lines share (line ""), or a line's own."""
    rng = generator(settings.seed, "simulate strengths", line)
    effective = rng.random(settings.genes) >= settings.null_share
    scores = np.clip(rng.standard_normal(settings.genes), -_STRONGEST, _STRONGEST)
    return np.where(effective, settings.strength * np.exp(settings.strength_sd * scores), 0.0)


def _line(settings: SimulationSettings, name: str) -> _Line:
    # Each line keeps the shared score or part with the square root of the sharing, so that two lines have in common
    # what the setting says, however many lines there are.
    kept = np.sqrt(settings.baseline_sharing)
    scores = kept * _expression(settings, "") + np.sqrt(1 - kept**2) * _expression(settings, name)
    shared = generator(settings.seed, "simulate shared parts", name).random(settings.genes) < np.sqrt(
        settings.effect_sharing
    )
    return _Line(
        name,
        _closed(np.exp(settings.expression_sd * scores)),
        shared,
        np.where(shared[:, None], _loadings(settings, ""), _loadings(settings, name)),
        np.where(shared, _strengths(settings, ""), _strengths(settings, name)),
    )


def _single(settings: SimulationSettings, line: _Line, genes: list[str], target: int) -> _Effect:
    """Perturbing one gene: its programs move along its own loadings, and it is itself knocked down or activated."""
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


def _combination(settings: SimulationSettings, condition: str, parts: list[_Effect], targets: list[int]) -> _Effect:
    """Two perturbations together: additive in log expression, or the sum scaled as a whole, as in the regression by
    which Norman et al. 2019 sort genetic interactions (their two coefficients taken as equal)."""
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


def _truth(settings: SimulationSettings, genes: list[str], conditions: list[str], lines: list[_Line]) -> AnnData:
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
                _single(settings, line, genes, targets[0])
                if len(targets) == 1
                else _combination(settings, condition, [effect[gene] for gene in genes_of(condition)], targets)
            )
        for condition in sorted(effect):
            effects.append(effect[condition])
            expected.append(_closed(line.baseline * np.exp(effect[condition].lfc)))
            obs.append((line.name, condition, _number_of_cells(settings, line.name, condition)))
    table = pd.DataFrame(obs, columns=["covariate", "condition", "n_cells"])
    table["strength"] = [effect.strength for effect in effects]
    table["interaction"] = [effect.interaction for effect in effects]
    table.index = row_names(table["covariate"], table["condition"])
    programs = ["general", *(f"program_{number:02d}" for number in range(1, settings.programs + 1))]
    return AnnData(
        obs=table,
        var=pd.DataFrame({"dispersion": _dispersion(settings)}, index=pd.Index(genes)),
        layers={"lfc": np.array([effect.lfc for effect in effects]), "expected": np.array(expected)},
        obsm={"shift": np.array([effect.shift for effect in effects])},
        varm={line.name: pd.DataFrame(line.loadings, index=genes, columns=programs) for line in lines},
        uns={"settings": settings.model_dump_json()},
    )


def _dispersion(settings: SimulationSettings) -> Array:
    """genes: phi, falling with the mean that the gene has where lines share their expression."""
    proportion = _closed(np.exp(settings.expression_sd * _expression(settings, "")))
    mean = _library_size(settings) * proportion
    scatter = generator(settings.seed, "simulate dispersion").standard_normal(settings.genes)
    trend = settings.dispersion + settings.dispersion_of_rare_genes / mean
    return trend * np.exp(settings.dispersion_sd * scatter)


def _library_size(settings: SimulationSettings) -> float:
    """Counts expected in the median cell."""
    return settings.counts_per_gene * settings.genes


def _number_of_cells(settings: SimulationSettings, line: str, condition: str) -> int:
    if condition == CONTROL:
        return settings.control_cells
    scatter = generator(settings.seed, "simulate number of cells", line, condition).standard_normal()
    return max(1, round(settings.cells_per_condition * float(np.exp(settings.cells_per_condition_sd * scatter))))


def _cells(settings: SimulationSettings, truth: AnnData) -> AnnData:
    obs = truth.obs
    blocks = [
        _counts(settings, line, condition, int(n), truth.layers["expected"][row], truth)
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


def _counts(
    settings: SimulationSettings, line: str, condition: str, n_cells: int, proportion: Array, truth: AnnData
) -> sparse.csr_matrix:
    """n_cells x genes counts: Poisson with a gamma-distributed rate, which is the negative binomial."""
    loadings = truth.varm[line].to_numpy()
    phi = truth.var["dispersion"].to_numpy()
    size, activity, noise, counts = (
        generator(settings.seed, f"simulate {what}", line, condition)
        for what in ("library sizes", "activity", "noise", "counts")
    )
    # The activity of programs averages out to the expected proportions: the mean of exp(normal) is taken off.
    correction = _activity_spread(loadings) ** 2 / 2
    blocks = []
    # A stream of draws for each quantity, used cell by cell: neither the size of the blocks nor the number of cells
    # changes what the first cells are.
    for n in _blocks(n_cells):
        library = _library_size(settings) * np.exp(settings.library_size_sd * size.standard_normal((n, 1)))
        log_change = activity.standard_normal((n, loadings.shape[1])) @ loadings.T - correction
        rate = library * proportion * np.exp(log_change)
        rate *= noise.standard_gamma(1 / phi, size=rate.shape) * phi
        blocks.append(sparse.csr_matrix(counts.poisson(rate).astype(np.float32)))
    return sparse.csr_matrix(sparse.vstack(blocks))


def _blocks(n_cells: int) -> list[int]:
    """Numbers of cells to hold in memory at a time; they sum to n_cells."""
    whole, rest = divmod(n_cells, _CELLS_AT_ONCE)
    return [_CELLS_AT_ONCE] * whole + [rest] * (rest > 0)


def _activity_spread(loadings: Array) -> Array:
    """genes: sd from cell to cell of log expression due to program activity (sd 1 each, independent of each other)."""
    variance: Array = np.sum(loadings**2, axis=1)
    return np.sqrt(variance)


def _closed(abundance: Array) -> Array:
    """The same abundances as proportions."""
    total: np.float64 = abundance.sum()
    return abundance / total


def _expected_log1p(
    settings: SimulationSettings, proportion: Array, spread: Array, phi: Array, target_sum: float
) -> Array:
    """genes: expectation over cells of log1p(target_sum * count / library size); see planted_profiles."""
    # Left end: what is cut off is below target_sum * exp(-26), 5e-8 at 10,000. Step 0.8: error about exp(-pi^2 / 0.8).
    t = np.exp(np.arange(-26.0, 3.6, 0.8))
    weight_t = 0.8 * np.exp(-t)
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    result = np.zeros_like(proportion)
    for z_library, w_library in zip(nodes, weights, strict=True):
        size = _library_size(settings) * np.exp(settings.library_size_sd * z_library)
        thinned = -np.expm1(-t * target_sum / size)
        for z, w in zip(nodes, weights, strict=True):
            mean = size * proportion * np.exp(spread * z - spread**2 / 2)
            not_seen = -np.expm1(-np.log1p(np.multiply.outer(phi * mean, thinned)) / phi[:, None])
            result += w_library * w * (not_seen @ weight_t)
    return result
