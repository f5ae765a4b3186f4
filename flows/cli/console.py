"""What the terminal shows: the result, the verdicts, and an error that the user can correct."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Group, JustifyMethod, OverflowMethod, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from core.errors import UserError, cut_middle, shown

if TYPE_CHECKING:
    import pandas as pd

    from core.prepare.check import DatasetCheck
    from flows.reproduce import Outcome

_WORDS = {"pearson": "r", "r2": "R²", "deltactrl": "Δctrl", "deltapert": "Δpert", "degs": "DEGs"}
_LEGEND = {
    "r": "r: Pearson correlation",
    "R²": "R²: coefficient of determination",
    "w": "w: weighted by differential expression",
    "Δctrl": "Δctrl: change from the control mean",
    "Δpert": "Δpert: from the dataset mean",
}
_VERDICT_STYLES = {"calibrated": "green", "inconclusive": "yellow", "miscalibrated": "red", "none": "dim"}
_WIDE = 97  # columns that the full table of verdicts takes
_HEAD, _TAIL = 30, 10  # rows of a long table of conditions that are shown
_LONGEST = 800  # characters of one field of an error: the panel must fit on a screen


def start_table(*heads: str, whole: int = 99, right: Collection[str] = (), first: str = "", **options: Any) -> Table:
    """Start a table with a line below its heads, unless the options of rich's Table say otherwise.

    whole: how many columns, from the left, are never wrapped. right: heads of columns of numbers. first: the style of
    the first column.
    """
    table = Table(**{"box": box.SIMPLE_HEAD, "padding": (0, 1), "pad_edge": False, "show_edge": False, **options})
    for place, head in enumerate(heads):
        justify: JustifyMethod = "right" if head in right else "left"
        # A number that does not fit ends in an ellipsis: cut without a mark, it would be another number.
        overflow: OverflowMethod = "ellipsis" if place < whole else "fold"
        table.add_column(head, style="" if place else first, justify=justify, overflow=overflow, no_wrap=place < whole)
    return table


def make_result_table(leaderboard: pd.DataFrame, width: int = 100) -> RenderableType:
    """Lay out models and controls x metrics (means) to the width of the terminal; below it a legend.

    leaderboard: the long table of docs/science.md section 4. Calibrated metrics come first and are marked; the best
    model by each has a star. Values of other metrics are dim and not ranked. Small errors are shown in thousandths.
    What does not fit in the width with two decimals goes into further tables. NaN is a dash.
    """
    # Imported here, so that an error panel does not wait for them.
    from core.reference.controls import RANKED
    from core.report import tables as views
    from core.report.text import format_share

    means, ranks = views.pivot_metrics(leaderboard, "mean"), views.pivot_metrics(leaderboard, "rank")
    ranked = views.list_ranked_metrics(leaderboard)
    rows = views.list_entries(leaderboard)
    rows = rows.assign(
        # What the gaps between rows separate, and predictors of too little coverage with it.
        group=rows["kind"].replace("baseline", "model").where(rows["in_panel"], "below"),
        name=rows["model"].where(rows["in_panel"], rows["model"] + " (" + rows["coverage"].map(format_share) + ")"),
    )
    names, groups = list(rows["name"]), list(rows["group"])
    room = width - max(map(len, names), default=0)
    columns: list[Column] = []
    for decimals in (3, 2):
        columns = [
            _format_column(metric, means[metric].tolist(), ranks[metric].tolist(), metric in ranked, decimals)
            for metric in means.columns
        ]
        if _width(columns) <= room:
            parts = [columns]
            break
    else:
        # First the calibrated ones by themselves; what still does not fit goes into further tables.
        halves = [[column for column in columns if column.calibrated is wanted] for wanted in (True, False)]
        parts = [part for half in halves for part in _split_to_fit(half, room)]
    tables = [part for columns in parts for part in (_make_table(columns, names, groups), "")]
    return Group(*tables, _make_legend(columns, models=rows["kind"].isin(RANKED).any()))


def make_verdict_table(calibration: pd.DataFrame, width: int = 100) -> RenderableType:
    """Lay out a row per metric: verdict, mean DRF with its 95 % interval and spread over half splits, BDS, n; a legend.

    The other two variants of the DRF and the share of NaN are left out where the terminal is narrow.
    """
    from core.report import tables as views
    from core.report.text import DASH, format_number, format_share
    from core.scoring.calibration import FEWEST_CONDITIONS, THRESHOLD

    variants = views.tabulate_variants(calibration)
    heads = ["metric", "verdict", "DRF", "95 % interval", "halves\n±", "BDS", "n", "NaN", "DRF\nmean", "DRF\nctrl"]
    # The box sets one space between columns: no further padding.
    table = start_table(*(heads if width >= _WIDE else heads[:7]), right=heads[2:], padding=0)
    for row in views.list_records(views.tabulate_verdicts(calibration)):
        style, interval = _VERDICT_STYLES[row["verdict"]], (row["drf_low"], row["drf_high"])
        cells: list[RenderableType] = [
            Text(row["metric"]),
            Text("no verdict" if row["verdict"] == "none" else row["verdict"], style=style),
            Text(format_number(row["drf"], 2), style=style),
            " to ".join(format_number(end, 2) for end in interval) if row["drf"] == row["drf"] else DASH,
            format_number(row["drf_half_sd"], 2),
            format_number(row["bds"], 2),
            f"{row['n_conditions']:,.0f}",
            format_share(row["nan_share"]),
            *(format_number(variants[name][row["metric"]], 2) for name in ("drf_mean", "drf_ctrl")),
        ]
        table.add_row(*cells[: len(table.columns)])
    legend = (
        f"DRF: mean Dynamic Range Fraction. calibrated: its whole interval lies above {THRESHOLD:g}; miscalibrated: "
        f"below. no verdict: fewer than {FEWEST_CONDITIONS} conditions. BDS: share of conditions in which the positive "
        "control beats the negative one."
    )
    return Group(table, "", Text(legend, style="dim"))


def make_check_table(check: DatasetCheck, name: str) -> RenderableType:
    """Lay out conditions with their labels and cells, the smallest first, then what is dropped.

    Of a long table only the smallest and the largest conditions are shown.
    """
    labels = check.labels.groupby("condition")["label"].agg(lambda texts: sorted(set(texts)))
    rows = check.conditions.sort_values(["kept", "cells", "covariate", "condition"])
    heads = ("covariate", "condition", "labels in the file", "cells", "")
    title = f"{name}: {len(rows):,} (covariate, condition) groups"
    table = start_table(*heads, whole=0, right=["cells"], title=title, pad_edge=True)
    for position, row in enumerate(rows.itertuples(index=False)):
        if _HEAD <= position < len(rows) - _TAIL:
            if position == _HEAD:
                table.add_row("...", f"{len(rows) - _HEAD - _TAIL:,} more", "", "", "")
            continue
        texts = shown(labels[row.condition], 3)
        table.add_row(row.covariate, row.condition, texts, f"{row.cells:,}", "" if row.kept else "dropped: too few")
    facts = Table.grid(padding=(0, 2))
    for what, value in check.report.items():
        text = f"{len(value):,}: {shown(value, 8)}" if isinstance(value, list) and value else value
        facts.add_row(what, Text("none" if text == [] else f"{text:,}" if isinstance(text, int) else str(text)))
    dropped = int((~check.conditions["kept"]).sum())
    facts.add_row("conditions dropped for too few cells", f"{dropped:,}")
    note = "Not applied yet, since they need the counts: the least genes per cell and the least cells per gene."
    return Group(table, "", facts, "", Text(note, style="dim"))


def make_outcome_table(outcomes: list[Outcome]) -> RenderableType:
    """Lay out what became of each data set: the numbers of those that are done, the reason of those that are not."""
    numbers = ("cells", "conditions", "genes", "calibrated\nmetrics")
    table = start_table("data set", *numbers, "outcome", right=numbers, whole=5)
    for name, outcome, reason, *counts in outcomes:
        cells = ["" if count is None else f"{count:,}" for count in counts]
        text = f"{outcome}: {cut_middle(reason, _LONGEST)}" if reason else outcome
        table.add_row(name, *cells, Text(text, style="yellow" if reason else "green"))
    return table


def make_error_panel(error: UserError) -> Panel:
    """Lay out a user's error on one screen: where, which field, what was found, what to do."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for field, style in {"where": "bold", "field": "", "found": "", "remedy": "green"}.items():
        grid.add_row(field, Text(cut_middle(getattr(error, field), _LONGEST), style=style))
    return Panel(grid, title="Error", title_align="left", border_style="red", padding=(1, 2))


class Column(NamedTuple):
    """One metric of the result table: lines of its head, cells from top to bottom, and whether one is the best."""

    head: list[str]
    cells: list[Text]
    has_best: bool
    calibrated: bool


def _format_column(metric: str, values: list[float], ranks: list[float], calibrated: bool, decimals: int) -> Column:
    """Format one metric: errors of which one is below 0.1 in thousandths, large values with fewer decimals."""
    from core.report.text import format_number
    from core.scoring.metrics import BY_NAME

    smallest = min((value for value in values if value == value), default=0.0)
    exponent = 3 if not BY_NAME[metric].higher_is_better and 0 < smallest < 0.1 else 0
    cells = []
    for value, rank in zip(values, ranks, strict=True):
        scaled = value * 10**exponent
        places = max(0, decimals - sum(abs(scaled) >= limit for limit in (10, 100, 1000)))
        style = "bold green" if rank == 1 else "" if calibrated else "dim"
        cells.append(Text(("*" if rank == 1 else "") + format_number(scaled, places), style=style))
    head = [*_abbreviate(metric), *(["10⁻³"] if exponent else []), "●" if calibrated else "○"]
    return Column(head, cells, 1 in ranks, calibrated)


def _abbreviate(metric: str) -> list[str]:
    """Abbreviate a metric's name to short lines: weighted_r2_deltactrl is wR² over Δctrl."""
    parts = metric.split("_")
    weighted = parts[0] == "weighted" and len(parts) > 1
    words = [_WORDS.get(part, part) for part in parts[weighted:]]
    return [("w" if weighted else "") + words[0], *words[1:]]


def _width(columns: list[Column]) -> int:
    """Count the characters that the columns take, each with a space before it."""
    return sum(1 + max([*map(len, column.head), *map(len, column.cells)]) for column in columns)


def _split_to_fit(columns: list[Column], room: int) -> list[list[Column]]:
    """Split the columns into as many groups as needed to fit; a single column that is too wide is a group alone."""
    groups: list[list[Column]] = []
    for column in columns:
        if groups and _width([*groups[-1], column]) <= room:
            groups[-1].append(column)
        else:
            groups.append([column])
    return groups


def _make_table(columns: list[Column], names: list[str], groups: list[str]) -> Table:
    """Lay out one table; gaps between models, positive and negative controls, and models of too little coverage."""
    table = start_table("", padding=0)
    height = max(len(column.head) for column in columns)
    for column in columns:
        lines = [*column.head[:-1], *[""] * (height - len(column.head)), column.head[-1]]
        head = Text("\n".join(lines), style="bold" if column.calibrated else "dim", justify="right")
        table.add_column(head, justify="right", no_wrap=True)
    following = [*groups[1:], *groups[-1:]]
    for name, group, after, *cells in zip(names, groups, following, *(column.cells for column in columns), strict=True):
        table.add_row(Text(name), *cells, end_section=group != after)
    return table


def _make_legend(columns: list[Column], models: bool) -> Text:
    from core.scoring import leaderboard

    marks = ["● calibrated: ranked, * the best"] if any(c.calibrated for c in columns) else []
    marks += ["○ not calibrated: shown, not ranked"] if not all(c.calibrated for c in columns) else []
    words = {word for column in columns for word in column.head}
    if any(word.startswith("w") for word in words):
        words.add("w")
    used = [text for word, text in _LEGEND.items() if word in words]
    marks += ["– no value", f"(%) coverage below {leaderboard.COVERAGE:.0%}: own conditions, not ranked"]
    if models and any(column.calibrated and not column.has_best for column in columns):
        marks += [f"no *: fewer than two models have values for {leaderboard.COVERAGE:.0%} of the conditions"]
    return Text("   ".join(marks) + "\n" + "; ".join(used), style="dim")
