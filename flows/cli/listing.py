"""What the catalog holds, and what each entry needs beside itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from blocks.config.catalog import open_catalog
from core.catalog.registry import Catalog, Kind
from core.catalog.schema import (
    EmbeddingSpec,
    HttpsSource,
    LocalSource,
    PretrainedSpec,
    ResolvedModel,
    S3Source,
    SimulatedSource,
)

LEGEND = (
    "download: once, from the entry's address. --source: what you have. container: its packages, or its image "
    "(calipert model build NAME, then CALIPERT_ENGINE=docker). secret: the Prefect Secret block of that name."
)


def make_listing(kind: Kind) -> RenderableType:
    """Lay out the entries of a kind with title and needs, and a legend. Raises UserError for a broken entry."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for head, style in (("name", "bold"), ("", ""), ("needs", "")):
        table.add_column(head, style=style, overflow="fold", no_wrap=head == "name")
    for name, about, needs in ROWS[kind](open_catalog()):
        table.add_row(name, Text(about), Text(", ".join(need for need in dict.fromkeys(needs) if need)))
    return Group(table, "", Text(LEGEND, style="dim"))


# Name, what it is, what it needs (each as often as it is needed, "" for nothing).
Row = tuple[str, str, Iterable[str]]


def _list_datasets(catalog: Catalog) -> Iterator[Row]:
    for spec in map(catalog.dataset, catalog.names("dataset")):
        yield spec.name, spec.title, [_file(spec.source, spec.name)]


def _list_published(catalog: Catalog) -> Iterator[Row]:
    for spec in map(catalog.pretrained, catalog.names("pretrained")):
        yield spec.name, spec.title, _of_published(spec)


def _list_embeddings(catalog: Catalog) -> Iterator[Row]:
    for spec in map(catalog.embedding, catalog.names("embedding")):
        yield spec.name, spec.title, _of_embedding(catalog, spec)


def _list_models(catalog: Catalog) -> Iterator[Row]:
    for model in catalog.models(catalog.names("model")):
        yield model.name, model.title, _of_model(catalog, model)


def _list_groups(catalog: Catalog) -> Iterator[Row]:
    for group in map(catalog.group, catalog.names("group")):
        needs = [need for model in catalog.models([group.name]) for need in _of_model(catalog, model)]
        yield group.name, f"{group.title}: {', '.join(group.models)}", needs


ROWS = {
    "dataset": _list_datasets,
    "embedding": _list_embeddings,
    "model": _list_models,
    "group": _list_groups,
    "pretrained": _list_published,
}


def _file(source: HttpsSource | S3Source | LocalSource | SimulatedSource, name: str, wanted: str = "FILE") -> str:
    return {"local": f"--source {name}={wanted}", "simulated": ""}.get(source.kind, "download")


def _of_published(spec: PretrainedSpec) -> list[str]:
    return [_file(source, spec.name, "FOLDER") for source in spec.files.values()]


def _of_embedding(catalog: Catalog, spec: EmbeddingSpec) -> Iterator[str]:
    for part in catalog.parts(spec):
        yield f"container {part.container}" if part.container else ""
        yield _file(part.source, part.name) if part.source else ""
        yield from _of_published(catalog.pretrained(part.pretrained)) if part.pretrained else ()
        yield f"secret {part.service.secret}" if part.service else ""


def _of_model(catalog: Catalog, model: ResolvedModel) -> Iterator[str]:
    yield f"container {model.container}" if model.container else ""
    yield from _of_embedding(catalog, model.embedding) if model.embedding else ()
    yield from _of_published(model.pretrained) if model.pretrained else ()
