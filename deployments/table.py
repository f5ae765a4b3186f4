"""The table of deployments: one row for every flow and data set of the catalog, and one for the whole study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core import catalog
from tasks.inputs import study

POOL = "cpu"


@dataclass(frozen=True)
class Deployment:
    """One deployment. entrypoint: dotted path of the flow; parameters: what its runs start with."""

    flow: str
    name: str
    entrypoint: str
    pool: str
    parameters: dict[str, Any]
    tags: tuple[str, ...]
    description: str

    @property
    def full_name(self) -> str:
        """What follows `prefect deployment run`."""
        return f"{self.flow}/{self.name}"


# Flow of one data set, dotted path, what it does with it.
FLOWS = (
    ("benchmark", "flows.benchmark.benchmark", "Prepares, trains, predicts, scores, compares and reports on"),
    ("prepare", "flows.prepare.prepare", "Makes the cells, the reference and the quality tables of"),
    ("calibrate", "flows.calibrate.calibrate", "Measures how well each metric tells good from bad on"),
)


def table() -> list[Deployment]:
    """All deployments: every flow with every data set of the catalog, the user's own included, and `reproduce/all`.

    Raises UserError for a catalog entry that does not fit the schema.
    """
    datasets = [catalog.dataset(name) for name in catalog.names("dataset")]
    return [
        Deployment(
            flow=flow,
            name=dataset.name,
            entrypoint=entrypoint,
            pool=POOL,
            parameters={"dataset": dataset.name},
            tags=("calipert", dataset.task),
            description=f"{does} **{dataset.name}**: {dataset.title}."
            f"\n\nLicence of the data: {dataset.licence}.\n\nTo cite: {dataset.citation}.",
        )
        for flow, entrypoint, does in FLOWS
        for dataset in datasets
    ] + [_whole_study()]


def _whole_study() -> Deployment:
    return Deployment(
        flow="reproduce",
        name="all",
        entrypoint="flows.reproduce.reproduce",
        pool=POOL,
        parameters={"datasets": study()},
        tags=("calipert", "study"),
        description="Prepares and calibrates the data sets of the study one after the other, and benchmarks the models "
        "that are named. What one data set lacks does not stop the others; a second run goes on from the store.",
    )
