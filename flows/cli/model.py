"""`calipert model`: images of models, and the contract's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from core.errors import UserError
from flows.cli.options import read_pairs
from flows.cli.session import CONSOLE

if TYPE_CHECKING:
    from core.catalog.schema import Form

app = typer.Typer(no_args_is_help=True, help="Build images of models, and check models against the contract.")


@app.command(name="list")
def list_() -> None:
    """List the containers of the catalog's models and embeddings, and whether their images are here."""
    from blocks.engines.docker.engine import connect
    from blocks.engines.docker.images import find_image

    table = Table("container", "image", "models and embeddings")
    with connect() as client:
        for container, names in sorted(_list_users().items()):
            try:
                state = str(find_image(client, _find_folder(container)).id)[:19]
            except UserError as error:
                state = f"[yellow]{escape(error.found)}[/yellow]"
            table.add_row(container, state, ", ".join(names))
    CONSOLE.print(table)


@app.command()
def build(
    names: Annotated[list[str], typer.Argument(help="Folders under model_containers, or paths of your own.")],
    arg: Annotated[
        list[str] | None,
        typer.Option("--arg", help="NAME=VALUE: an argument of the Dockerfile, such as BASE_IMAGE; may be repeated."),
    ] = None,
) -> None:
    """Build the images of models, calipert-NAME."""
    from blocks.engines.docker.engine import connect
    from blocks.engines.docker.images import build_image

    arguments = read_pairs("--arg", arg)
    folders = [_find_folder(name) for name in names]
    with connect() as client:
        for folder in folders:
            image = build_image(client, folder, arguments, lambda line: CONSOLE.print(escape(line), style="dim"))
            CONSOLE.print(f"{folder.name}: {image}")


@app.command()
def check(
    folder: Annotated[str, typer.Argument(help="The path of your model's folder, or one under model_containers.")],
    hyperparameters: Annotated[str, typer.Option(help="JSON of what differs from the model's defaults.")] = "{}",
    embedding: Annotated[
        Literal["table", "tables", "graph"] | None,
        typer.Option(help="The form of embedding that it gets; by default what the catalog says, else one table."),
    ] = None,
) -> None:
    """Run the contract's tests on a model under the engine in use (CALIPERT_ENGINE); exit status 1 if it fails one."""
    from flows.cli.model_check import check_model
    from tasks.engine import choose_engine, runs_elsewhere

    if runs_elsewhere():
        found = "an engine that runs models elsewhere"
        raise UserError("environment", "CALIPERT_ENGINE", found, "set it to docker or process")
    path, settings = _find_folder(folder), _parse_json_object(hyperparameters)
    failed = False
    form = embedding or _find_form(path.name)
    for asked, fault in check_model(path, choose_engine(), form, settings):
        CONSOLE.print(f"{'[green]ok[/green]   ' if fault is None else '[red]fails[/red]'} {asked}")
        if fault is not None:
            failed = True
            CONSOLE.print(escape(fault), style="red")
    if failed:
        raise typer.Exit(1)


def _list_users() -> dict[str, list[str]]:
    """Return container -> the models of the catalog that run in it, and the embeddings that it makes."""
    from blocks.config.catalog import open_catalog

    users: dict[str, list[str]] = {}
    catalog = open_catalog()
    models = {model.name: model for model in catalog.models(catalog.names("model"))}
    embeddings = {f"embedding {name}": catalog.embedding(name) for name in catalog.names("embedding")}
    for name, entry in (models | embeddings).items():
        if entry.container is not None:
            users.setdefault(entry.container, []).append(name)
    return users


def _find_form(container: str) -> Form:
    """Return the form of embedding that the catalog's models in a container get; a table if there is no such model."""
    from blocks.config.catalog import open_catalog

    catalog = open_catalog()
    resolved = catalog.models(catalog.names("model"))
    forms = {one.embedding.form for one in resolved if one.embedding and one.container == container}
    return "graph" if forms == {"graph"} else "table"


def _find_folder(name: str) -> Path:
    """Return the folder of a model by its path, or by the name of a container. Raises UserError without a model.py."""
    from tasks.inputs import list_container_places

    for folder in (Path(name).expanduser().resolve(), *(place / name for place in list_container_places())):
        if (folder / "model.py").is_file():
            return folder
    known = sorted(path.parent.name for place in list_container_places() for path in place.glob("*/model.py"))
    raise UserError(name, "model", "no folder with a model.py", f"give the path of one, or one of: {', '.join(known)}")


def _parse_json_object(text: str) -> dict[str, object]:
    example = 'as in {"epochs": 4}'
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError("--hyperparameters", "value", f"{text!r}: {error}", f"write JSON, {example}") from error
    if not isinstance(value, dict):
        raise UserError("--hyperparameters", "value", repr(text), f"write an object, {example}")
    return value
