"""Tasks at the end of a benchmark: the folder of results, and its copy in the folder of reports."""

from __future__ import annotations

import shutil
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.config.paths import reports_folder
from blocks.local.files import lock_file
from blocks.local.scratch import scratch
from blocks.store.code import code_hash
from core.catalog.schema import DatasetSpec
from core.report.files import REPORT
from core.scoring.files import SCORES
from tasks.artifacts import Recipe, build_or_get, key_of


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


@task(name="make-results", cache_policy=NO_CACHE)
def make_results(
    spec: DatasetSpec, source: str, scores: list[Path], calibration: Path, quality: Path, benchmark_id: str
) -> Path:
    """Write tables, report.html and figures of a benchmark (`docs/outputs.md`); the artifact's folder.

    source: where the data come from, for the report. scores: of the controls, then of the models.
    """
    import pandas as pd

    def build(folder: Path) -> None:
        # Imported only here: it takes seconds, and mostly the results are in the store.
        from core.report.page import Dataset
        from core.report.results import write_results

        dataset = Dataset(spec.name, spec.title, spec.task, spec.citation, spec.licence)
        write_results(dataset, spec.seed, scores, calibration, quality, provenance, folder)

    provenance = {
        "data set": spec.name,
        "source": source,
        "benchmark": benchmark_id,
        "data seed": str(spec.seed),
        # Those of the cells: a preprocessed mirror brings its own.
        "folds": str(pd.read_parquet(scores[0] / SCORES, columns=["fold"])["fold"].nunique()),
        "half splits": str(spec.half_seeds),
        "calibration": key_of(calibration),
        "quality": key_of(quality),
        "scores": ", ".join(key_of(path) for path in scores),
    }
    inputs = {"calibration": calibration, "quality": quality}
    inputs |= {f"scores_{position}": path for position, path in enumerate(scores)}
    parameters = {"provenance": provenance, "entry": spec.model_dump(mode="json")}
    return build_or_get(Recipe("results", inputs, parameters, code_hash("core.report.results")), build)


@task(name="publish-results", cache_policy=NO_CACHE)
def publish_results(name: str, results: Path) -> Path:
    """Copy the results to the data folder's reports/<name>, in place of earlier ones; the path of report.html there."""
    target = reports_folder(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two runs of one data set may end at once: one after the other puts its copy there, whole.
    lock = lock_file(target.with_name(f".{name}.lock"), f"another run publishes the results of {name}")
    with lock, scratch(target.parent, ".publishing") as temporary:
        fresh = shutil.copytree(results, temporary / "new", copy_function=shutil.copyfile)
        if target.exists():
            target.rename(temporary / "old")
        fresh.rename(target)
    return target / REPORT
