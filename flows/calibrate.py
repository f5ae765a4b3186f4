"""The calibration of the metrics on one data set, without any model."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.parameters import Dataset, Origin, Sources
from tasks.inputs import check_sources, chosen_dataset
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
def calibrate(
    dataset: Dataset = "demo",
    origin: Origin = "raw",
    sources: Sources = {},  # noqa: B006 - shown in the form of the UI, never changed
) -> Path:
    """Measure which metrics can tell a replicate from an uninformative average on a data set.

    dataset: a name of the catalog, or the path of your own YAML entry.
    origin: the authors' raw file, or the preprocessed mirror. A file in `sources` comes before either.
    sources: files to use, by data set.
    Returns the folder of calibration.parquet in the store.
    """
    spec = chosen_dataset(dataset, origin=origin)
    check_sources([spec], sources)
    raw = fetch_source(spec, sources)
    reference = build_reference(spec, prepare_cells(spec, raw))
    calibration = calibrate_metrics(spec, score_controls(spec, reference))
    record_calibration(spec, calibration, described(spec, raw))
    return calibration
