"""The preparation of one data set: cells, reference, quality."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.parameters import Dataset, Origin, Sources
from tasks.inputs import check_sources, chosen_dataset
from tasks.prepare import build_reference, measure_quality, prepare_cells
from tasks.sources import fetch_source


@flow(name="prepare", flow_run_name="prepare-{dataset}")
def prepare(
    dataset: Dataset = "demo",
    origin: Origin = "raw",
    sources: Sources = {},  # noqa: B006 - shown in the form of the UI, never changed
) -> dict[str, Path]:
    """Prepare a data set up to the reference that scoring needs.

    dataset: a name of the catalog, or the path of your own YAML entry.
    origin: the authors' raw file, or the preprocessed mirror. A file in `sources` comes before either.
    sources: files to use, by data set.
    Returns the folders of cells.h5ad, reference.h5ad and quality.parquet in the store.
    """
    spec = chosen_dataset(dataset, origin=origin)
    check_sources([spec], sources)
    raw = fetch_source(spec, sources)
    cells = prepare_cells(spec, raw)
    reference = build_reference(spec, cells)
    quality = measure_quality(cells, reference)
    return {"cells": cells, "reference": reference, "quality": quality}
