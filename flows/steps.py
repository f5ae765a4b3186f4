"""The steps that flows share: from a checked run to a calibrated data set, and from scores to a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from core.catalog.schema import DatasetSpec
from tasks.preflight import Run
from tasks.prepare import build_reference, prepare_cells
from tasks.record import Runs, end_runs_on_error, record_calibration, record_results, show_results
from tasks.score import calibrate_metrics, make_results, publish_results, score_controls
from tasks.sources import describe_source, fetch_source


def end_with(*hooks: Callable[[Any, Any, Any], None]) -> dict[str, Any]:
    """Return the options of a flow of which `hooks` end what it left running, when it is cancelled or has crashed."""
    return {"on_cancellation": [*hooks], "on_crashed": [*hooks]}


class Screen(NamedTuple):
    """A data set that is ready to be scored. source: where its raw file comes from; the others: artifacts' folders."""

    spec: DatasetSpec
    source: str
    cells: Path
    reference: Path


def prepare_screen(run: Run) -> Screen:
    """Fetch the raw file of a run's data set and make its cells and its reference."""
    raw = fetch_source(run.spec, run.files.get(run.spec.name))
    cells = prepare_cells(run.spec, raw)
    reference = build_reference(run.spec, cells)
    return Screen(run.spec, describe_source(run.spec, raw), cells, reference)


def calibrate_screen(screen: Screen) -> tuple[Path, Path]:
    """Score the controls and calibrate the metrics; the artifacts' folders of both. MLflow keeps the calibration."""
    control_scores = score_controls(screen.spec, screen.reference)
    calibration = calibrate_metrics(screen.spec, control_scores)
    record_calibration(screen.spec, calibration, screen.source)
    return control_scores, calibration


def report_results(name: str, screen: Screen, scores: list[Path], calibration: Path, quality: Path, runs: Runs) -> Path:
    """Write tables, figures and the report to the folder of reports under this name, to MLflow and to Prefect.

    scores: of the controls, then of the models. Returns the folder.
    """
    with end_runs_on_error(*runs.models.values()):
        results = make_results(screen.spec, screen.source, scores, calibration, quality, runs.benchmark_id)
        record_results(runs, results)
    page = publish_results(name, results)
    show_results(screen.spec, runs, results, page)
    return page.parent
