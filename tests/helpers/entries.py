"""Entries of the catalog: the data sets of the study, and one of a user's own."""

from __future__ import annotations

STUDY = [
    "adamson16",
    "frangieh21",
    "kaden25fibroblast",
    "kaden25rpe1",
    "nadig25hepg2",
    "nadig25jurkat",
    "norman19",
    "replogle22k562",
    "replogle22k562gwps",
    "replogle22rpe1",
    "sunshine23",
    "tian21crispra",
    "tian21crispri",
    "wessels23",
]
MINE = {
    "name": "mine",
    "title": "my screen",
    "task": "single",
    "source": {"kind": "local", "hint": "mine.h5ad"},
    "labels": {"column": "guide", "control": ["NT"]},
}
