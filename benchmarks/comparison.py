"""What all benchmarks share: timing, the size of a disagreement, and the tables that they print."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from time import perf_counter
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_info

CONSOLE = Console(highlight=False, width=120, soft_wrap=True)

T = TypeVar("T")


class Timing(NamedTuple):
    """One row of the table of times. ratio: the peer's time divided by this one's; None where there is no peer."""

    what: str
    seconds: float
    ratio: float | None = None
    aim: str = ""


class Agreement(NamedTuple):
    """How far results lie apart at most, and how far they may. kind: `relative` or `absolute`."""

    what: str
    largest: float
    tolerance: float
    kind: str

    def holds(self) -> bool:
        """Return whether the claim holds."""
        return self.largest <= self.tolerance


def timed(work: Callable[[], T], repeats: int = 1) -> tuple[float, T]:
    """(seconds, result): wall-clock time of the fastest of a few runs."""
    best = np.inf
    for _ in range(repeats):
        start = perf_counter()
        result = work()
        best = min(best, perf_counter() - start)
    return float(best), result


def agreement(what: str, ours: npt.ArrayLike, theirs: npt.ArrayLike, tolerance: float, kind: str) -> Agreement:
    """Find the largest difference between two results of one shape.

    NaN against NaN, and equal infinities, are no difference; NaN against a number is an infinite one. relative:
    divided by the size of theirs; 0 against 0 is no difference.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = np.abs(a - b) / (np.abs(b) if kind == "relative" else 1.0)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = np.where(same, 0.0, np.where(np.isnan(gap), np.inf, gap))
    return Agreement(what, float(gap.max(initial=0.0)), tolerance, kind)


def machine(*packages: str) -> str:
    """Describe the number of cores, the threads of BLAS that a peer in this process may use, and versions."""
    blas = max((library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"), default=1)
    versions = [f"{name} {version(name)}" for name in ("numpy", "scipy", *packages)]
    return f"{os.cpu_count()} cores, BLAS threads {blas}, Python {platform.python_version()}, {', '.join(versions)}"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)
    CONSOLE.print()


def show_times(title: str, timings: Sequence[Timing]) -> None:
    """Print times with the ratios to the peer and what they should be; nothing fails for being slow."""
    rows = [
        (each.what, f"{each.seconds:,.3f}", "" if each.ratio is None else f"{each.ratio:,.1f}x", each.aim)
        for each in timings
    ]
    show(title, ("", "seconds", "faster than the peer", "aim"), rows)


def show_agreement(agreements: Sequence[Agreement]) -> None:
    """Print how far results lie apart; exit with status 1 where that is more than tolerated."""
    rows = [
        (each.what, f"{each.largest:.1e}", each.kind, f"{each.tolerance:.0e}", "yes" if each.holds() else "NO")
        for each in agreements
    ]
    show("Agreement", ("", "largest difference", "kind", "tolerance", "agrees"), rows)
    if not all(each.holds() for each in agreements):
        CONSOLE.print("The results disagree.")
        raise typer.Exit(1)
