"""From a published file to counts with the field's labels: conditions, covariates, gene symbols.

Everything that can be wrong with a raw file is refused here, before any work starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from core.arrays import Bools, Ints
from core.conditions import CONTROL, SEPARATOR, genes_of
from core.errors import UserError, shown
from core.prepare.settings import Filter, Labels, PreparationSettings, Sampling
from core.rng import generator

# What control is called elsewhere, in lower case: no gene's symbol.
LIKE_CONTROL = ("control", "ctrl", "nt", "ntc", "non-targeting", "nontargeting", "non_targeting", "safe-targeting")
# Missing labels that were written as text: as perturbations they would be wrong.
NO_LABEL = ("nan", "NaN", "None", "none", "NA", "N/A", "<NA>")

COMPARISONS: dict[str, Callable[[pd.Series, Any], pd.Series]] = {
    "==": lambda column, value: column == value,
    ">=": lambda column, value: column >= value,
    "<=": lambda column, value: column <= value,
    "in": lambda column, value: column.isin(value),
}


MOST = 1 << 24  # up to here float32, which cells.h5ad holds counts in, has every whole number

# What can be wrong with a count: its name, where it is so, the remedy. The first that is found is reported.
Fault: TypeAlias = tuple[str, Callable[[Any], Any], str]
FAULTS: tuple[Fault, ...] = (
    ("NaN or infinite values", lambda values: ~np.isfinite(values), "remove or mend these cells"),
    ("negative values", lambda values: values < 0, "give raw counts, not scaled or corrected expression"),
    (
        "counts that are not whole numbers",
        lambda values: np.isfinite(values) & (values != np.floor(values)),
        "give raw counts in X, or name their layer in the catalog entry (`counts_layer`); normalised or "
        "log-transformed values cannot be used here",
    ),
    (
        f"counts above {MOST:,}, which 32-bit floats do not hold exactly",
        lambda values: values > MOST,
        "give raw counts of molecules: one cell has not that many of one gene",
    ),
)
Faults: TypeAlias = dict[str, tuple[int, float]]  # name of a fault -> how many values have it, the first of them


class Plan(NamedTuple):
    """What a file's names alone decide: which cells and genes to read, and what they are called.

    rows: positions of the kept cells, in file order. obs: their `condition`, `covariate` and, where the entry names
    a column for it, `library_size`. columns: positions of the kept genes, sorted by symbol. genes: their symbols.
    report: what was dropped on the way.
    """

    rows: Ints
    obs: pd.DataFrame
    columns: Ints
    genes: pd.Index
    report: dict[str, Any]


def plan(obs: pd.DataFrame, var: pd.DataFrame, spec: PreparationSettings, where: str) -> Plan:
    """Harmonise the names of a published file, without its matrix.

    obs, var: its tables of cells and genes. Conditions are sampled before any filter, where the entry says so.
    Raises UserError for a missing column, duplicated cell names, another size than the entry expects, labels that
    cannot be read or that differ in case only, perturbations that `control_contains` would make control of, and data
    without control cells.
    """
    if len(obs) == 0 or len(var) == 0:
        raise UserError(where, "shape", f"{len(obs)} cells x {len(var)} genes", "give a file with cells and genes")
    _require_expected(obs, len(var), spec, where)
    require_unique_cells(obs, where)
    sampled = _sampled(obs, spec, where)
    keep = _filtered(obs, spec.filters, where) & sampled
    kept = obs.loc[keep]
    labels = _column(kept, spec.labels.column, where)
    conditions = condition_labels(labels, spec.labels, where)
    labelled = conditions.notna().to_numpy()
    covariates = (
        pd.Series(spec.covariate, index=kept.index)
        if spec.covariate_column is None
        else _covariates(kept[labelled], spec.covariate_column, where).reindex(kept.index)
    )
    table = pd.DataFrame({"condition": conditions[labelled].astype(str), "covariate": covariates[labelled]})
    if spec.library_size is not None:
        table["library_size"] = _library_sizes(kept[labelled], spec.library_size, where)
    require_controls(table, spec.labels, where)
    symbols = pd.Index(var.index if spec.symbol_column is None else _symbols(var, spec.symbol_column, where))
    columns, genes, dropped = columns_by_symbol(symbols)
    if not len(columns):
        field = "var_names" if spec.symbol_column is None else f"var[{spec.symbol_column!r}]"
        found = f"no gene with a symbol of its own among {len(var):,}"
        raise UserError(
            where, field, found, "name the column with the gene symbols in the catalog entry (`symbol_column`)"
        )
    report = {
        "cells in the file": len(obs),
        "cells of conditions that were not sampled": int((~sampled).sum()),
        "cells dropped by the entry's filters": int((sampled & ~keep).sum()),
        "cells without a label": int((~labelled).sum()),
        "control labels that are also measured genes": _measured_controls(labels, spec.labels, symbols, where),
    }
    return Plan(np.flatnonzero(keep)[labelled], table, columns, genes, report | dropped)


def require_unique_cells(obs: pd.DataFrame, where: str) -> None:
    """Raise UserError where a cell name occurs twice."""
    repeated = obs.index[obs.index.duplicated()]
    if len(repeated):
        raise UserError(
            where,
            "obs_names",
            f"{len(repeated)} duplicated cell names ({shown(list(repeated))})",
            "make the names unique, e.g. by adding the batch: adata.obs_names_make_unique()",
        )


def columns_by_symbol(symbols: pd.Index) -> tuple[Ints, pd.Index, dict[str, Any]]:
    """(positions of the genes to keep, sorted by symbol; their symbols; what was dropped, for the report).

    symbols: of all columns of a file. A symbol that is missing, or occurs more than once, names no gene.
    """
    ambiguous = symbols.duplicated(keep=False) | symbols.isna()
    columns = np.flatnonzero(~ambiguous)
    columns = columns[np.argsort(symbols[columns].to_numpy().astype(str), kind="stable")]
    report = {
        "genes in the file": len(symbols),
        "genes dropped because their symbol occurs more than once": sorted(
            set(symbols[ambiguous].dropna().astype(str))
        ),
        "genes dropped because they have no symbol": int(symbols.isna().sum()),
    }
    return columns, symbols[columns].astype(str), report


def final_order(obs: pd.DataFrame) -> Ints:
    """Positions that sort cells as cells.h5ad has them: by covariate, condition and cell name, as text."""
    names = (obs.index, obs["condition"], obs["covariate"])
    return np.asarray(np.lexsort([name.to_numpy().astype(str) for name in names]))


def sample_conditions(conditions: set[str], sampling: Sampling, seed: int) -> set[str]:
    """`sampling.conditions` of the perturbed conditions: those in `priority`, the rest drawn with the seed.

    All of them, where there are no more. Priority conditions beyond the number wanted are left out from the end of
    the list.
    """
    first = [name for name in sampling.priority if name in conditions][: sampling.conditions]
    others = sorted(conditions - set(first))
    n = min(sampling.conditions - len(first), len(others))
    drawn = generator(seed, "sample_conditions").choice(len(others), size=n, replace=False)
    return {*first, *(others[i] for i in drawn)}


def _sampled(obs: pd.DataFrame, spec: PreparationSettings, where: str) -> Bools:
    """Mask of the cells whose condition takes part; control and cells without a label always do."""
    if spec.sample is None:
        return np.ones(len(obs), dtype=bool)
    labels = condition_labels(_column(obs, spec.labels.column, where), spec.labels, where)
    kept = sample_conditions(set(labels.dropna()) - {CONTROL}, spec.sample, spec.seed)
    return np.asarray(labels.isna() | labels.isin(kept | {CONTROL}), dtype=bool)


def _library_sizes(obs: pd.DataFrame, column: str, where: str) -> pd.Series:
    sizes = pd.to_numeric(_column(obs, column, where), errors="coerce")
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise UserError(
            where,
            f"obs[{column!r}]",
            "library sizes that are missing, zero or negative",
            "fill the column, or take `library_size` out of the catalog entry",
        )
    return sizes.astype(np.float64)


def _require_expected(obs: pd.DataFrame, n_genes: int, spec: PreparationSettings, where: str) -> None:
    expected = spec.expected
    if expected is None:
        return
    labels = condition_labels(_column(obs, spec.labels.column, where), spec.labels, where)
    conditions = len(set(labels.dropna()) - {CONTROL})
    if (len(obs), n_genes, conditions) != (expected.cells, expected.genes, expected.conditions):
        raise UserError(
            where,
            "shape",
            f"{len(obs):,} cells x {n_genes:,} genes, {conditions} conditions; "
            f"{spec.name} has {expected.cells:,} x {expected.genes:,}, {expected.conditions}",
            "give the file that the catalog entry describes, or write an entry of your own for this one",
        )


def condition_labels(labels: pd.Series, rules: Labels, where: str) -> pd.Series:
    """Published labels as conditions; missing where there is no label, an empty one, or one that is dropped.
    Spaces around a label or a gene do not count.

    The genes of a combination are sorted, so that `B+A` is `A+B`. Refused, since each could be read in two ways: a
    label that holds both the entry's separator and `+`, and names that differ in case only, from a control label or
    from each other.
    """
    distinct = [label for label in labels.dropna().astype(str).unique() if label.strip() not in ("", *rules.dropped)]
    mapping = {label: _condition(label, rules, where) for label in distinct}
    _require_one_spelling(mapping.values(), rules, where)
    return labels.astype(object).map(lambda label: mapping.get(str(label)), na_action="ignore")


def _condition(label: str, rules: Labels, where: str) -> str:
    field, name, control = f"obs[{rules.column!r}]", label.strip(), _controls(rules)
    if _is_control(name, rules):
        return CONTROL
    if name in NO_LABEL:
        raise UserError(
            where,
            field,
            f"the label {label!r}, text that stands for no label",
            "add it to `labels.dropped` in the catalog entry (or to `labels.control`), or leave these labels empty",
        )
    separator, left = rules.separator, _cut(name, rules)
    if separator is not None and separator != SEPARATOR and separator in left and SEPARATOR in left:
        raise UserError(
            where,
            field,
            f"the label {label!r} holds both separators, {separator!r} and {SEPARATOR!r}",
            "rename it, or set `labels.separator` in the catalog entry to the one that is meant",
        )
    names = _split(left, rules)
    meant = {control_label.casefold(): control_label for control_label in control}
    for part in (name, *names):
        if part not in control and part.casefold() in meant:
            raise UserError(
                where,
                field,
                f"the label {label!r}: {part!r} differs from the control label {meant[part.casefold()]!r} in case only",
                f"add {part!r} to `labels.control` in the catalog entry if it is control, else rename it",
            )
    for part in names:
        if part not in control and part.casefold() in LIKE_CONTROL:
            raise UserError(
                where,
                field,
                f"the label {label!r}: {part!r} is no gene, but a name of control",
                f"add {part!r} to `labels.control` in the catalog entry, or the label to `labels.dropped`",
            )
    # A combination with control is the perturbation alone (`A+control` in some files).
    genes = sorted(set(names) - control)
    if not genes or any(not gene for gene in genes):
        raise UserError(
            where,
            field,
            f"the label {label!r} names no gene, or an empty one",
            "mend the label, or add it to `labels.control` in the catalog entry",
        )
    return SEPARATOR.join(genes)


def _controls(rules: Labels) -> set[str]:
    return {CONTROL, *(label.strip() for label in rules.control)}


def _is_control(name: str, rules: Labels) -> bool:
    return name in _controls(rules) or (rules.control_contains is not None and rules.control_contains in name)


def _cut(name: str, rules: Labels) -> str:
    return name if rules.cut_at is None else name.split(rules.cut_at, 1)[0]


def _split(name: str, rules: Labels) -> list[str]:
    separator = rules.separator if rules.separator is not None and rules.separator in name else SEPARATOR
    return [part.strip() for part in name.split(separator)]


def _require_one_spelling(conditions: Iterable[str], rules: Labels, where: str) -> None:
    """Raise UserError where two perturbed genes differ in case only: they would become two perturbations."""
    genes = sorted({gene for condition in conditions for gene in genes_of(condition)}, key=lambda g: (g.casefold(), g))
    alike = [f"{a} and {b}" for a, b in pairwise(genes) if a.casefold() == b.casefold()]
    if alike:
        raise UserError(
            where,
            f"obs[{rules.column!r}]",
            f"perturbed genes that differ in case only: {shown(alike)}",
            "spell each gene in one way, as among the measured genes: as they are, they would be two perturbations",
        )


def _measured_controls(labels: pd.Series, rules: Labels, symbols: pd.Index, where: str) -> list[str]:
    """Labels that the entry names as control and that are also genes of the file, sorted.

    Raises UserError where `control_contains` alone makes control of a label that names such a gene.
    """
    measured, control = set(symbols.dropna().astype(str)), _controls(rules)
    names = {label.strip() for label in labels.dropna().astype(str).unique()}
    parts = {name: {name, *_split(_cut(name, rules), rules)} for name in sorted(names)}
    swallowed = [name for name in parts if name not in control and _is_control(name, rules) and parts[name] & measured]
    if swallowed:
        raise UserError(
            where,
            f"obs[{rules.column!r}]",
            f"{len(swallowed)} labels that name a measured gene and contain {rules.control_contains!r}, which would "
            f"make control of them: {shown(swallowed)}",
            "make `labels.control_contains` in the catalog entry longer, or list the control labels in "
            "`labels.control` instead",
        )
    return sorted(control & measured & set[str]().union(*parts.values()))


def count_faults(values: Any) -> Faults:
    """What is wrong with some stored counts; nothing, unless they are whole numbers from 0 to MOST.

    values: numbers of any type.
    """
    # One look at right counts: NaN is neither below nor above anything.
    if not values.size or (values.min() >= 0 and values.max() <= MOST and whole_numbers(values)):
        return {}
    return _faults(values, FAULTS)


def expression_faults(values: Any) -> Faults:
    """What is wrong with stored expression that is taken as it is: nothing, unless it is finite and not negative."""
    return _faults(values, FAULTS[:2])


def require_log_expression(whole: bool, largest: float, where: str) -> None:
    """Raise UserError for expression of whole numbers only, of which one is above 1: that is what counts look like."""
    if whole and largest > 1:
        raise UserError(
            where,
            "X",
            "whole numbers only: these are counts",
            "give log1p of normalised counts (scanpy.pp.normalize_total, scanpy.pp.log1p), or write a catalog entry "
            "for the file and use `calipert run`",
        )


def _faults(values: Any, faults: tuple[Fault, ...]) -> Faults:
    wrong = {name: is_wrong(values) for name, is_wrong, _ in faults}
    return {name: (int(mask.sum()), float(values[mask][0])) for name, mask in wrong.items() if mask.any()}


def whole_numbers(values: Any) -> bool:
    """Whether all of some stored values are whole."""
    return values.dtype.kind in "iu" or bool((values == np.floor(values)).all())


def refuse_faults(faults: Iterable[Faults], field: str, where: str) -> None:
    """Raise UserError where there is a fault; `faults` of consecutive pieces, of which the number is told in all."""
    pieces = list(faults)
    for name, _, remedy in FAULTS:
        found = [piece[name] for piece in pieces if name in piece]
        if found:
            n, example = sum(n for n, _ in found), found[0][1]
            raise UserError(where, field, f"{n:,} {name} (first: {example:.12g})", remedy)


def require_controls(obs: pd.DataFrame, rules: Labels, where: str) -> None:
    """Raise UserError where a covariate has no control cells."""
    has_control = (obs["condition"] == CONTROL).groupby(obs["covariate"], observed=True).any()
    without = sorted(has_control.index[~has_control].astype(str))
    if len(has_control) == 0 or without:
        labels = sorted(obs["condition"].astype(str).unique())
        raise UserError(
            where,
            f"obs[{rules.column!r}]",
            f"no control cells in {shown(without) or 'any covariate'}; labels there: {shown(labels, 8)}",
            f"set `labels.control` in the catalog entry (now {shown(list(rules.control))}), or --control",
        )


def _filtered(obs: pd.DataFrame, filters: tuple[Filter, ...], where: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    keep = np.ones(len(obs), dtype=bool)
    for row in filters:
        column = _column(obs, row.column, where)
        if row.op in (">=", "<=") and not pd.api.types.is_numeric_dtype(column):
            raise UserError(
                where,
                f"obs[{row.column!r}]",
                f"{column.dtype} values, of which none is {row.op} {row.value}",
                "filter by a column of numbers, or use `op: ==` or `op: in`",
            )
        keep &= COMPARISONS[row.op](column, row.value).fillna(False).to_numpy(dtype=bool)
    if not keep.any():
        raise UserError(where, "filters", "no cell passes the entry's filters", "check `filters` in the catalog entry")
    return keep


def _column(obs: pd.DataFrame, name: str, where: str) -> pd.Series:
    if name not in obs:
        raise UserError(
            where,
            f"obs[{name!r}]",
            f"no such column; there are: {shown(sorted(map(str, obs.columns)), 12)}",
            "name the right column in the catalog entry (`labels.column`, `filters`, `covariate_column`, "
            "`library_size`), or with --column",
        )
    return obs[name]


def _covariates(obs: pd.DataFrame, name: str, where: str) -> pd.Series:
    column = _column(obs, name, where)
    if column.isna().any():
        raise UserError(
            where,
            f"obs[{name!r}]",
            f"{int(column.isna().sum()):,} labelled cells without a covariate",
            "fill the column, or leave these cells out by `filters` in the catalog entry",
        )
    return column.astype(str)


def _symbols(var: pd.DataFrame, column: str, where: str) -> pd.Series:
    if column not in var:
        raise UserError(
            where,
            f"var[{column!r}]",
            f"no such column; there are: {shown(sorted(map(str, var.columns)), 12)}",
            "name the right column in the catalog entry (`symbol_column`)",
        )
    return var[column].astype(object).where(var[column].notna(), None)
