"""The base and the field types of everything that people write in YAML.

Types are strict (`seed: true` and `seed: "42"` are refused), an unknown field is an error, and what was read cannot be
changed.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[a-z0-9][a-z0-9_]*$"
# A name becomes a folder, a deployment and a column of results: one safe spelling everywhere.
Name: TypeAlias = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Floor: TypeAlias = Annotated[int, Field(ge=0)]
# YAML has only lists; they become tuples, so that no reader of a shared entry can change it.
Texts: TypeAlias = Annotated[tuple[Text, ...], Field(strict=False)]


class Entry(BaseModel):
    """Base of all that people write in YAML: strict, frozen, without unknown fields."""

    # Pydantic would repeat what it refuses in tracebacks, a password in an address too.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)
