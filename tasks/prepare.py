"""Tasks from a raw file to all that scoring needs: cells, reference, quality. Each returns its artifact's folder."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.config.settings import read_settings
from blocks.store.code import code_hash
from core.catalog.schema import DatasetSpec
from core.prepare.settings import PreparationSettings
from tasks.artifacts import Recipe, build_or_get, checksum_file

# Of a catalog entry, what decides how the cells are made; the rest describes the data.
DECIDING = set(PreparationSettings.model_fields) - {"expected"}


@task(name="prepare-cells", cache_policy=NO_CACHE)
def prepare_cells(spec: DatasetSpec, raw: Path) -> Path:
    """Write cells.h5ad of a data set from the published file `raw`. Raises UserError if it cannot be used."""
    from core.prepare.cells import write_cells

    memory = int(read_settings().memory_gb * 1e9)
    entry = spec.model_dump(mode="json", include=DECIDING)
    source, code = checksum_file(raw), code_hash("core.prepare.cells")
    provenance = {"entry": entry, "source sha256": source, "code": code}
    recipe = Recipe("cells", {"raw": source}, {"entry": entry}, code)
    return build_or_get(recipe, lambda folder: write_cells(raw, spec, provenance, folder, memory))


@task(name="build-reference", cache_policy=NO_CACHE)
def build_reference(spec: DatasetSpec, cells: Path) -> Path:
    """Write reference.h5ad, negatives.h5ad and half_splits/: truth and controls of every test condition."""
    from core.prepare.cells import read_cells
    from core.reference.build import write_reference

    parameters = {"seed": spec.seed, "half_seeds": spec.half_seeds}
    recipe = Recipe("reference", {"cells": cells}, parameters, code_hash("core.reference.build"))
    return build_or_get(recipe, lambda folder: write_reference(read_cells(cells), spec.seed, spec.half_seeds, folder))


@task(name="measure-quality", cache_policy=NO_CACHE)
def measure_quality(cells: Path, reference: Path) -> Path:
    """Write quality.parquet and edistance.parquet: cells, DEGs and E-distances of every condition."""
    from core.prepare.cells import read_cells
    from core.reference.files import read_keys
    from core.reference.quality import write_quality

    recipe = Recipe("quality", {"cells": cells, "reference": reference}, {}, code_hash("core.reference.quality"))
    return build_or_get(recipe, lambda folder: write_quality(read_cells(cells), read_keys(reference), folder))


def list_test_conditions(reference: Path) -> dict[int, list[dict[str, str]]]:
    """Return fold -> covariate and condition of each of its test conditions, sorted."""
    from core.reference.files import read_keys

    keys = read_keys(reference)
    tested = keys[keys["test_fold"] >= 0]
    return {
        int(fold): rows[["covariate", "condition"]].to_dict(orient="records")
        for fold, rows in tested.groupby("test_fold", sort=True)
    }


def list_perturbed_genes(reference: Path) -> list[str]:
    """Return the genes of all perturbed conditions, sorted."""
    from core.conditions import genes_of
    from core.reference.files import read_keys

    return sorted({gene for condition in read_keys(reference)["condition"] for gene in genes_of(condition)})
