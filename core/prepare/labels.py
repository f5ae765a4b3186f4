"""How a label of a published file becomes a condition, by the rules of the entry alone.

A label that could be read in two ways is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pandas as pd

from core.conditions import CONTROL, SEPARATOR, genes_of
from core.errors import UserError, shown
from core.prepare.settings import Labels

# What control is called elsewhere, in lower case: no gene's symbol.
LIKE_CONTROL = ("control", "ctrl", "nt", "ntc", "non-targeting", "nontargeting", "non_targeting", "safe-targeting")
# Missing labels that were written as text: as perturbations they would be wrong.
NO_LABEL = ("nan", "NaN", "None", "none", "NA", "N/A", "<NA>")


def harmonise_labels(labels: pd.Series, rules: Labels, where: str) -> pd.Series:
    """Return published labels as conditions; missing where there is no label, an empty one, or one that is dropped.

    Spaces around a label or a gene do not count. The genes of a combination are sorted, so that `B+A` is `A+B`.
    Refused, since each could be read in two ways: a label that holds both the entry's separator and `+`, and names that
    differ in case only, from a control label or from each other.

    Parameters
    ----------
    labels : pd.Series
        As published.
    rules : Labels
        How labels read, from the entry.
    where : str
        What the input is called in messages.

    Returns
    -------
    pd.Series
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
        remedy = "add it to `labels.dropped` in the catalog entry (or to `labels.control`), or leave these labels empty"
        raise UserError(where, field, f"the label {label!r}, text that stands for no label", remedy)
    separator, left = rules.separator, _cut(name, rules)
    if separator is not None and separator != SEPARATOR and separator in left and SEPARATOR in left:
        found = f"the label {label!r} holds both separators, {separator!r} and {SEPARATOR!r}"
        remedy = "rename it, or set `labels.separator` in the catalog entry to the one that is meant"
        raise UserError(where, field, found, remedy)
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
            remedy = f"add {part!r} to `labels.control` in the catalog entry, or the label to `labels.dropped`"
            raise UserError(where, field, f"the label {label!r}: {part!r} is no gene, but a name of control", remedy)
    # A combination with control is the perturbation alone (`A+control` in some files).
    genes = sorted(set(names) - control)
    if not genes or any(not gene for gene in genes):
        found = f"the label {label!r} names no gene, or an empty one"
        raise UserError(where, field, found, "correct the label, or add it to `labels.control` in the catalog entry")
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
        found = f"perturbed genes that differ in case only: {shown(alike)}"
        remedy = "spell each gene in one way, as among the measured genes: as they are, they would be two perturbations"
        raise UserError(where, f"obs[{rules.column!r}]", found, remedy)


def find_measured_controls(labels: pd.Series, rules: Labels, symbols: pd.Index, where: str) -> list[str]:
    """Labels that the entry names as control and that are also genes of the file, sorted.

    Parameters
    ----------
    labels : pd.Series
        As published.
    rules : Labels
        How labels read, from the entry.
    symbols : pd.Index
        Of all columns of a file.
    where : str
        What the input is called in messages.

    Returns
    -------
    list[str]

    Raises
    ------
    UserError
        Where `control_contains` alone makes control of a label that names such a gene.
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


def require_controls(obs: pd.DataFrame, rules: Labels, where: str) -> None:
    """Raise UserError where a covariate has no control cells.

    Parameters
    ----------
    obs : pd.DataFrame
        The table of cells, with `covariate` and `condition`.
    rules : Labels
        How labels read, from the entry.
    where : str
        What the input is called in messages.
    """
    has_control = (obs["condition"] == CONTROL).groupby(obs["covariate"], observed=True).any()
    without = sorted(has_control.index[~has_control].astype(str))
    if len(has_control) == 0 or without:
        labels = sorted(obs["condition"].astype(str).unique())
        found = f"no control cells in {shown(without) or 'any covariate'}; labels there: {shown(labels, 8)}"
        remedy = f"set `labels.control` in the catalog entry (now {shown(list(rules.control))}), or --control"
        raise UserError(where, f"obs[{rules.column!r}]", found, remedy)
