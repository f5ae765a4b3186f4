"""What the catalog holds, with what each entry needs beside itself, and what the settings are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from blocks.config.catalog import open_catalog
from blocks.config.settings import Settings, list_library_variables, list_sources, read_settings, variable
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
from core.errors import hide_password
from flows.cli.console import start_table

SECRET = re.compile("PASSWORD|PASSPHRASE|SECRET|TOKEN|KEY|AUTH|HEADERS|CONNECTION_URL")
LEGEND = (
    "download: once, from the entry's address. --source: what you have. container: its packages, or its image "
    "(calipert model build NAME, then CALIPERT_ENGINE=docker). secret: the Prefect Secret block of that name."
)


def make_listing(kind: Kind) -> RenderableType:
    """Lay out the entries of a kind with title and needs, and a legend. Raises UserError for a broken entry."""
    table = start_table("name", "", "needs", whole=1, first="bold")
    catalog = open_catalog()
    names = catalog.names(kind)
    # All models at once: each one alone would read the whole catalog again.
    entries: Iterable[Any] = catalog.models(names) if kind == "model" else map(getattr(catalog, kind), names)
    for entry in entries:
        about = f"{entry.title}: {', '.join(entry.models)}" if kind == "group" else entry.title
        needs = filter(None, dict.fromkeys(NEEDS[kind](catalog, entry)))
        table.add_row(entry.name, Text(about), Text(", ".join(needs)))
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


def build_settings_table() -> RenderableType:
    """Build the table of all settings, and of the variables that libraries read, where any is set.

    Passwords and keys are replaced by dots. Raises UserError for a setting with a wrong value.
    """
    settings = read_settings()
    table = start_table("setting", "value", "from", "what it is for", whole=1, first="bold")
    for field, about in Settings.model_fields.items():
        value = getattr(settings, field)
        origin = "default" if value == about.default else "environment"
        table.add_row(variable(field), _show(variable(field), value), origin, about.description)
    for name, value in list_sources().items():
        table.add_row(name, _show(name, value), "environment", "File of that entry of the catalog, or its folder.")
    others = list_library_variables()
    if not others:
        return table
    libraries = start_table("read by libraries", "value", whole=1, first="bold")
    for name, value in others.items():
        libraries.add_row(name, _show(name, value))
    return Group(table, "", libraries)


def _show(name: str, value: object) -> Text:
    if value is None:
        return Text("not set", style="dim")
    return Text("..." if SECRET.search(name) else hide_password(str(value)))
