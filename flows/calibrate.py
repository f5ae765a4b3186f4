"""The calibration of the metrics on one data set, without any model."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from core import catalog
from tasks.inputs import check_sources
from tasks.prepare import build_reference, prepare_cells
from tasks.record import end_interrupted, record_calibration
from tasks.score import calibrate_metrics, score_controls
from tasks.sources import described, fetch_source


@flow(
    name="calibrate",
    flow_run_name="calibrate-{dataset}",
    on_cancellation=[end_interrupted],
    on_crashed=[end_interrupted],
)
def calibrate(dataset: str = "demo", sources: dict[str, str] = {}) -> Path:  # noqa: B006
    """Measure which metrics can tell a replicate from an uninformative average on a data set.

    dataset: a name of the catalog, or the path of your own YAML entry.
    sources: files to use, by data set.
    Returns the folder of calibration.parquet in the store.
    """
    spec = catalog.dataset(dataset)
    check_sources([spec], sources)
    raw = fetch_source(spec, sources)
    reference = build_reference(spec, prepare_cells(spec, raw))
    calibration = calibrate_metrics(spec, score_controls(spec, reference))
    record_calibration(spec, calibration, described(spec, raw))
    return calibration
