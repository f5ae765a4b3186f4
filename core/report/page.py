"""The report of one data set: a page that needs no other file, and its figures as files beside it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from core.report import sections, tables
from core.report.figures.conditions import draw_conditions
from core.report.figures.dynamic_range import draw_dynamic_range
from core.report.figures.edistance import draw_edistance
from core.report.figures.headroom import draw_headroom
from core.report.figures.per_condition import draw_per_condition
from core.report.figures.style import STRATUM_LABELS, render_figure
from core.report.files import FIGURES
from core.report.headline import compose_headline
from core.report.text import format_share, spell_name
from core.scoring.calibration import FEWEST_CONDITIONS, THRESHOLD
from core.scoring.leaderboard import COVERAGE
from core.scoring.metrics import BY_NAME

_TASKS = {"single": "single-gene perturbations", "combination": "combinations of perturbations"}
_STRATA = STRATUM_LABELS | {"0": "0 DEGs"}


class Dataset(NamedTuple):
    """What the report says about a data set.

    Attributes
    ----------
    name
        Its name in the catalog.
    title
        The headline of the page.
    task
        `single` or `combination`.
    citation, licence
        Of the data; None: not shown.
    """

    name: str
    title: str
    task: str
    citation: str | None
    licence: str | None


class Picture(NamedTuple):
    """A figure within the page."""

    uri: str
    alt: str


def write_report(
    path: Path,
    *,
    dataset: Dataset,
    provenance: Mapping[str, str],
    quality: pd.DataFrame,
    edistance: Mapping[str, pd.DataFrame],
    calibration: pd.DataFrame,
    leaderboard: pd.DataFrame,
    comparison: pd.DataFrame,
    scores: pd.DataFrame,
    declared: list[str],
    unpredicted: pd.DataFrame,
) -> None:
    """Write the page and a folder `figures` next to it (each figure as SVG and PNG).

    The page needs no other file, no network and no JavaScript. The same tables give the same bytes. NaN in any of them
    is shown as a dash. Tables without rows are allowed: the page then says what is missing.

    Parameters
    ----------
    path
        Of the page.
    dataset
        What it is about.
    provenance
        What the result was made from, in the order of display.
    quality
        One row per (covariate, condition): n_cells, n_degs, edistance_to_control; may hold `control`.
    edistance
        By covariate, square tables of all conditions including control.
    calibration
        metric, variant, positive, negative, n_conditions, nan_share, drf..., bds..., verdict (docs/science.md,
        section 5).
    leaderboard
        Long table model, kind, metric, mean, headroom..., rank, calibrated, in_panel; controls included.
    comparison
        Long table model, control, metric, stratum, n, mean_difference, ... (docs/science.md, section 6).
    scores
        model, covariate, condition, fold, seed, half_seed, metric, value; wmse is drawn per condition.
    declared
        Sentences on what models share by design.
    unpredicted
        model, covariate, condition, reason.
    """
    ratios = tables.compute_wmse_ratios(scores, leaderboard, quality)
    figures = _draw_figures(quality, edistance, calibration, leaderboard, ratios)
    pictures = _save_figures(figures, path.parent / FIGURES)
    outcomes = tables.tabulate_outcomes(comparison, calibration)
    shown = [model for model in tables.list_entries(leaderboard)["model"] if model in outcomes.index]
    page = _load_template().render(
        dataset=dataset,
        task=_TASKS.get(dataset.task, dataset.task),
        facts=sections.list_facts(quality, leaderboard, scores),
        pictures=pictures,
        headline=compose_headline(dataset.name, calibration, leaderboard, comparison),
        outcomes=outcomes.reindex(shown).to_dict("index"),
        board=sections.show_leaderboard(leaderboard),
        headroom=sections.show_headroom(leaderboard),
        calibration=sections.show_calibration(calibration),
        extremes=sections.show_extremes(ratios),
        wmse_calibrated="wmse" in tables.list_ranked_metrics(leaderboard),
        comparison=sections.show_comparison(comparison, calibration, leaderboard),
        strata=_STRATA,
        quality=sections.show_quality(quality),
        covariates=list(quality["covariate"].unique()),
        edistances=[name for name in pictures if name.startswith("edistance")],
        reasons=tables.list_records(tables.group_reasons(unpredicted)),
        declared=declared,
        provenance=provenance,
        definitions=[BY_NAME[metric] for metric in calibration["metric"].unique()],
        threshold=THRESHOLD,
        fewest=FEWEST_CONDITIONS,
        coverage_limit=format_share(COVERAGE),
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"breakable": _allow_breaks, "share": format_share, "words": spell_name}
    return environment.get_template("page.html")


def _allow_breaks(name: str) -> Markup:
    """Allow a name to break after its underscores."""
    return Markup(str(escape(name)).replace("_", "_<wbr>"))  # noqa: S704


def _draw_figures(
    quality: pd.DataFrame,
    edistance: Mapping[str, pd.DataFrame],
    calibration: pd.DataFrame,
    leaderboard: pd.DataFrame,
    ratios: pd.DataFrame,
) -> dict[str, tuple[Figure, str]]:
    """Draw the figures for which there are data, by file name, each with its description."""
    figures = {}
    if len(calibration):
        alt = "Mean Dynamic Range Fraction and Bound Discrimination Score of each metric with 95 % intervals"
        figures["dynamic_range"] = (draw_dynamic_range(calibration), alt)
    if tables.list_ranked_metrics(leaderboard) and tables.list_panel_models(leaderboard):
        alt = "Headroom of each model on each calibrated metric with 95 % intervals"
        figures["headroom"] = (draw_headroom(leaderboard), alt)
    if len(ratios):
        alt = "wMSE of each model relative to the dataset mean, per condition, by number of DEGs"
        figures["per_condition"] = (draw_per_condition(ratios), alt)
    if len(tables.drop_control(quality)):
        alt = "Cells per condition, DEGs per condition, and E-distance to control against DEGs"
        figures["conditions"] = (draw_conditions(quality), alt)
    for index, (covariate, matrix) in enumerate(edistance.items(), start=1):
        # A covariate's name may hold characters that a file name cannot.
        name = f"edistance_{index}" if len(edistance) > 1 else "edistance"
        figures[name] = (draw_edistance(matrix), f"Pairwise E-distances between conditions, {covariate}")
    return figures


def _save_figures(figures: Mapping[str, tuple[Figure, str]], folder: Path) -> dict[str, Picture]:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, (figure, alt) in figures.items():
        images = {kind: render_figure(figure, kind) for kind in ("svg", "png")}
        for kind, image in images.items():
            (folder / f"{name}.{kind}").write_bytes(image)
        pictures[name] = Picture("data:image/svg+xml;base64," + b64encode(images["svg"]).decode(), alt)
    return pictures
