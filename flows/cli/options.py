"""Options that commands share, and the reading of those that typer does not read itself."""

from __future__ import annotations

from collections.abc import Iterable
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


def read_names(text: str) -> list[str]:
    """Read names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def read_pairs(option: str, texts: Iterable[str] | None, form: str = "NAME=VALUE") -> dict[str, str]:
    """Read texts of the form NAME=VALUE. Raises UserError, with the option and the form, for any other text."""
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        # The value of a build argument may be empty, a file's name may not.
        if not (name and equals and (value or form == "NAME=VALUE")):
            raise UserError(option, "value", repr(text), f"write {form}")
        pairs[name] = value
    return pairs


def read_folds(text: str | None) -> int | Literal["leave-one-out"] | None:
    """Read a number of folds. Raises UserError for anything else than a number or leave-one-out."""
    if text is None:
        return None
    if text == "leave-one-out":
        return "leave-one-out"
    if text.isdigit():
        return int(text)
    raise UserError("--folds", "value", repr(text), "a number of at least 2, or leave-one-out")


def read_sources(texts: Iterable[str] | None) -> dict[str, str]:
    """Read the option --source. Raises UserError as `read_pairs` does."""
    return read_pairs("--source", texts, "NAME=FILE")
