"""Options that commands share, and how their text is read."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from core.errors import UserError

Dataset = Annotated[str, typer.Argument(help="A data set of the catalog, or the path of your own YAML entry.")]
Folds = Annotated[str | None, typer.Option(help="Number of folds, or leave-one-out.")]
Sources = Annotated[
    list[str] | None,
    typer.Option("--source", help="NAME=FILE: the file to use for a data set or embedding; may be repeated."),
]
Origin = Annotated[
    Literal["raw", "mirror"],
    typer.Option(help="Download the authors' raw file, or the preprocessed mirror; --source comes before either."),
]


def split_names(text: str) -> list[str]:
    """Split a list that is separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_sources(source: list[str] | None) -> dict[str, str]:
    """Read NAME=FILE. Raises UserError for anything else."""
    pairs = [text.partition("=") for text in source or []]
    for name, equals, file in pairs:
        if not (name and equals and file):
            raise UserError("--source", "value", f"{name + equals + file!r}", "write NAME=FILE")
    return {name: file for name, _, file in pairs}


def parse_folds(text: str | None) -> int | Literal["leave-one-out"] | None:
    """Read a number of folds, or leave-one-out. Raises UserError for anything else."""
    if text is None or text == "leave-one-out":
        return text  # type: ignore[return-value]
    if text.isdigit():
        return int(text)
    raise UserError("--folds", "value", repr(text), "a number of at least 2, or leave-one-out")
