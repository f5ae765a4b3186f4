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
    """One deployment. entrypoint: dotted path of the flow; parameters: what its runs start with.

    choices: by parameter, the values that the form offers and the server takes; of a list, its items, of a mapping,
    its keys. hints: by parameter, a sentence that the form adds to the flow's own description.
    at_once: how many of its runs may run at the same time, any number where it is None; others wait for their turn.
    schedule: one that is off. Both are a start only: what somebody makes of them is kept.
    """

    flow: str
    name: str
    entrypoint: str
    pool: str
    parameters: dict[str, Any]
    tags: tuple[str, ...]
    description: str
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)
    at_once: int | None = None
    schedule: Schedule | None = None

    @property
    def full_name(self) -> str:
        """What follows `prefect deployment run`."""
        return f"{self.flow}/{self.name}"


class _Flow(NamedTuple):
    """A flow of one data set: name, dotted path, what it does with it, whether it takes models, folds and a seed."""

    name: str
    entrypoint: str
    does: str
    trains: bool


# No limit of runs at the same time: benchmarks of one data set with other models are as good as any, and runs that
# need the same artifact on one machine wait for each other at its store.
FLOWS = (
    _Flow(
        "benchmark", "flows.benchmark.benchmark", "Prepares, trains, predicts, scores, compares and reports on", True
    ),
    _Flow("prepare", "flows.prepare.prepare", "Makes the cells, the reference and the quality tables of", False),
    _Flow("calibrate", "flows.calibrate.calibrate", "Measures how well each metric tells good from bad on", False),
    _Flow(
        "train",
        "flows.train.train",
        "Trains models on every fold, predicts what it left out, and scores nothing, on",
        True,
    ),
)


class _Training(NamedTuple):
    """What the forms of all flows that train offer: models and groups, what these need beside the data, a hint."""

    models: tuple[str, ...]
    inputs: tuple[str, ...]
    groups: str


def build_table() -> list[Deployment]:
    """Build all deployments.

    They are every flow with every data set of the catalog, the user's own included, every embedding that data sets
    share, `reproduce/all`, and `train-fold/any`, which a benchmark starts for its folds.

    Raises UserError for a catalog entry that does not fit the schema.
    """
    datasets = [open_catalog().dataset(name) for name in open_catalog().names("dataset")]
    training = _Training(_models_and_groups(), _inputs(), _groups())
    return [
        *(_of_dataset(flow, dataset, training) for flow in FLOWS for dataset in datasets),
        *(_of_embedding(name) for name in _shared_embeddings()),
        _whole_study(),
        _one_training(),
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
        entrypoint=flow.entrypoint,
        pool=CPU,
        parameters={"dataset": dataset.name},
        tags=("calipert", dataset.name, dataset.task),
        description=f"{flow.does} **{dataset.name}**: {dataset.title}."
        f"\n\nLicence of the data: {dataset.licence}.\n\nTo cite: {dataset.citation}.",
        choices=choices | models,
        hints=hints,
    )


def _of_embedding(name: str) -> Deployment:
    spec = open_catalog().embedding(name)
    return Deployment(
        flow="embed",
        name=name,
        entrypoint="flows.embed.embed",
        pool=CPU,
        parameters={"embedding": name},
        tags=("calipert", name, "embedding"),
        description=f"Makes the gene embedding **{name}**: {spec.title}. A benchmark that needs it makes it by itself."
        f"\n\nLicence: {spec.licence}.\n\nTo cite: {spec.citation}.",
        choices={"embedding": (name,), "sources": tuple(one.name for one in list_embedding_inputs(spec))},
    )


def _whole_study() -> Deployment:
    return Deployment(
        flow="reproduce",
        name="all",
        entrypoint="flows.reproduce.reproduce",
        pool=CPU,
        parameters={"datasets": list_study()},
        tags=("calipert", "study"),
        description="Prepares and calibrates the data sets of the study one after the other, and benchmarks the models "
        "that are named. What one data set lacks does not stop the others; a second run continues from the store."
        "\n\nIts schedule is an example, and off.",
        choices={
            "datasets": tuple(open_catalog().names("dataset")),
            "models": _models_and_groups(),
            "sources": (*open_catalog().names("dataset"), *_inputs()),
        },
        hints={"models": _groups(), "sources": 'As in {"norman19": "/data/norman19.h5ad"}.'},
        # Days of work: what a schedule starts waits until the run before has ended.
        at_once=1,
        schedule=Schedule("every-sunday", "0 3 * * 0"),
    )


def _one_training() -> Deployment:
    return Deployment(
        flow="train-fold",
        name="any",
        entrypoint="flows.train_fold.train_fold",
        pool=GPU,
        parameters={},
        tags=("calipert", "internal"),
        description="Trains one model on one fold. Benchmarks start it, one run per model, fold and seed; it is not "
        "meant to be started by hand.",
    )


def _shared_embeddings() -> tuple[str, ...]:
    return tuple(name for name in open_catalog().names("embedding") if open_catalog().embedding(name).is_shared)


def _inputs() -> tuple[str, ...]:
    """List what models need beside the data, and a user may have as a file."""
    needed = list_inputs(open_catalog().models(open_catalog().names("model")))
    return tuple(sorted(one.name for one in needed if not (isinstance(one, EmbeddingSpec) and one.per_fold)))


def _models_and_groups() -> tuple[str, ...]:
    """List groups, which most people want, then models."""
    return (*open_catalog().names("group"), *open_catalog().names("model"))


def _groups() -> str:
    groups = [
        f"{name} ({', '.join(model.name for model in open_catalog().models([name]))})"
        for name in open_catalog().names("group")
    ]
    return f"Groups: {'; '.join(groups)}."
