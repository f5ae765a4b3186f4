"""Numbers and names as people read them."""

from __future__ import annotations

import numpy as np
import pandas as pd

DASH = "–"


def format_number(value: float, decimals: int) -> str:
    """Format a number in fixed point, with a true minus sign.

    Parameters
    ----------
    value
        The number; from 10,000 on it has no decimals.
    decimals
        Digits after the point.

    Returns
    -------
    str
        An en dash for NaN.
    """
    if np.isnan(value):
        return DASH
    text = f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.{decimals}f}"
    return "0" + text[2:] if text.startswith("-0") and float(text) == 0 else text.replace("-", "−")


def choose_decimals(values: pd.Series[float]) -> int:
    """Choose how many decimals give the largest of some values three significant digits.

    Parameters
    ----------
    values
        NaN and infinite ones do not count.

    Returns
    -------
    int
        Between 2 and 7; 2 where there is no value but 0.
    """
    largest = values.abs().replace(np.inf, np.nan).max()
    if np.isnan(largest) or largest == 0:
        return 2
    return int(np.clip(2 - np.floor(np.log10(largest)), 2, 7))


def format_share(value: float) -> str:
    """Format a share as per cent, never rounded to 0 % or 100 %.

    Parameters
    ----------
    value
        Between 0 and 1.

    Returns
    -------
    str
        An en dash for NaN.
    """
    if np.isnan(value):
        return DASH
    if 0 < value < 0.01:
        return "< 1 %"
    if 0.99 < value < 1:
        return "> 99 %"
    return f"{100 * value:.0f} %"


def format_p(value: float) -> str:
    """Format a p-value: four decimals below 0.1, else two.

    Parameters
    ----------
    value
        Between 0 and 1.

    Returns
    -------
    str
        An en dash for NaN.
    """
    if np.isnan(value):
        return DASH
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def format_interval(low: float, high: float, decimals: int) -> str:
    """Format an interval as `[low, high]`.

    Parameters
    ----------
    low, high
        Its ends.
    decimals
        Digits after the point.

    Returns
    -------
    str
        The two numbers in brackets.
    """
    return f"[{format_number(low, decimals)}, {format_number(high, decimals)}]"


def format_count(n: int, noun: str) -> str:
    """Format a number of things: `1 metric`, `2 metrics`.

    Parameters
    ----------
    n
        How many there are.
    noun
        One of them.

    Returns
    -------
    str
        The number and the noun, in the plural where it is needed.
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def join_names(names: list[str]) -> str:
    """Join names as a sentence does: `a`, `a and b`, `a, b and c`.

    Parameters
    ----------
    names
        In the order to show.

    Returns
    -------
    str
        Empty where there is none.
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def spell_name(name: str) -> str:
    """Spell the name of a control in words: `dataset_mean` is the dataset mean.

    Parameters
    ----------
    name
        As tables have it.

    Returns
    -------
    str
        The name with spaces.
    """
    return name.replace("_", " ")
