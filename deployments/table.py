"""The table of deployments: a row for every flow and data set, for every shared embedding, and for the whole study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from blocks.config.catalog import open_catalog
from blocks.config.pools import CPU, GPU
from core.catalog.schema import DatasetSpec, EmbeddingSpec
from tasks.inputs import list_embedding_inputs, list_inputs, list_study


class Schedule(NamedTuple):
    """When to start runs: `cron` in UTC. slug: its name among the schedules of a deployment."""

    slug: str
    cron: str


@dataclass(frozen=True)
class Deployment:
    """One deployment. parameters: what its runs start with.

    choices: by parameter, the values that the form offers and the server takes; of a list, its items, of a mapping,
    its keys. hints: by parameter, a sentence that the form adds to the flow's own description.
    at_once: how many of its runs may run at the same time, any number where it is None; others wait for their turn.
    schedule: one that is off. Both are a start only: what somebody makes of them is kept.
    """

    flow: str
    name: str
    parameters: dict[str, Any]
    tags: tuple[str, ...]
    description: str
    pool: str = CPU
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)
    at_once: int | None = None
    schedule: Schedule | None = None

    @property
    def full_name(self) -> str:
        """What follows `prefect deployment run`."""
        return f"{self.flow}/{self.name}"

    @property
    def entrypoint(self) -> str:
        """Dotted path of the flow, which lies in a module of its own name."""
        name = self.flow.replace("-", "_")
        return f"flows.{name}.{name}"


class _Flow(NamedTuple):
    """A flow of one data set: name, what it does with it, whether it takes models, folds and a seed."""

    name: str
    does: str
    trains: bool


# No limit of runs at the same time: benchmarks of one data set with other models are as good as any, and runs that
# need the same artifact on one machine wait for each other at its store.
FLOWS = (
    _Flow("benchmark", "Prepares, trains, predicts, scores, compares and reports on", True),
    _Flow("prepare", "Makes the cells, the reference and the quality tables of", False),
    _Flow("calibrate", "Measures how well each metric tells good from bad on", False),
    _Flow("train", "Trains models on every fold, predicts what it left out, and scores nothing, on", True),
)


class _Training(NamedTuple):
    """What the forms of all flows that train offer.

    models: groups and models. inputs: what these need beside the data, and a user may have as a file. groups: a hint.
    """

    models: tuple[str, ...]
    inputs: tuple[str, ...]
    groups: str


def build_table() -> list[Deployment]:
    """Build all deployments.

    They are every flow with every data set of the catalog, the user's own included, every embedding that data sets
    share, `reproduce/all`, and `train-fold/any`, which a benchmark starts for its folds.

    Raises UserError for a catalog entry that does not fit the schema.
    """
    catalog = open_catalog()
    datasets = [catalog.dataset(name) for name in catalog.names("dataset")]
    embeddings = [catalog.embedding(name) for name in catalog.names("embedding")]
    training = _describe_training()
    return [
        *(_of_dataset(flow, dataset, training) for flow in FLOWS for dataset in datasets),
        *(_of_embedding(embedding) for embedding in embeddings if embedding.is_shared),
        _whole_study([dataset.name for dataset in datasets], training),
        Deployment(
            flow="train-fold",
            name="any",
            parameters={},
            tags=("calipert", "internal"),
            description="Trains one model on one fold. Benchmarks start it, one run per model, fold and seed; it is "
            "not meant to be started by hand.",
            pool=GPU,
        ),
    ]


def _of_dataset(flow: _Flow, dataset: DatasetSpec, training: _Training) -> Deployment:
    choices = {
        "dataset": (dataset.name,),
        "origin": ("raw",) if dataset.mirror is None else ("raw", "mirror"),
        "sources": (dataset.name, *(training.inputs if flow.trains else ())),
    }
    models = {"models": training.models} if flow.trains else {}
    hints = {"models": training.groups, "folds": f"The catalog says {dataset.folds}."} if flow.trains else {}
    if dataset.mirror is None:
        hints["origin"] = "This data set has no mirror."
    return Deployment(
        flow=flow.name,
        name=dataset.name,
        parameters={"dataset": dataset.name},
        tags=("calipert", dataset.name, dataset.task),
        description=f"{flow.does} **{dataset.name}**: {dataset.title}."
        f"\n\nLicence of the data: {dataset.licence}.\n\nTo cite: {dataset.citation}.",
        choices=choices | models,
        hints=hints,
    )


def _of_embedding(spec: EmbeddingSpec) -> Deployment:
    return Deployment(
        flow="embed",
        name=spec.name,
        parameters={"embedding": spec.name},
        tags=("calipert", spec.name, "embedding"),
        description=f"Makes the gene embedding **{spec.name}**: {spec.title}. A benchmark that needs it makes it by "
        f"itself.\n\nLicence: {spec.licence}.\n\nTo cite: {spec.citation}.",
        choices={"embedding": (spec.name,), "sources": tuple(one.name for one in list_embedding_inputs(spec))},
    )


def _whole_study(datasets: list[str], training: _Training) -> Deployment:
    return Deployment(
        flow="reproduce",
        name="all",
        parameters={"datasets": list_study()},
        tags=("calipert", "study"),
        description="Prepares and calibrates the data sets of the study one after the other, and benchmarks the models "
        "that are named. What one data set lacks does not stop the others; a second run continues from the store."
        "\n\nIts schedule is an example, and off.",
        choices={
            "datasets": tuple(datasets),
            "models": training.models,
            "sources": (*datasets, *training.inputs),
        },
        hints={"models": training.groups, "sources": 'As in {"norman19": "/data/norman19.h5ad"}.'},
        # Days of work: what a schedule starts waits until the run before has ended.
        at_once=1,
        schedule=Schedule("every-sunday", "0 3 * * 0"),
    )


def _describe_training() -> _Training:
    catalog = open_catalog()
    groups = {name: ", ".join(model.name for model in catalog.models([name])) for name in catalog.names("group")}
    needed = list_inputs(catalog.models(catalog.names("model")))
    return _Training(
        # What most people want comes first.
        models=(*groups, *catalog.names("model")),
        inputs=tuple(sorted(one.name for one in needed if not (isinstance(one, EmbeddingSpec) and one.per_fold))),
        groups=f"Groups: {'; '.join(f'{name} ({models})' for name, models in groups.items())}.",
    )
