"""What can be wrong with the stored values of a matrix: not finite, negative, no counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np

from core.errors import UserError

MOST = 1 << 24  # up to here float32, which cells.h5ad holds counts in, has every whole number

# What can be wrong with a count: its name, where it is so, the remedy. The first that is found is reported.
Fault: TypeAlias = tuple[str, Callable[[Any], Any], str]
FAULTS: tuple[Fault, ...] = (
    ("NaN or infinite values", lambda values: ~np.isfinite(values), "remove or correct these cells"),
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
        "give raw counts of molecules: one cell cannot have that many of one gene",
    ),
)
Faults: TypeAlias = dict[str, tuple[int, float]]  # name of a fault -> how many values have it, the first of them


def find_count_faults(values: Any) -> Faults:
    """Say what is wrong with some stored counts: nothing, if they are whole numbers from 0 to MOST.

    Parameters
    ----------
    values : Any
        Numbers of any type.

    Returns
    -------
    Faults
    """
    # One look at right counts: NaN is neither below nor above anything.
    if not values.size or (values.min() >= 0 and values.max() <= MOST and are_whole(values)):
        return {}
    return _faults(values, FAULTS)


def find_expression_faults(values: Any) -> Faults:
    """Say what is wrong with stored expression: nothing, if it is finite and not negative.

    Parameters
    ----------
    values : Any
        The stored values.

    Returns
    -------
    Faults
    """
    return _faults(values, FAULTS[:2])


def require_log_expression(whole: bool, largest: float, where: str) -> None:
    """Refuse expression that looks like counts: whole numbers only, of which one is above 1.

    Parameters
    ----------
    whole : bool
        Whether all values are whole numbers.
    largest : float
        The largest value.
    where : str
        What the input is called in messages.

    Raises
    ------
    UserError
        then.
    """
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


def are_whole(values: Any) -> bool:
    """Tell whether all of some stored values are whole.

    Parameters
    ----------
    values : Any
        The stored values.

    Returns
    -------
    bool
    """
    return values.dtype.kind in "iu" or bool((values == np.floor(values)).all())


def refuse_faults(faults: Iterable[Faults], field: str, where: str) -> None:
    """Refuse values with a fault.

    Parameters
    ----------
    faults : Iterable[Faults]
        Of consecutive pieces.
    field : str
        Where in the file the matrix lies.
    where : str
        What the input is called in messages.

    Raises
    ------
    UserError
        that says how many values have it.
    """
    pieces = list(faults)
    for name, _, remedy in FAULTS:
        found = [piece[name] for piece in pieces if name in piece]
        if found:
            n, example = sum(n for n, _ in found), found[0][1]
            raise UserError(where, field, f"{n:,} {name} (first: {example:.12g})", remedy)
