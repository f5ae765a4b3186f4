"""The preparation of one data set: cells, reference, quality."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.parameters import Dataset, Origin, Sources
from flows.steps import prepare_screen
from tasks.preflight import check_run
from tasks.prepare import measure_quality


@flow(name="prepare", flow_run_name="prepare-{dataset}")
def prepare(dataset: Dataset = "demo", origin: Origin = "raw", sources: Sources = {}) -> dict[str, Path]:
    """Prepare a data set up to the reference that scoring needs.

    dataset: a name of the catalog, or the path of your own YAML entry.
    origin: the authors' raw file, or the preprocessed mirror. A file in `sources` comes before either.
    sources: files to use, by data set.
    Returns the folders of cells.h5ad, reference.h5ad and quality.parquet in the store.
    """
    screen = prepare_screen(check_run(dataset, [], None, origin, sources))
    quality = measure_quality(screen.cells, screen.reference)
    return {"cells": screen.cells, "reference": screen.reference, "quality": quality}
