"""What the catalog holds, and what each entry needs beside itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from blocks.config.catalog import open_catalog
from core.catalog.registry import Catalog, Kind
from core.catalog.schema import (
    DatasetSpec,
    EmbeddingSpec,
    GroupSpec,
    HttpsSource,
    LocalSource,
    PretrainedSpec,
    ResolvedModel,
    S3Source,
    SimulatedSource,
)
from flows.cli.console import start_table

LEGEND = (
    "download: once, from the entry's address. --source: what you have. container: its packages, or its image "
    "(calipert model build NAME, then CALIPERT_ENGINE=docker). secret: the Prefect Secret block of that name."
)


def make_listing(kind: Kind) -> RenderableType:
    """Lay out the entries of a kind with title and needs, and a legend. Raises UserError for a broken entry."""
    table = start_table("name", "", "needs", whole=1, first="bold")
    catalog = open_catalog()
    for name in catalog.names(kind):
        entry = getattr(catalog, kind)(name)
        about = f"{entry.title}: {', '.join(entry.models)}" if kind == "group" else entry.title
        table.add_row(name, Text(about), Text(", ".join(filter(None, dict.fromkeys(NEEDS[kind](catalog, entry))))))
    return Group(table, "", Text(LEGEND, style="dim"))


# What an entry needs: each as often as it is needed, "" for nothing.
def _of_dataset(catalog: Catalog, spec: DatasetSpec) -> Iterator[str]:
    yield _file(spec.source, spec.name)


def _of_published(catalog: Catalog, spec: PretrainedSpec) -> Iterator[str]:
    for source in spec.files.values():
        yield _file(source, spec.name, "FOLDER")


def _of_embedding(catalog: Catalog, spec: EmbeddingSpec) -> Iterator[str]:
    for part in catalog.parts(spec):
        yield f"container {part.container}" if part.container else ""
        yield _file(part.source, part.name) if part.source else ""
        yield from _of_published(catalog, catalog.pretrained(part.pretrained)) if part.pretrained else ()
        yield f"secret {part.service.secret}" if part.service else ""


def _of_model(catalog: Catalog, model: ResolvedModel) -> Iterator[str]:
    yield f"container {model.container}" if model.container else ""
    yield from _of_embedding(catalog, model.embedding) if model.embedding else ()
    yield from _of_published(catalog, model.pretrained) if model.pretrained else ()


def _of_group(catalog: Catalog, group: GroupSpec) -> Iterator[str]:
    for model in catalog.models([group.name]):
        yield from _of_model(catalog, model)


NEEDS: dict[Kind, Callable[[Catalog, Any], Iterator[str]]] = {
    "dataset": _of_dataset,
    "embedding": _of_embedding,
    "model": _of_model,
    "group": _of_group,
    "pretrained": _of_published,
}


def _file(source: HttpsSource | S3Source | LocalSource | SimulatedSource, name: str, wanted: str = "FILE") -> str:
    return {"local": f"--source {name}={wanted}", "simulated": ""}.get(source.kind, "download")
