"""What the key of each kind of artifact hangs on: the modules that the stage behind it can reach, and no other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from blocks.config.paths import PROJECT_ROOT
from blocks.store.code import code_hash, import_closure

H5AD = {"core.conditions", "core.errors", "core.io", "core.io.h5ad"}
PANELS = {"core.arrays", "core.io", "core.io.panels"}
SPLITS = {"core.conditions", "core.errors", "core.prepare", "core.prepare.splits", "core.rng"}
REFERENCE_FILES = {"core.arrays", "core.reference", "core.reference.files", *H5AD}
EXPRESSION = {"core.stats", "core.stats.differential_expression", "core.stats.moments", *PANELS}
BOOTSTRAP = {"core.arrays", "core.rng", "core.stats", "core.stats.bootstrap"}
PREDICTIONS = {"core.scoring", "core.scoring.files", *REFERENCE_FILES}
EMBEDDINGS = {"core.arrays", "core.embeddings", "core.errors", "core.prepare", "core.prepare.files"}
FIGURES = ("", ".conditions", ".dynamic_range", ".edistance", ".headroom", ".per_condition", ".style")

# Stage -> the modules that it reaches, beside itself and core, which they all do.
REACHES: dict[str, set[str]] = {
    "core.simulate": {"core.conditions", "core.errors", "core.rng"},
    "core.prepare.cells": {
        *(f"core.prepare.{name}" for name in ("files", "genes", "labels", "mirror", "plan", "settings")),
        *("core.entry", "core.io.external_sort", "core.io.faults", "core.io.raw_matrix", "core.progress"),
        *SPLITS,
        *H5AD,
        *PANELS,
    },
    "core.prepare.training_data": {"core.prepare", "core.prepare.files", *H5AD, *PANELS},
    "core.reference.build": {
        *(f"core.reference.{name}" for name in ("cell_sums", "control_profiles", "linear_baseline")),
        "core.progress",
        *REFERENCE_FILES,
        *SPLITS,
        *EXPRESSION,
    },
    "core.reference.quality": {
        *("core.conditions", "core.progress", "core.reference", "core.reference.quality_files"),
        *("core.stats", "core.stats.edistance", "core.stats.moments"),
        *PANELS,
    },
    "core.embeddings.tables": EMBEDDINGS,
    "core.embeddings.gene_graph": {"core.embeddings.tables", *EMBEDDINGS},
    "core.embeddings.gene_texts": {"core.embeddings", "core.errors"},
    "core.scoring.predictions": PREDICTIONS,
    "core.scoring.scores": {
        *("core.reference.controls", "core.scoring.evaluation", "core.scoring.metrics", "core.scoring.predictions"),
        *PREDICTIONS,
        *EXPRESSION,
    },
    "core.scoring.calibration": {"core.scoring", "core.scoring.metrics", *BOOTSTRAP},
    "core.report.results": {
        *(
            "core.conditions",
            "core.errors",
            "core.reference",
            "core.reference.controls",
            "core.reference.quality_files",
        ),
        *(f"core.report.{name}" for name in ("files", "headline", "page", "sections", "tables", "text")),
        *("core.report", "core.scoring"),
        *(f"core.report.figures{name}" for name in FIGURES),
        *(f"core.scoring.{name}" for name in ("calibration", "comparison", "files", "leaderboard", "metrics")),
        *BOOTSTRAP,
    },
}


def test_the_table_has_every_stage() -> None:
    calls = [re.findall(r'"(core\.[a-z_.]+)"', file.read_text()) for file in (PROJECT_ROOT / "tasks").glob("*.py")]
    assert set(REACHES) == {module for found in calls for module in found}


@pytest.mark.parametrize("stage", REACHES)
def test_a_stage_reaches_these_modules(stage: str) -> None:
    assert set(import_closure(stage)) - {"core", stage} == REACHES[stage]


def test_a_comment_in_the_catalog_changes_no_key(tmp_path: Path) -> None:
    shutil.copytree(PROJECT_ROOT / "core", tmp_path / "core", ignore=shutil.ignore_patterns("__pycache__"))
    before = {stage: code_hash(stage, tmp_path) for stage in REACHES}
    for file in (tmp_path / "core" / "catalog").glob("*.py"):
        with file.open("a", encoding="utf-8") as source:
            source.write("# a comment\n")
    assert {stage: code_hash(stage, tmp_path) for stage in REACHES} == before
    with (tmp_path / "core" / "__init__.py").open("a", encoding="utf-8") as source:
        source.write("# a comment\n")
    assert all(code_hash(stage, tmp_path) != before[stage] for stage in REACHES)
