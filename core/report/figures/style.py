"""One look for all figures, and images of them whose bytes depend on the figure alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from math import ceil, floor, log10
from threading import RLock
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

INK = "#1f2328"
MUTED = "#6b7280"
FAINT = "#d9dce1"
BLUE = "#0072b2"
GREY = "#8a9099"

# Okabe and Ito's colours, which people with any common form of colour blindness can distinguish; shapes repeat them.
VERDICT_COLOURS = {"calibrated": BLUE, "inconclusive": "#e69f00", "miscalibrated": "#d55e00", "none": GREY}
VERDICT_MARKERS = {"calibrated": "o", "inconclusive": "s", "miscalibrated": "D", "none": "X"}

# Strata of effect size (docs/science.md section 6): from light to dark with the number of DEGs.
STRATUM_COLOURS = {"0": "#b9bec6", "1-9": "#e69f00", "10-99": "#009e73", ">=100": BLUE}
STRATUM_LABELS = {"0": "0", "1-9": "1–9", "10-99": "10–99", ">=100": "≥ 100"}

_RC: dict[Any, Any] = {
    "svg.hashsalt": "calipert",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    # Names come from users' files: a dollar sign in one is no formula.
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "axes.edgecolor": "#9aa0a8",
    "axes.linewidth": 0.7,
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_DPI = 200
# The layout is measured with the font that matplotlib brings; a reader sees the narrower font of their own system.
_READERS_FONTS = b"'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_NO_METADATA = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
_RC_LOCK = RLock()


@contextmanager
def apply_look() -> Iterator[None]:
    """Apply the settings of all figures, whatever the user's matplotlibrc says; one thread at a time.

    For a block (`with apply_look():`) or a function (`@apply_look()`).
    """
    with _RC_LOCK, mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def render_figure(figure: Figure, kind: str) -> bytes:
    """Render a figure, without date or version: the same bytes for the same figure.

    Parameters
    ----------
    figure
        As a figure function gives it.
    kind
        `svg`, with editable text, or `png`, at 200 dots per inch.

    Returns
    -------
    bytes
        The file's content.
    """
    buffer = BytesIO()
    # Ticks are made while drawing, so the settings must hold here as well.
    with apply_look():
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata=_NO_METADATA[kind])
    image = buffer.getvalue()
    if kind == "svg":
        for font in (b"'DejaVu Sans', sans-serif", b"'DejaVu Sans'"):
            image = image.replace(font, _READERS_FONTS)
    return image


def split_panels(figure: Figure, n: int, columns: int) -> list[Axes]:
    """Split a figure into panels that share their axes, in rows of so many columns.

    Parameters
    ----------
    figure
        Without panels.
    n
        How many panels.
    columns
        At most so many side by side.

    Returns
    -------
    list of Axes
        In the order of reading.
    """
    panels = figure.subplots(ceil(n / columns), columns, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(panels.flat):
        axes.set_visible(index < n)
        # The last panel of each column carries the axis, also where the bottom line is not full.
        axes.tick_params(axis="x", labelbottom=index + columns >= n)
    return list(panels.flat[:n])


def format_tick(value: float) -> str:
    """Format a tick label in plain digits: 0.001, 0.5, 20, 1,000; no exponent, no zero at the end.

    Parameters
    ----------
    value
        The number, with up to three significant digits.

    Returns
    -------
    str
        The label.
    """
    if value == 0:
        return "0"
    digits = max(0, 2 - floor(log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def use_plain_ticks(axis: Axis) -> None:
    """Label the ticks of an axis by `format_tick`.

    Parameters
    ----------
    axis
        Of x or y.
    """
    axis.set_major_formatter(lambda value, _: format_tick(value))


def break_name(name: str, most: int = 22) -> str:
    """Break a long name after an underscore: weighted_pearson_ over deltactrl.

    Parameters
    ----------
    name
        Of a metric.
    most
        How many characters fit on a line.

    Returns
    -------
    str
        One line, or two.
    """
    place = name.rfind("_", 0, most)
    return name if len(name) <= most or place < 0 else f"{name[: place + 1]}\n{name[place + 1 :]}"


def draw_grid(axes: Axes, which: Literal["x", "y"]) -> None:
    """Draw a faint grid along one axis.

    Parameters
    ----------
    axes
        The panel.
    which
        The axis.
    """
    axes.grid(True, axis=which, color=FAINT, linewidth=0.6)


def hide_spine(axes: Axes) -> None:
    """Hide the left spine and the tick marks of an axis that shows names.

    Parameters
    ----------
    axes
        The panel.
    """
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
