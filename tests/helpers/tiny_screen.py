"""A screen of 12 knock-downs x 250 genes, and catalog entries of it: a benchmark of it takes seconds."""

from __future__ import annotations

from typing import Any

SETTINGS = {"seed": 7, "genes": 250, "singles": 12, "cells_per_condition": 40, "control_cells": 120}
# Of a user who has the file.
ENTRY: dict[str, Any] = {
    "name": "tiny",
    "title": "a simulated screen for tests",
    "task": "single",
    "source": {"kind": "local", "hint": "the file that the test wrote"},
    "labels": {"column": "perturbation", "control": ["control"]},
    "min_genes_per_cell": 20,
    "half_seeds": 2,
    "folds": 2,
}
# Of one whose flow simulates it.
SIMULATED = ENTRY | {"source": {"kind": "simulated", "settings": SETTINGS}}
