"""What the catalog holds, and what each entry needs beside itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from blocks.config.catalog import open_catalog
from core.catalog.registry import Kind
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


def listing(kind: Kind) -> RenderableType:
    """The entries of a kind with title and needs, below them a legend. Raises UserError for an entry that is broken."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for head, style in (("name", "bold"), ("", ""), ("needs", "")):
        table.add_column(head, style=style, overflow="fold", no_wrap=head == "name")
    for name, about, needs in ROWS[kind]():
        table.add_row(name, Text(about), Text(", ".join(need for need in dict.fromkeys(needs) if need)))
    return Group(table, "", Text(LEGEND, style="dim"))


# Name, what it is, what it needs (each as often as it is needed, "" for nothing).
Row = tuple[str, str, Iterable[str]]


def _datasets() -> Iterator[Row]:
    for spec in map(open_catalog().dataset, open_catalog().names("dataset")):
        yield spec.name, spec.title, [_file(spec.source, spec.name)]


def _published() -> Iterator[Row]:
    for spec in map(open_catalog().pretrained, open_catalog().names("pretrained")):
        yield spec.name, spec.title, _of_published(spec)


def _embeddings() -> Iterator[Row]:
    for spec in map(open_catalog().embedding, open_catalog().names("embedding")):
        yield spec.name, spec.title, _of_embedding(spec)


def _models() -> Iterator[Row]:
    for model in open_catalog().models(open_catalog().names("model")):
        yield model.name, model.title, _of_model(model)


def _groups() -> Iterator[Row]:
    for group in map(open_catalog().group, open_catalog().names("group")):
        models = open_catalog().models([group.name])
        yield group.name, f"{group.title}: {', '.join(group.models)}", [n for model in models for n in _of_model(model)]


ROWS = {"dataset": _datasets, "embedding": _embeddings, "model": _models, "group": _groups, "pretrained": _published}


def _file(source: HttpsSource | S3Source | LocalSource | SimulatedSource, name: str, wanted: str = "FILE") -> str:
    return {"local": f"--source {name}={wanted}", "simulated": ""}.get(source.kind, "download")


def _of_published(spec: PretrainedSpec) -> list[str]:
    return [_file(source, spec.name, "FOLDER") for source in spec.files.values()]


def _of_embedding(spec: EmbeddingSpec) -> Iterator[str]:
    for part in open_catalog().parts(spec):
        yield f"container {part.container}" if part.container else ""
        yield _file(part.source, part.name) if part.source else ""
        yield from _of_published(open_catalog().pretrained(part.pretrained)) if part.pretrained else ()
        yield f"secret {part.service.secret}" if part.service else ""


def _of_model(model: ResolvedModel) -> Iterator[str]:
    yield f"container {model.container}" if model.container else ""
    yield from _of_embedding(model.embedding) if model.embedding else ()
    yield from _of_published(model.pretrained) if model.pretrained else ()
