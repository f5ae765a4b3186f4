"""The calibration of the metrics on one data set, without any model."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.parameters import Dataset, Origin, Sources
from flows.steps import calibrate_screen, end_with, prepare_screen
from tasks.preflight import check_run
from tasks.record import end_interrupted


@flow(name="calibrate", flow_run_name="calibrate-{dataset}", **end_with(end_interrupted))
def calibrate(dataset: Dataset = "demo", origin: Origin = "raw", sources: Sources = {}) -> Path:
    """Measure which metrics can tell a replicate from an uninformative average on a data set.

    dataset: a name of the catalog, or the path of your own YAML entry.
    origin: the authors' raw file, or the preprocessed mirror. A file in `sources` comes before either.
    sources: files to use, by data set.
    Returns the folder of calibration.parquet in the store.
    """
    _, calibration = calibrate_screen(prepare_screen(check_run(dataset, [], None, origin, sources)))
    return calibration
