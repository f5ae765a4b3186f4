"""The report of one data set: a page that stands alone, and its figures as files beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from core.report import tables as views
from core.report.figures import conditions, dynamic_range, edistance, headroom, per_condition, style
from core.report.files import FIGURES
from core.scoring.calibration import FEWEST_CONDITIONS, THRESHOLD
from core.scoring.leaderboard import COVERAGE, RANKED
from core.scoring.metrics import BY_NAME

_TASKS = {"single": "single-gene perturbations", "combination": "combinations of perturbations"}
_HEADINGS = {
    "model": "Models and baselines",
    "baseline": "Models and baselines",
    "positive control": "Positive controls",
    "negative control": "Negative controls",
}
_STRATA = {"0": "0 DEGs", "1-9": "1–9", "10-99": "10–99", ">=100": "≥ 100"}


class Dataset(Protocol):
    """What the report says about a data set; a catalog entry has all of it."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def citation(self) -> str | None: ...
    @property
    def licence(self) -> str | None: ...


class Cell(NamedTuple):
    """One number of a table: its text, its rank, a smaller line beneath, and whether to set it bold."""

    text: str
    rank: str = ""
    note: str = ""
    bold: bool = False


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
    """Write the page `path` and a folder `figures` next to it (each figure as SVG and PNG).

    The page needs no other file, no network and no JavaScript. The same tables give the same bytes.

    dataset:     name, title, task, citation and licence (a catalog entry).
    provenance:  what the result was made from, in the order of display.
    quality:     one row per (covariate, condition): n_cells, n_degs, edistance_to_control; may hold `control`.
    edistance:   by covariate, square tables of all conditions including control.
    calibration: metric, variant, positive, negative, n_conditions, nan_share, drf..., bds..., verdict (section 5 of
                 docs/science.md).
    leaderboard: long table model, kind, metric, mean, headroom..., rank, calibrated, in_panel; controls included.
    comparison:  long table model, control, metric, stratum, n, mean_difference, ... (section 6).
    scores:      model, covariate, condition, fold, seed, half_seed, metric, value; wmse is drawn per condition.
    declared:    sentences on what models share by design.
    unpredicted: model, covariate, condition, reason.
    NaN in any of them is shown as a dash. Tables without rows are fine: the page then says what is missing.
    """
    ratios = views.wmse_ratios(scores, leaderboard, quality)
    figures = _figures(quality, edistance, calibration, leaderboard, ratios)
    folder = path.parent / FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, (figure, alt) in figures.items():
        image = style.svg(figure)
        (folder / f"{name}.svg").write_bytes(image)
        (folder / f"{name}.png").write_bytes(style.png(figure))
        pictures[name] = Picture(style.data_uri(image), alt)

    outcomes = views.outcomes(comparison, calibration)
    outcomes = outcomes.reindex([model for model in views.entries(leaderboard)["model"] if model in outcomes.index])
    metrics = list(calibration["metric"].unique())
    page = _template().render(
        dataset=dataset,
        task=_TASKS.get(dataset.task, dataset.task),
        facts=_facts(quality, leaderboard, scores),
        pictures=pictures,
        headline=views.headline(dataset.name, calibration, leaderboard, comparison),
        outcomes=outcomes.to_dict("index"),
        board=_board(leaderboard),
        headroom=_headroom(leaderboard),
        calibration=_calibration(calibration),
        extremes=_extremes(ratios),
        wmse_calibrated="wmse" in views.ranked_metrics(leaderboard),
        comparison=_comparison(comparison, calibration, leaderboard),
        strata=_STRATA,
        quality=_quality(quality),
        covariates=list(quality["covariate"].unique()),
        edistances=[name for name in pictures if name.startswith("edistance")],
        reasons=views.records(views.reasons(unpredicted)),
        declared=declared,
        provenance=provenance,
        definitions=[BY_NAME[metric] for metric in metrics],
        threshold=THRESHOLD,
        fewest=FEWEST_CONDITIONS,
        coverage_limit=views.share(COVERAGE),
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"breakable": _breakable, "share": views.share, "worded": views.worded}
    return environment.get_template("page.html")


def _breakable(name: str) -> Markup:
    """A name that may break after its underscores."""
    return Markup(str(escape(name)).replace("_", "_<wbr>"))  # noqa: S704


def _figures(
    quality: pd.DataFrame,
    matrices: Mapping[str, pd.DataFrame],
    calibration: pd.DataFrame,
    leaderboard: pd.DataFrame,
    ratios: pd.DataFrame,
) -> dict[str, tuple[Figure, str]]:
    """The figures for which there are data, by file name, each with its description."""
    figures = {}
    if len(calibration):
        alt = "Mean Dynamic Range Fraction and Bound Discrimination Score of each metric with 95 % intervals"
        figures["dynamic_range"] = (dynamic_range.dynamic_range(calibration), alt)
    if views.ranked_metrics(leaderboard) and views.panel_models(leaderboard):
        alt = "Headroom of each model on each calibrated metric with 95 % intervals"
        figures["headroom"] = (headroom.headroom(leaderboard), alt)
    if len(ratios):
        alt = "wMSE of each model relative to the dataset mean, per condition, by number of DEGs"
        figures["per_condition"] = (per_condition.per_condition(ratios), alt)
    if len(views.perturbed(quality)):
        alt = "Cells per condition, DEGs per condition, and E-distance to control against DEGs"
        figures["conditions"] = (conditions.conditions(quality), alt)
    several = len(matrices) > 1
    for index, (covariate, matrix) in enumerate(matrices.items(), start=1):
        # A covariate's name may hold what no file name can.
        name = f"edistance_{index}" if several else "edistance"
        alt = f"Pairwise E-distances between conditions, {covariate}"
        figures[name] = (edistance.edistance(matrix), alt)
    return figures


def _facts(quality: pd.DataFrame, leaderboard: pd.DataFrame, scores: pd.DataFrame) -> list[str]:
    """The size of the benchmark in a few words."""
    kinds = views.entries(leaderboard)["kind"]
    facts = [views.counted(len(views.perturbed(quality)), "condition")]
    tested = len(scores[["covariate", "condition"]].drop_duplicates())
    if tested < len(views.perturbed(quality)):
        facts.append(f"{tested:,} of them tested")
    if quality["covariate"].nunique() > 1:
        facts.append(views.counted(quality["covariate"].nunique(), "covariate"))
    models = int((kinds == "model").sum())
    facts.append(views.counted(models, "model") if models else "controls alone")
    return facts


def _board(leaderboard: pd.DataFrame) -> dict[str, Any]:
    """The leaderboard for display: column heads and groups of rows of cells."""
    metrics = views.ordered_metrics(leaderboard)
    calibrated = views.ranked_metrics(leaderboard)
    n = leaderboard.groupby("metric")["n_conditions"].max().to_dict()
    # What all lack, for want of DEGs for example, is said once in the head.
    lacking = leaderboard.groupby("metric")["nan_share"].min().to_dict()
    places = {str(name): _places(str(name), part["mean"]) for name, part in leaderboard.groupby("metric")}

    def cell(entry: Mapping[str, Any]) -> Cell:
        rank, lost = entry["rank"], entry["nan_share"]
        return Cell(
            views.number(entry["mean"], places[entry["metric"]]),
            "" if np.isnan(rank) else f"{rank:.0f}",
            f"{views.share(lost)} NaN" if lacking[entry["metric"]] < lost < 1 else "",
            bool(rank == 1),
        )

    heads = [
        {
            "metric": metric,
            "calibrated": metric in calibrated,
            "arrow": "↑" if BY_NAME[metric].higher_is_better else "↓",
            "n": f"{n[metric]:,.0f}",
            "nan": f"{views.share(lacking[metric])} NaN" if lacking[metric] > 0 else "",
        }
        for metric in metrics
    ]
    return {
        "heads": heads,
        "n_calibrated": len(calibrated),
        "ranked": bool(leaderboard["rank"].notna().any()),
        "groups": _groups(leaderboard, metrics, cell),
    }


def _places(metric: str, values: pd.Series[float]) -> int:
    """Decimals of a column: an error, which may span decades, needs as many as its smallest value."""
    return views.decimals(values if BY_NAME[metric].higher_is_better else values.nsmallest(1))


def _headroom(leaderboard: pd.DataFrame) -> dict[str, Any]:
    """Headroom of models and baselines with intervals on the calibrated metrics, in the leaderboard's rows."""
    metrics = views.ranked_metrics(leaderboard)
    predictors = leaderboard[leaderboard["kind"].isin(RANKED)]
    return {"metrics": metrics, "groups": _groups(predictors, metrics, lambda entry: _interval(entry, "headroom"))}


def _groups(
    leaderboard: pd.DataFrame, metrics: list[str], cell: Callable[[Mapping[str, Any]], Cell]
) -> list[dict[str, Any]]:
    """Rows of the leaderboard under headings: predictors, controls, and predictors of too little coverage."""
    below = f"Coverage below {views.share(COVERAGE)}: on their own conditions, not ranked"
    known = {(entry["model"], entry["metric"]): entry for entry in views.records(leaderboard)}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in views.records(views.entries(leaderboard)):
        heading = _HEADINGS[row["kind"]] if row["in_panel"] or row["kind"] not in RANKED else below
        cells = [cell(known[row["model"], metric]) for metric in metrics]
        groups.setdefault(heading, []).append(row | {"cells": cells})
    return [{"heading": heading, "rows": rows} for heading, rows in groups.items()]


def _interval(entry: Mapping[str, Any], value: str) -> Cell:
    """A number of order 1, its standard deviation over half splits where known, and its 95 % interval beneath.

    entry holds `value`, `<value>_low`, `<value>_high` and perhaps `<value>_half_sd`.
    """
    mean, sd = entry[value], entry.get(f"{value}_half_sd", np.nan)
    if np.isnan(mean):
        return Cell(views.DASH)
    spread = "" if np.isnan(sd) else f" ± {views.number(sd, 2)}"
    low, high = (views.number(entry[f"{value}_{end}"], 2) for end in ("low", "high"))
    return Cell(views.number(mean, 2) + spread, note=f"[{low}, {high}]")


def _calibration(calibration: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per metric: verdict, usable conditions, controls and their values, DRF in three variants, BDS."""
    variants = views.variants(calibration)
    rows = []
    for entry in views.records(views.verdicts(calibration).merge(variants, left_on="metric", right_index=True)):
        controls = [entry["positive_value"], entry["negative_value"]]
        places = _places(entry["metric"], pd.Series(controls, dtype=float))
        quoted, *others = views.VARIANT_NAMES
        rows.append(
            entry
            | {name: _interval(entry, name) for name in (*others, "bds")}
            | {quoted: _interval(entry, "drf")}
            | {name: views.number(entry[name], places) for name in ("positive_value", "negative_value")}
            | {"nan_share": views.share(entry["nan_share"])}
        )
    return rows


def _extremes(ratios: pd.DataFrame) -> list[dict[str, Any]]:
    """Per model the conditions with the largest gain and the largest loss, as texts."""
    several = ratios["covariate"].nunique() > 1

    def texts(table: pd.DataFrame) -> list[str]:
        return [
            " in ".join([row["condition"], row["covariate"]][: 1 + several])
            + f" (×\u202f{views.number(row['ratio'], 2)}, {views.number(row['n_degs'], 0)} DEGs)"
            for row in views.records(table)
        ]

    return [
        {"model": row["model"], "won": texts(row["won"]), "lost": texts(row["lost"])}
        for row in views.records(views.extremes(ratios))
    ]


def _comparison(
    comparison: pd.DataFrame, calibration: pd.DataFrame, leaderboard: pd.DataFrame
) -> dict[str, list[dict[str, Any]]]:
    """The tests by model: those that bear on the question, and the rest.

    The former are by calibrated metrics, against the metric's own negative control and against baselines.
    """
    table = views.strata_columns(comparison)
    quoted = views.verdicts(calibration).set_index("metric")
    calibrated = table["metric"].isin(quoted.index[quoted["verdict"] == "calibrated"])
    kinds = leaderboard.drop_duplicates("model").set_index("model")["kind"]
    own = table["control"] == table["metric"].map(quoted["negative"])
    baseline = table["control"].map(kinds) == "baseline"
    metric_place = {metric: i for i, metric in enumerate(views.ordered_metrics(leaderboard))}
    model_place = {model: i for i, model in enumerate(views.entries(leaderboard)["model"])}
    largest = table.assign(largest=table[["low", "high"]].abs().max(axis=1))
    places = {metric: views.decimals(part["largest"]) for metric, part in largest.groupby("metric", sort=False)}

    def rows(part: pd.DataFrame) -> list[dict[str, Any]]:
        part = part.assign(
            model_place=part["model"].map(model_place),
            metric_place=part["metric"].map(metric_place),
            # The metric's own negative control first, in the order of metrics whichever it is; others by name.
            other=part["control"].mask(part["control"] == part["metric"].map(quoted["negative"]), ""),
        ).sort_values(["model_place", "other", "metric_place"], kind="stable")
        return [
            {"model": model, "rows": [_test(entry, places[entry["metric"]]) for entry in views.records(group)]}
            for model, group in part.groupby("model", sort=False)
        ]

    main = calibrated & (own | baseline)
    return {"main": rows(table[main]), "rest": rows(table[~main])}


def _test(entry: Mapping[str, Any], places: int) -> dict[str, Any]:
    """One row of the comparison as texts."""
    low, high = entry["low"], entry["high"]
    difference = views.number(entry["mean_difference"], places)
    interval = "" if np.isnan(low) else f"[{views.number(low, places)}, {views.number(high, places)}]"
    return {
        "metric": entry["metric"],
        "control": entry["control"],
        "n": f"{entry['n']:,.0f}",
        "difference": Cell(difference, note=interval, bold=low > 0),
        "t": _p(entry["t_holm"]),
        "wilcoxon": _p(entry["wilcoxon_holm"]),
        "detectable": views.number(entry["detectable_difference"], places),
        "strata": [
            Cell(
                views.number(entry[f"difference_{name}"], places),
                note=f"n = {entry[f'n_{name}']:,.0f}" if entry[f"n_{name}"] > 0 else "",
                bold=entry[f"low_{name}"] > 0,
            )
            for name in views.STRATUM_NAMES
        ],
    }


def _p(value: float) -> str:
    if np.isnan(value):
        return views.DASH
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def _quality(quality: pd.DataFrame) -> list[dict[str, str]]:
    """The summary numbers of data set quality as texts, one row per covariate."""
    return [
        {
            "covariate": str(row["covariate"]),
            "conditions": f"{row['conditions']:,}",
            "cells": f"{row['cells']:,.0f}",
            "mean_cells": views.number(row["mean_cells"], 1),
            "cv_cells": views.number(row["cv_cells"], 2),
            "mean_degs": views.number(row["mean_degs"], 1),
            "cv_degs": views.number(row["cv_degs"], 2),
            "without_degs": views.share(row["without_degs"]),
            "median_edistance": views.number(row["median_edistance"], 2),
        }
        for row in views.records(views.quality_summary(quality))
    ]
